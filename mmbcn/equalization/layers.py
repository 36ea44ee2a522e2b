"""A layer as equalization sees it: a parameter between scaled inputs and scaled outputs."""

from dataclasses import dataclass

from torch import Tensor, nn

from mmbcn.equalization.scales import Scales


@dataclass
class Layer:
    """A convolution, a linear layer, a factor for each channel, or a bias.

    Attributes:
        weight: its parameter: (C_out, C_in / G, ...), transposed (C_in, C_out / G, ...), or of C
            values: factors and biases.
        groups: G, of a convolution; C for factors and biases.
        transposed: whether it is a transposed convolution.
        ins: the scales of its inputs, (C_in,); of a bias, they are fixed.
        outs: the scales of its outputs, (C_out,).
    """

    weight: nn.Parameter
    groups: int
    transposed: bool
    ins: Scales
    outs: Scales

    def grouped(self, tensor: Tensor) -> Tensor:
        """A view of the weight, or of a tensor of its form: (G, C_out / G, C_in / G, rest)."""
        if self.groups == tensor.numel():
            return tensor.view(-1, 1, 1, 1)
        if tensor.dim() == 2:
            tensor = tensor[..., None]
        tensor = tensor.unflatten(0, (self.groups, -1))
        return (tensor.transpose(1, 2) if self.transposed else tensor).flatten(3)
