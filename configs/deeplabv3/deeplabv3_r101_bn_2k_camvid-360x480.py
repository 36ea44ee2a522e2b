_base_ = "./deeplabv3_r50_bn_2k_camvid-360x480.py"
model = dict(backbone=dict(depth=101))
