# Follows the BCN authors' VOC recipe, to be run on 16 images in all (4 GPUs of 4). THEIR reported
# mIoU on VOC12 val: SyncBCN + WS 78.10, BN 76.49, GN + WS 77.20 (arXiv:1911.09738). Not ours.
# They start from their ImageNet weights: --cfg-options model.pretrained=PATH
_base_ = [
    "../_base_/models/deeplabv3_r101_os16.py",
    "../_base_/datasets/voc12aug_513x513.py",
    "../_base_/schedules/50e.py",
    "../_base_/default_runtime.py",
]
from mmbcn import set_norm

log_processor = dict(by_epoch=True)
model = set_norm(_base_.model, "syncbcn_ws")
