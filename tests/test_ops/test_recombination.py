"""Phase of one image, amplitude of another: against NumPy's transform of the result."""

import numpy as np
import pytest
import torch

from mmbcn.ops.recombination import recombine


def spectrum(x, per_channel):
    return np.fft.fftn(x.double().numpy(), axes=(-2, -1) if per_channel else (-3, -2, -1))


def images(shape, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.rand(2, *shape, generator=g, dtype=torch.float64).to(dtype) for _ in range(2)]


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("shape", [(3, 16, 12), (3, 7, 9), (4, 6, 5), (1, 1, 8)])
def test_phase_is_kept_and_amplitude_is_the_donors(shape, per_channel):
    p, a = images(shape)
    got = spectrum(recombine(p, a, per_channel), per_channel)
    own, donor = spectrum(p, per_channel), spectrum(a, per_channel)
    np.testing.assert_allclose(np.abs(got), np.abs(donor), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(got / np.abs(got), own / np.abs(own), rtol=0, atol=1e-9)


@pytest.mark.parametrize("per_channel", [False, True])
def test_float32_on_pixels_is_within_1e_4_of_the_amplitude(per_channel):
    p, a = (255 * x.round(decimals=2) for x in images((3, 63, 50), torch.float32))
    got = np.abs(spectrum(recombine(p, a, per_channel), per_channel))
    donor = np.abs(spectrum(a, per_channel))
    assert np.abs(got - donor).max() <= 1e-4 * donor.max()


def test_transforms_of_channels_differ_from_one_over_all():
    p, a = images((3, 8, 8))
    together, apart = recombine(p, a), recombine(p, a, per_channel=True)
    assert (together - apart).abs().max() > 0.01
    alone = torch.cat([recombine(p[:, c : c + 1], a[:, c : c + 1]) for c in range(3)], 1)
    torch.testing.assert_close(apart, alone)


@pytest.mark.parametrize("per_channel", [False, True])
def test_identical_images_give_the_identity(per_channel):
    [p, _] = images((3, 9, 6))
    torch.testing.assert_close(recombine(p, p, per_channel), p)


def test_images_of_a_batch_do_not_meet():
    p, a = images((3, 8, 8))
    torch.testing.assert_close(recombine(p, a)[1], recombine(p[1], a[1]))
