"""Keeps a layer trainable under initializers that reach too far.

mmengine's ``zero_init_residual`` applies its constant to the last norm of a block *and to its
children*. In a two-stage layer both scales would be zero, so both their gradients would be exactly
zero, and the block would be dead for ever.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def apply_keeping_alive(
    apply: Callable[[Callable[[nn.Module], None]], nn.Module],
    fn: Callable[[nn.Module], None],
    scales: Callable[[], list[Tensor]],
) -> None:
    """Run ``apply(fn)``; where that left all ``scales()`` zero, set the first of them to one.

    Args:
        apply: the layer's own ``nn.Module.apply``.
        fn: what is applied.
        scales: reads the layer's scales; the output depends on its input only through them all.
    """

    def dead() -> bool:
        return not any(s.is_meta or bool(s.any()) for s in scales())

    was_dead = dead()
    apply(fn)
    if dead() and not was_dead:
        with torch.no_grad():
            scales()[0].fill_(1)
