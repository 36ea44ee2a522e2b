_base_ = "./deeplabv3_r18_bn_2k_camvid-360x480.py"
from mmbcn import set_norm

model = set_norm(_base_.model, "ic")
