_base_ = "./deeplabv3_r18_bn_300_shapes-128x128.py"
from mmbcn import set_norm

model = set_norm(_base_.model, "ic")
