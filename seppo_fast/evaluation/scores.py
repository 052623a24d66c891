"""What a run's weights were judged by: `scores.json` in its folder, which the model card and the report quote."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from seppo_fast.utils.errors import ConfigError
from seppo_fast.utils.files import read_json

SCORES = "scores.json"


@dataclass(frozen=True)
class Scores:
    """A paired comparison of a run's weights with their base.

    Attributes:
        what: was measured, on what.
        update: after which.
        average: whether of the moving average of the weights.
        base: mean score of the base.
        aligned: mean score of the run's weights.
        low: lower end of the 95 % interval of the mean paired difference.
        high: its upper end.
        items: number of pairs.
        left_out: number of prompts that count in none of these, since the judge gave one of the two no score.
    """

    what: str
    update: int
    average: bool
    base: float
    aligned: float
    low: float
    high: float
    items: int
    left_out: int = 0

    def write(self, run: Path) -> None:
        """Puts them into a run's folder."""
        (run / SCORES).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    def __str__(self) -> str:
        left_out = f", {self.left_out} without a score left out" if self.left_out else ""
        weights = "moving average" if self.average else "raw weights"
        return (
            f"{self.what}: base {self.base:.3f}, after update {self.update} ({weights}) {self.aligned:.3f}; paired "
            f"difference {self.aligned - self.base:+.3f} [{self.low:+.3f}, {self.high:+.3f}] "
            f"(95 %, {self.items} pairs{left_out})"
        )


def read_scores(run: Path) -> Scores | None:
    """The scores of a run; None where none were measured.

    Raises:
        ConfigError: `scores.json` is none.
    """
    file = run / SCORES
    if not file.exists():
        return None
    try:
        tree = read_json(file, most=1 << 16)
        numbers = {name: float(tree[name]) for name in ("base", "aligned", "low", "high")}
        if not all(math.isfinite(number) for number in numbers.values()):
            raise ValueError("a number is not finite")
        update, items, left_out = int(tree["update"]), int(tree["items"]), int(tree.get("left_out", 0))
        if left_out < 0:
            raise ValueError("left_out is negative")
        what, average = str(tree["what"]), bool(tree["average"])
        return Scores(what=what, update=update, average=average, items=items, left_out=left_out, **numbers)
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as problem:
        raise ConfigError(f"{file}: no scores of a run ({problem}); remove it") from problem
