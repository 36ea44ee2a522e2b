# The headline recipe under its short name
_base_ = "./deeplabv3/deeplabv3_r101_bcn_40k_cityscapes-512x1024.py"
