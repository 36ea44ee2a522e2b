# For comparing norms on a CPU: half the size, output stride 16, a run in minutes
_base_ = [
    "../_base_/models/deeplabv3_r18.py",
    "../_base_/datasets/camvid_176x240.py",
    "../_base_/schedules/1k.py",
    "../_base_/default_runtime.py",
]
model = dict(
    data_preprocessor=dict(size=(176, 240)),
    backbone=dict(strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2)),
    decode_head=dict(dilations=(1, 6, 12, 18), num_classes=11),
    auxiliary_head=dict(num_classes=11),
)
