_base_ = "./deeplabv3_r18_bcn_2k_camvid-360x480.py"
model = dict(data_preprocessor=dict(type="mmbcn.APRPairDataPreProcessor"))
