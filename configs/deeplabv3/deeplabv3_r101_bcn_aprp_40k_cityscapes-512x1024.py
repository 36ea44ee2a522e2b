_base_ = "./deeplabv3_r101_bcn_40k_cityscapes-512x1024.py"
model = dict(data_preprocessor=dict(type="mmbcn.APRPairDataPreProcessor"))
