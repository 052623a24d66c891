"""The scores of a run's weights in `scores.json`, quoted by the model card and the report.

The file has two forms: one judge's comparison, which the demo writes into the run's folder, and the tables of
`seppo-fast score` (`"schema": 2`), by default in the folder `score` in the run's.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from seppo_fast.evaluation.statistics import PairedDifference
from seppo_fast.utils.errors import ConfigError
from seppo_fast.utils.files import read_json

SCORES = "scores.json"
SCORE_FOLDER = "score"  # in a run's folder
SCHEMA = 2
_MOST_TEXT = 1 << 16  # characters that report and model card quote
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


@dataclass(frozen=True)
class ScoreTable:
    """The comparison of a run's weights with their base by several scorers.

    Attributes:
        what: what was scored.
        update: the update after which the weights were scored.
        average: whether the moving average of the weights was scored.
        paired: the comparison over prompts, by the scorer's key.
    """

    what: str
    update: int
    average: bool
    paired: dict[str, PairedDifference]

    def __str__(self) -> str:
        weights = "moving average" if self.average else "raw weights"
        found = "; ".join(f"{key} {paired}" for key, paired in self.paired.items())
        return f"{self.what}, base against update {self.update} ({weights}): {found}"


def read_scores(run: Path) -> Scores | ScoreTable | None:
    """Reads the scores of a run: its tables if `seppo-fast score` wrote some into its folder, else one judge's scores.

    Returns:
        The scores; None if there is no `scores.json`, or only one that compares other runs.

    Raises:
        ConfigError: `scores.json` is malformed.
    """
    for file in (run / SCORE_FOLDER / SCORES, run / SCORES):
        if not file.exists():
            continue
        try:
            tree = read_json(file, most=1 << 26)
            found = _table(tree, run.resolve().name) if "schema" in tree else _single(tree)
            if len(str(found)) > _MOST_TEXT:
                raise ValueError("its texts are too long to be quoted")
        except (OSError, ValueError, KeyError, TypeError, OverflowError, AttributeError) as problem:
            raise ConfigError(f"{file}: malformed scores ({problem}); remove the file") from problem
        if found is not None:
            return found
    return None


def _single(tree: Any) -> Scores:
    return Scores(str(tree["what"]), int(tree["update"]), bool(tree["average"]), _paired(tree, "aligned"))


def _table(tree: Any, name: str) -> ScoreTable | None:
    """Returns the comparison of one run; None if the tables do not include it, or no scorer gave an interval."""
    if tree["schema"] != SCHEMA:
        raise ValueError(f"it has schema {tree['schema']!r}; this version reads {SCHEMA}")
    if name not in tree["models"]:
        return None
    prompts, protocol = tree["prompts"], tree["protocol"]
    model = tree["models"][name]
    rows = {str(key): row["runs"][name] for key, row in tree["scorers"].items()}
    paired = {key: _paired(row, "other") for key, row in rows.items() if row["low"] is not None}
    if not paired:
        return None
    what = (
        f"{int(prompts['count'])} prompts of {prompts['name']}, seed {int(tree['seed'])}, protocol {protocol['name']} "
        f"(guidance {float(protocol['sampler']['guidance']):g})"
    )
    return ScoreTable(what, int(model["update"]), bool(model["average"]), paired)


def _paired(row: Any, other_name: str) -> PairedDifference:
    base, other, low, high = (float(row[name]) for name in ("base", other_name, "low", "high"))
    if not all(math.isfinite(number) for number in (base, other, low, high)):
        raise ValueError("a number is non-finite")
    items, left_out = int(row["items"]), int(row.get("left_out", 0))
    if left_out < 0:
        raise ValueError("left_out is negative")
    return PairedDifference(base, other, other - base, low, high, items, left_out)
