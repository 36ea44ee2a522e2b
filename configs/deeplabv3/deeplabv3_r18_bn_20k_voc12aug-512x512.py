_base_ = [
    "../_base_/models/deeplabv3_r18.py",
    "../_base_/datasets/voc12aug_512x512.py",
    "../_base_/schedules/20k.py",
    "../_base_/default_runtime.py",
]
model = dict(
    data_preprocessor=dict(size=(512, 512)),
    decode_head=dict(num_classes=21),
    auxiliary_head=dict(num_classes=21),
)
