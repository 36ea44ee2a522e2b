"""A tiny model with a checkpoint and a config file, and the tools run in this process."""

import runpy
import sys
from pathlib import Path

import torch
from mmengine.registry import MODELS, DefaultScope

ROOT = Path(__file__).parents[2]


def make_case(folder, cfg):
    """Write config and checkpoint; their paths."""
    loader = dict(num_workers=0, persistent_workers=False)
    cfg.merge_from_dict(
        dict(
            train_dataloader=dict(dataset=dict(num_images=6)),
            test_dataloader=dict(**loader, dataset=dict(num_images=4, size=(48, 48))),
        )
    )
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope("mmseg"):
        model = MODELS.build(cfg.model)
    model.init_weights()
    checkpoint, config = folder / "model.pth", folder / "config.json"
    torch.save(dict(meta=dict(), state_dict=model.state_dict()), checkpoint)
    cfg.dump(str(config))
    return config, checkpoint


def run_tool(name, *args):
    """Run a tool of ``tools/analysis`` as if from the command line."""
    path, argv = list(sys.path), sys.argv
    tool = ROOT / f"tools/analysis/{name}.py"
    sys.path.insert(0, str(tool.parent))
    sys.argv = [str(tool), *map(str, args)]
    sys.modules.pop("_common", None)  # other tools' module of this name
    try:
        runpy.run_path(str(tool), run_name="__main__")
    finally:
        sys.path[:], sys.argv = path, argv
