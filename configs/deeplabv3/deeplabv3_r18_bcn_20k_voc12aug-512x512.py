_base_ = "./deeplabv3_r18_bn_20k_voc12aug-512x512.py"
from mmbcn import set_norm

model = set_norm(_base_.model, "bcn")
