"""What folding did to a model."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class FoldReport:
    """What was folded into what, and what was left and why; layers by their names.

    Attributes:
        folded: norms that are gone -> where they went.
        stages: batch-channel norms of which only the group stage stays -> where the other went.
        left: norms with a batch stage that stays -> why.
        standardized: convolutions with weight standardization, now plain ones.
        difference: the largest difference that the folding made to an output of the run that it
            was found by, as a share of the largest one.
    """

    folded: dict[str, str] = field(default_factory=dict)
    stages: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    standardized: list[str] = field(default_factory=list)
    difference: float = 0.0

    def summary(self) -> str:
        """One line of numbers."""
        return (
            f"folded: {len(self.folded)} norms are gone; of {len(self.stages)} the batch stage is, "
            f"the group stage stays; {len(self.left)} norms are left; "
            f"{len(self.standardized)} convolutions have standardized weights; outputs differ by "
            f"{self.difference:.1e} of the largest one"
        )

    def __str__(self) -> str:
        lines = [self.summary()]
        for title, places in (("folded", self.folded), ("batch stage", self.stages)):
            lines += [f"  {title}: {name} into {place}" for name, place in places.items()]
        lines += [f"  left: {name}: {reason}" for name, reason in self.left.items()]
        return "\n".join(lines)
