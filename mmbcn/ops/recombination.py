"""Amplitude-phase recombination of images.

Paper: Chen, Peng, Ma, Li, Du, Tian 2021, "Amplitude-Phase Recombination: Rethinking Robustness of
Convolutional Neural Networks in Frequency Domain", https://arxiv.org/abs/2108.08487
"""

import torch
from torch import Tensor


def recombine(phase_of: Tensor, amplitude_of: Tensor, per_channel: bool = False) -> Tensor:
    """The Fourier phase of one image with the amplitude of another: |F(a)| exp(i arg F(p)).

    Phase is mostly where things are, amplitude how strong each frequency is: contrast, texture,
    lighting. Both spectra are those of real images, so the result is real without taking a part.

    Args:
        phase_of: floating point, real.
        amplitude_of: of the same shape.
        per_channel: 2-d transforms of each channel; False: one over channels, height and width, as
            in the authors' code.

    Shape: (..., C, H, W), (..., C, H, W) -> (..., C, H, W)
    """
    dims = (-2, -1) if per_channel else (-3, -2, -1)
    phase = torch.fft.rfftn(phase_of, dim=dims).angle()
    amplitude = torch.fft.rfftn(amplitude_of, dim=dims).abs()
    sizes = [phase_of.shape[d] for d in dims]
    return torch.fft.irfftn(torch.polar(amplitude, phase), s=sizes, dim=dims)
