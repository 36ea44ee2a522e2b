# DeepLabV3 as in the BCN authors' VOC code: ResNet-101, output stride 16 (dilations 1, 2, 2 in the
# last stage), ASPP of 256 channels with rates 6, 12, 18 and a 1x1 fuse, no auxiliary head, no
# dropout.
_base_ = "./deeplabv3_r101.py"
model = dict(
    data_preprocessor=dict(size=(513, 513)),
    backbone=dict(
        type="ResNet",
        strides=(1, 2, 2, 1),
        dilations=(1, 1, 1, 2),
    ),
    decode_head=dict(
        type="mmbcn.PointwiseFuseASPPHead",
        channels=256,
        dilations=(1, 6, 12, 18),
        dropout_ratio=0,
        num_classes=21,
        align_corners=True,
    ),
    auxiliary_head=None,
)
