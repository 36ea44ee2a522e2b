# VOC12 train and the SBD images (aug.txt), whose labels are in SegmentationClassAug
_base_ = "./voc12_512x512.py"
dataset_train = dict(
    type="PascalVOCDataset",
    data_root="data/VOCdevkit/VOC2012",
    ann_file="ImageSets/Segmentation/train.txt",
    data_prefix=dict(img_path="JPEGImages", seg_map_path="SegmentationClass"),
    pipeline=_base_.train_pipeline,
)
dataset_aug = dict(
    type="PascalVOCDataset",
    data_root="data/VOCdevkit/VOC2012",
    ann_file="ImageSets/Segmentation/aug.txt",
    data_prefix=dict(img_path="JPEGImages", seg_map_path="SegmentationClassAug"),
    pipeline=_base_.train_pipeline,
)
train_dataloader = dict(
    dataset=dict(_delete_=True, type="ConcatDataset", datasets=[dataset_train, dataset_aug])
)
