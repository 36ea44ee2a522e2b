# As the authors' DeepLabV3 code: scaled by 0.5 to 2 of the image's own size, flipped, and tested
# at the image's own size
_base_ = "./voc12aug_512x512.py"
crop_size = (513, 513)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="mmbcn.RandomScale", ratio_range=(0.5, 2.0)),
    dict(type="RandomCrop", crop_size=crop_size),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
dataset_train = dict(pipeline=train_pipeline)
dataset_aug = dict(pipeline=train_pipeline)
train_dataloader = dict(
    batch_size=4,  # on 4 GPUs: 16 in all
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(
        datasets=[
            dict(_base_.dataset_train, pipeline=train_pipeline),
            dict(_base_.dataset_aug, pipeline=train_pipeline),
        ]
    ),
)
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
