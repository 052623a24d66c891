"""The scores of a run's weights: `scores.json` in the run's folder, quoted by the model card and the report."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from seppo_fast.evaluation.statistics import PairedDifference
from seppo_fast.utils.errors import ConfigError
from seppo_fast.utils.files import read_json

SCORES = "scores.json"
_FILED = {"other": "aligned"}  # fields of `PairedDifference` that have another name in the file


@dataclass(frozen=True)
class Scores:
    """A paired comparison of a run's weights with their base.

    Attributes:
        what: what was measured, and on what.
        update: the update after which the weights were judged.
        average: whether the moving average of the weights was judged.
        paired: the comparison.
    """

    what: str
    update: int
    average: bool
    paired: PairedDifference

    def write(self, run: Path) -> None:
        """Writes `scores.json` into a run's folder."""
        numbers = {_FILED.get(name, name): value for name, value in asdict(self.paired).items() if name != "difference"}
        tree = {"what": self.what, "update": self.update, "average": self.average} | numbers
        (run / SCORES).write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")

    def __str__(self) -> str:
        paired = self.paired
        weights = "moving average" if self.average else "raw weights"
        return (
            f"{self.what}: base {paired.base:.3f}, after update {self.update} ({weights}) {paired.other:.3f}; paired "
            f"difference {paired.interval}"
        )


def read_scores(run: Path) -> Scores | None:
    """Reads the scores in a run's folder; returns None if it has no `scores.json`.

    Raises:
        ConfigError: `scores.json` is malformed.
    """
    file = run / SCORES
    if not file.exists():
        return None
    try:
        tree = read_json(file, most=1 << 16)
        base, other, low, high = (float(tree[name]) for name in ("base", "aligned", "low", "high"))
        if not all(math.isfinite(number) for number in (base, other, low, high)):
            raise ValueError("a number is non-finite")
        items, left_out = int(tree["items"]), int(tree.get("left_out", 0))
        if left_out < 0:
            raise ValueError("left_out is negative")
        paired = PairedDifference(base, other, other - base, low, high, items, left_out)
        return Scores(str(tree["what"]), int(tree["update"]), bool(tree["average"]), paired)
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as problem:
        raise ConfigError(f"{file}: malformed scores ({problem}); remove the file") from problem
