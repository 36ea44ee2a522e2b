_base_ = "./deeplabv3_r50_bn_40k_cityscapes-512x1024.py"
model = dict(backbone=dict(depth=101))
