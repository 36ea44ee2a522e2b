_base_ = "./deeplabv3_r50_bn_20k_voc12-512x512.py"
model = dict(backbone=dict(depth=101))
