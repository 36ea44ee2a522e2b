_base_ = "./deeplabv3_r50_bn_20k_voc12-512x512.py"
from mmbcn import set_norm

model = set_norm(_base_.model, "ic")
