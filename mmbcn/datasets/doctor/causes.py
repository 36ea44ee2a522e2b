"""Guesses why a label has values that are no classes."""

from collections.abc import Collection

_MAX_CITYSCAPES_ID = 33
_MANY = 64


def guess_cause(
    values: Collection[int],
    num_classes: int,
    ignore_index: int = 255,
    reduce_zero_label: bool = False,
) -> str:
    """The usual cause of values outside the classes.

    Args:
        values: all values in the label's file.
        num_classes: number of classes.
        ignore_index: the value that the config ignores.
        reduce_zero_label: whether the config subtracts 1, and ignores 0.
    """
    found = set(values)
    highest = num_classes if reduce_zero_label else num_classes - 1
    classes = range(highest + 1)
    if found <= {0, 255}:
        return "a 0/255 mask: store the foreground as 1"
    if found <= {*classes, 255}:
        return f"255 usually means 'ignored', but this config ignores {ignore_index}"
    if num_classes == 19 and max(found - {255}) <= _MAX_CITYSCAPES_ID:
        return (
            "labelIds where labelTrainIds are wanted: make them with tools/datasets/cityscapes.py"
        )
    if not reduce_zero_label and found - {ignore_index} <= {*classes, num_classes}:
        if 0 not in found:
            return "labels that start at 1: reduce_zero_label=True in the dataset"
        return (
            f"either 0 means 'ignored' (reduce_zero_label=True in the dataset), or {num_classes} "
            f"does (store it as {ignore_index})"
        )
    if max(found - {ignore_index}) <= _MAX_CITYSCAPES_ID:
        return (
            "label ids where train ids are wanted (Cityscapes' labelIds are 0 to 33), or classes "
            "of another dataset"
        )
    if len(found) > _MANY:
        return "a label that was interpolated or compressed as JPEG, or an image"
    return "a colour mask turned to grey, or classes of another dataset"
