_base_ = [
    "../_base_/models/deeplabv3_r101.py",
    "../_base_/datasets/cityscapes_512x1024.py",
    "../_base_/schedules/40k.py",
    "../_base_/default_runtime.py",
]
