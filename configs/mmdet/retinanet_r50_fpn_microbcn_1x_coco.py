_base_ = __import__("mmdet").__path__[0] + "/.mim/configs/retinanet/retinanet_r50_fpn_1x_coco.py"
from mmbcn import set_norm

model = set_norm(_base_.model, "microbcn")
model.backbone.update(norm_eval=False, frozen_stages=-1)  # BatchNorm's statistics are not BCN's
