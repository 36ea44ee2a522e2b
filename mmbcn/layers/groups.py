"""How many channel groups a layer has."""

MAX_GROUPS = 32


def check_num_features(num_features: int) -> None:
    """Check a number of channels.

    Raises:
        TypeError: it is no int.
        ValueError: it is less than 1.
    """
    if isinstance(num_features, bool) or not isinstance(num_features, int):
        raise TypeError(f"num_features must be an int, got {num_features!r}")
    if num_features < 1:
        raise ValueError(f"num_features must be at least 1, got {num_features}")


def resolve_num_groups(num_groups: int | str, num_features: int) -> int:
    """The number of groups for a layer of ``num_features`` channels.

    Args:
        num_groups: an int is strict and must divide the channels. ``'auto'`` is 32 where that
            divides the channels and leaves at least two in a group, else the largest divisor not
            above 32 that does, else 1.
        num_features: channels of the layer.

    Raises:
        TypeError: either is not of these types.
        ValueError: the groups do not divide the channels; names the counts that would do.
    """
    check_num_features(num_features)
    if num_groups == "auto":
        fitting = (g for g in range(MAX_GROUPS, 1, -1) if num_features % g == 0)
        return next((g for g in fitting if num_features // g >= 2), 1)
    if isinstance(num_groups, bool) or not isinstance(num_groups, int):
        raise TypeError(f"num_groups must be an int or 'auto', got {num_groups!r}")
    if num_groups < 1 or num_features % num_groups:
        divisors = [g for g in range(1, num_features + 1) if num_features % g == 0]
        raise ValueError(
            f"num_groups={num_groups} does not divide the layer's {num_features} channels; "
            f"counts that would do: {', '.join(map(str, divisors))}, or num_groups='auto'"
        )
    return num_groups
