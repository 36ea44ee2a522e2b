"""What calibration changed, for reports."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerChange:
    """What calibration did to one layer.

    Attributes:
        name: of the layer in the model.
        kind: its class.
        values: number of values of each channel behind the new statistics.
        mean_shift: largest change of a channel's mean, in new standard deviations.
        var_factor: new over old variance (each with eps), of the channel that changed the most.
    """

    name: str
    kind: str
    values: int
    mean_shift: float
    var_factor: float


@dataclass(frozen=True)
class Calibration:
    """What calibration did.

    Attributes:
        changes: the calibrated layers, in the order of execution.
        unreached: layers that no image reached; they keep their statistics.
    """

    changes: list[LayerChange]
    unreached: list[str]

    def text(self) -> str:
        """A table of one line for each layer."""
        width = max(len(change.name) for change in self.changes)
        kinds = max(len(change.kind) for change in self.changes)
        lines = [
            f"{'layer':{width}}  {'norm':{kinds}}"
            f" {'values':>12} {'mean moved':>11} {'variance':>10}",
            *(
                f"{c.name:{width}}  {c.kind:{kinds}} {c.values:12} {c.mean_shift:9.3g} s "
                f"{'x':>3} {c.var_factor:<6.4g}"
                for c in self.changes
            ),
            "Of each layer, the channel that changed the most: the mean in standard deviations s,",
            "and the new variance over the old one.",
        ]
        if self.unreached:
            lines.append(f"not reached, as before: {', '.join(self.unreached)}")
        return "\n".join(lines)
