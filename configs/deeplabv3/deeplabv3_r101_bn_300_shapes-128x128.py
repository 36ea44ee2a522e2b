_base_ = "./deeplabv3_r50_bn_300_shapes-128x128.py"
model = dict(backbone=dict(depth=101))
