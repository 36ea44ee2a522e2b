_base_ = [
    "../_base_/models/deeplabv3_r101.py",
    "../_base_/datasets/shapes_128x128.py",
    "../_base_/schedules/300.py",
    "../_base_/default_runtime.py",
]
model = dict(
    data_preprocessor=dict(size=(128, 128)),
    decode_head=dict(num_classes=7),
    auxiliary_head=dict(num_classes=7),
)
