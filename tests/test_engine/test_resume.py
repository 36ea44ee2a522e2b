"""A run that was interrupted and resumed ends as if it had not been: bit by bit."""

import random

import pytest
import torch

pytest.importorskip("mmseg")

from training import Fault, assert_identical, saved, tiny_config, train, train_here


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What an uninterrupted run ends with."""
    work = tmp_path_factory.mktemp("whole")
    train_here(tiny_config(work), "whole")
    return saved(work, 8)


def interrupt(cfg, name, **fault):
    cfg.custom_hooks = [dict(type=Fault, what="raise", **fault)]
    with pytest.raises(RuntimeError, match="struck"):
        train_here(cfg, name)


# from the checkpoint of iteration 3, before the validation after iteration 4; and of 6, after it
@pytest.mark.parametrize("struck", [4, 7])
def test_resumed_run_is_bit_identical(tmp_path, whole, struck):
    interrupt(tiny_config(tmp_path), f"interrupted{struck}", iters=struck)
    assert not (tmp_path / "iter_8.pth").exists()
    train_here(tiny_config(tmp_path, resume=True), f"resumed{struck}")
    assert_identical(saved(tmp_path, 8), whole)


def test_resumed_run_draws_the_same_synthetic_maps(tmp_path):
    """Kalman normalization draws in every iteration."""
    train_here(tiny_config(tmp_path / "a", iters=5, norm="kn"), "kn")
    interrupt(tiny_config(tmp_path / "b", iters=5, norm="kn"), "kn interrupted", iters=4)
    train_here(tiny_config(tmp_path / "b", iters=5, norm="kn", resume=True), "kn resumed")
    assert_identical(saved(tmp_path / "b", 5), saved(tmp_path / "a", 5))


def test_checkpoint_and_validation_of_one_iteration(tmp_path):
    """What validation draws, and what the best checkpoint's second saving stores, is no matter."""

    def config(run, **options):
        options |= {"default_hooks.checkpoint.interval": 2, "train_cfg.val_interval": 2}
        cfg = tiny_config(tmp_path / run, iters=5, **options)
        cfg.val_dataloader.dataset.pipeline.insert(1, dict(type="PhotoMetricDistortion"))
        return cfg

    train_here(config("a"), "both")
    interrupt(config("b"), "both interrupted", iters=3)
    train_here(config("b", resume=True), "both resumed")
    assert_identical(saved(tmp_path / "b", 5), saved(tmp_path / "a", 5))


def test_worker_processes_change_nothing(tmp_path, whole):
    train_here(tiny_config(tmp_path, workers=2), "workers")
    assert_identical(saved(tmp_path, 8), whole)


@pytest.mark.slow
def test_seed_of_the_interrupted_run_is_taken(tmp_path):
    """Without a seed in the config, each process draws one: that of the first run counts."""
    options = {"randomness.seed": None}
    interrupt(tiny_config(tmp_path / "a", iters=5, **options), "unseeded", iters=4)
    train_here(tiny_config(tmp_path / "a", iters=5, resume=True, **options), "unseeded resumed")
    seed = torch.load(tmp_path / "a/iter_5.pth", weights_only=False)["meta"]["seed"]
    train_here(tiny_config(tmp_path / "b", iters=5, **{"randomness.seed": seed}), "seeded")
    assert_identical(saved(tmp_path / "a", 5), saved(tmp_path / "b", 5))


@pytest.mark.parametrize("sampler", ["InfiniteSampler", "DefaultSampler"])
def test_augmentation_differs_between_passes(tmp_path, sampler):
    """Guards the numbering: an image must not be cropped alike whenever it comes."""
    from mmbcn.engine import NormRunner

    cfg = tiny_config(tmp_path, iters=6)
    cfg.train_dataloader.sampler = dict(type=sampler, shuffle=False)
    cfg.experiment_name = f"passes {sampler}"
    runner = NormRunner.from_cfg(cfg)
    loader = runner.build_train_loop(cfg.train_cfg).dataloader
    batches = [batch for _ in range(2) for batch, _ in zip(loader, range(5), strict=False)]
    first = {}
    for image, sample in ((i, s) for b in batches for i, s in zip(*b.values(), strict=True)):
        first.setdefault(sample.img_path, []).append(image)
    assert len(first) == 5
    for images in first.values():
        assert len(images) >= 2
        assert not torch.equal(images[0], images[1])


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_at_any_iteration(tmp_path, whole, workers):
    iters = random.SystemRandom().choice(range(4, 8))
    cfg = tiny_config(tmp_path, workers=workers)
    cfg.custom_hooks = [dict(type="training.Fault", what="SIGKILL", iters=iters)]
    code, out = train(cfg)
    assert code == -9, out[-3000:]
    cfg.custom_hooks = []
    code, out = train(cfg, "--resume")
    assert code == 0, out[-3000:]
    resumed = {4: 3, 5: 4, 6: 4, 7: 6}[iters]  # the best, of iteration 4, is saved once more
    assert f"resumed epoch: 0, iter: {resumed}" in out
    assert_identical(saved(tmp_path, 8), whole)


@pytest.mark.slow
def test_epoch_based_loop(tmp_path):
    """Ends in the middle of an epoch of 3 iterations, and goes on from there."""

    def config(run):
        cfg = tiny_config(tmp_path / run)
        cfg.train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=3, val_interval=1)
        cfg.train_dataloader.sampler.type = "DefaultSampler"
        cfg.default_hooks.checkpoint.update(by_epoch=True, interval=1)
        return cfg

    train_here(config("a"), "epochs")
    for iters, what, end in ((4, "SIGTERM", 143), (8, "SIGKILL", -9)):
        cfg = config("b")
        cfg.custom_hooks = [dict(type="training.Fault", what=what, iters=iters)]
        code, out = train(cfg, "--resume")
        assert code == end, out[-3000:]
    cfg.custom_hooks = []
    code, out = train(cfg, "--resume")
    assert code == 0, out[-3000:]
    for run in "ab":
        (tmp_path / run / "epoch_3.pth").rename(tmp_path / run / "iter_9.pth")
    assert_identical(saved(tmp_path / "b", 9), saved(tmp_path / "a", 9))
