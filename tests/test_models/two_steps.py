"""Two steps of a config of mmpretrain or mmdetection on random images, then a prediction; as JSON.

usage: two_steps.py CONFIG NORM

Where mmcv has no compiled operations, mmdet's need of them is met by torchvision's, as far as
training goes: ``nms`` and RoIAlign. All others raise, and nothing is predicted.
"""

import copy
import importlib
import json
import sys
import types
from importlib.util import find_spec

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn

import mmbcn
from mmbcn.layers import BatchChannelNorm

SIZE = 96


def replace_operations():
    """Give mmcv operations in place of its compiled ones."""

    def missing(*args, **kwargs):
        raise NotImplementedError("mmcv has no compiled operations here")

    def nms(boxes, scores, iou_threshold, offset):
        return importlib.import_module("torchvision").ops.nms(boxes, scores, iou_threshold)

    def roi_align_forward(features, boxes, output, *_, aligned_height, aligned_width, **options):
        ops = importlib.import_module("torchvision").ops
        known = {k: options[k] for k in ("spatial_scale", "sampling_ratio", "aligned")}
        output.copy_(ops.roi_align(features, boxes, (aligned_height, aligned_width), **known))

    stub = types.ModuleType("mmcv._ext")
    stub.nms, stub.roi_align_forward = nms, roi_align_forward
    stub.__getattr__ = lambda name: missing
    sys.modules["mmcv._ext"] = stub


def random_classes():
    from mmpretrain.structures import DataSample

    return [DataSample().set_gt_label(i) for i in range(2)]


def random_boxes():
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    size = (SIZE, SIZE)
    meta = dict(img_shape=size, ori_shape=size, pad_shape=size, batch_input_shape=size)
    mask = np.zeros((1, *size), np.uint8)
    mask[:, 10:60, 10:60] = 1
    truth = dict(bboxes=torch.tensor([[10.0, 10, 60, 60]]), labels=torch.tensor([3]))
    samples = []
    for _ in range(2):
        sample = DetDataSample(metainfo=dict(meta, scale_factor=(1.0, 1.0)))
        sample.gt_instances = InstanceData(**truth, masks=BitmapMasks(mask, *size))
        samples.append(sample)
    return samples


@torch.no_grad()
def predict(model, data):
    """Of each image, the numbers that tell how sure the model is, or of how many things."""
    found = model(**data, mode="predict")
    if hasattr(found[0], "pred_score"):
        return [sample.pred_score.tolist() for sample in found]
    return [sample.pred_instances.scores.tolist() for sample in found]


def main(path, norm):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    compiled = find_spec("mmcv._ext") is not None
    if not compiled and "mmdet" in path:
        replace_operations()
    cfg = Config.fromfile(path)
    scope = cfg.default_scope
    for key in ("bbox_roi_extractor", "mask_roi_extractor"):
        if not compiled and key in (cfg.model.get("roi_head") or {}):
            cfg.model.roi_head[key].roi_layer.use_torchvision = True
    if scope == "mmdet":  # a detection in every image
        tests = cfg.model.test_cfg
        tests.get("rcnn", tests).score_thr = 0.0
    init_default_scope(scope)
    if norm:
        mmbcn.set_norm(cfg.model, norm)
    cfg.model.backbone.init_cfg = None  # no download
    model = MODELS.build(cfg.model)
    model.init_weights()
    model.train()
    inside = {id(m.bn) for m in model.modules() if isinstance(m, BatchChannelNorm)}
    kinds = (
        *(nn.modules.batchnorm._BatchNorm, nn.GroupNorm),
        *(nn.modules.instancenorm._InstanceNorm, nn.LayerNorm),
    )
    norms = [
        type(m).__name__ for m in model.modules() if isinstance(m, kinds) and id(m) not in inside
    ]
    images = [torch.randint(0, 256, (3, SIZE, SIZE), dtype=torch.uint8) for _ in range(2)]
    samples = random_boxes() if scope == "mmdet" else random_classes()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    unprepared = dict(inputs=images, data_samples=copy.deepcopy(samples))
    data = model.data_preprocessor(dict(inputs=images, data_samples=samples), True)
    for _ in range(2):  # in the first, zero-initialised branches pass nothing back
        loss, _ = model.parse_losses(model(**copy.deepcopy(data), mode="loss"))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    reached = [p.grad is not None and bool(p.grad.any()) for p in model.parameters()]
    share = sum(reached) / len(reached)
    result = dict(loss=float(loss.detach()), norms=norms, reached=share)
    if compiled or scope != "mmdet":
        result["predicted"] = predict(model.eval(), model.data_preprocessor(unprepared))
    sys.stdout.write("RESULT" + json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
