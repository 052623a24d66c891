"""Compares scorers with people: how often a scorer prefers the model that most raters prefer."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from seppo_fast.evaluation.human.study import Study
from seppo_fast.evaluation.statistics import wilson
from seppo_fast.utils.errors import DataError

SCORES = "scores.csv"
_COLUMNS = ("id", "prompt", "sample", "model")  # every further column is a scorer or a metric of pairs


@dataclass(frozen=True)
class ScorerAgreement:
    """A scorer's agreement with the majority of raters, over items on which the majority prefers one model.

    Attributes:
        items: the number of items.
        agree: the number on which the scorer prefers the same model.
        ties: the number on which it scores both models equally.
        share: (agree + ties / 2) / items; NaN without items.
        interval: the 95 % Wilson interval of agree among items without ties.
    """

    items: int
    agree: int
    ties: int
    share: float
    interval: tuple[float, float]


def read_scores_table(folder: Path) -> dict[str, dict[tuple[str, str], float]]:
    """Returns scores by scorer and by (item id, model) from `scores.csv`; empty if the file does not exist.

    An empty cell is no score.

    Raises:
        DataError: the file is malformed.
    """
    file = folder / SCORES
    if not file.exists():
        return {}
    try:
        with file.open(encoding="utf-8", newline="") as opened:
            rows = csv.DictReader(opened, strict=True)
            names = rows.fieldnames or []
            if tuple(names[: len(_COLUMNS)]) != _COLUMNS or len(set(names)) < len(names):
                raise ValueError(
                    f"expected columns {', '.join(_COLUMNS)}, then one per scorer or metric, got {', '.join(names)}"
                )
            scores: dict[str, dict[tuple[str, str], float]] = {name: {} for name in names[len(_COLUMNS) :]}
            for row in rows:
                if None in row or None in row.values():
                    raise ValueError(f"line {rows.line_num} has another number of cells than the first")
                for name, found in scores.items():
                    if row[name] != "":
                        found[row["id"], row["model"]] = float(row[name])
        return scores
    except (OSError, ValueError, csv.Error) as problem:
        raise DataError(f"{file}: malformed scores ({problem}); rerun seppo-fast score") from problem


def scorer_agreement(
    scores: Mapping[tuple[str, str], float],
    study: Study,
    items: list[str],
    table: np.ndarray,
    *,
    higher_is_better: bool = True,
) -> ScorerAgreement:
    """Compares one scorer with the majority of raters.

    Args:
        scores: its scores by (item id, model).
        study: the study.
        items: ids of the items.
        table: the raters' answers `(items, raters)` as `tally.ratings` returns them; "about the same" is no vote.
        higher_is_better: whether the scorer prefers the model with the higher score.
    """
    sign = 1 if higher_is_better else -1
    agree = ties = count = 0
    for item, answers in zip(items, table):
        net = int((answers == 1).sum()) - int((answers == 0).sum())
        first, second = (scores.get((item, model), math.nan) for model in study.models)
        if net and math.isfinite(second - first):
            count += 1
            ties += first == second
            agree += sign * (second - first) * net > 0
    decisive = count - ties
    return ScorerAgreement(
        items=count,
        agree=agree,
        ties=ties,
        share=(agree + ties / 2) / count if count else math.nan,
        interval=wilson(agree, decisive) if decisive else (0.0, 1.0),
    )
