_base_ = "./deeplabv3_r18_bcn_300_shapes-128x128.py"
model = dict(data_preprocessor=dict(type="mmbcn.APRPairDataPreProcessor"))
