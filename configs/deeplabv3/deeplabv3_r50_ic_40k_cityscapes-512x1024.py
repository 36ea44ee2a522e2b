_base_ = "./deeplabv3_r50_bn_40k_cityscapes-512x1024.py"
from mmbcn import set_norm

model = set_norm(_base_.model, "ic")
