"""Tallies the answers of a study: preferences with intervals, reliability of raters, agreement."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from seppo_fast.evaluation.human.agreement import fleiss_kappa, krippendorff_alpha, pairwise_agreement
from seppo_fast.evaluation.human.answers import Answers
from seppo_fast.evaluation.human.study import Study
from seppo_fast.evaluation.statistics import wilson
from seppo_fast.utils.random import keyed_rng

MOST_FAILED, LEAST_CONSISTENCY = 1, 0.6  # the exclusion rule; fixed, so that no result can be chosen with it
DRAWS = 10_000  # bootstrap
_DRAWS_AT_ONCE = 500  # bounds memory: weights of all prompts and raters for so many draws
SAME = 2  # the category of "about the same"


@dataclass(frozen=True)
class Reliability:
    """How carefully a rater answered.

    Attributes:
        rater: the rater's name.
        answered: the number of answers.
        asked: the number of all questions.
        checks: the number of answered attention checks.
        failed: the number of failed ones.
        repeats: the number of questions answered twice, in a pair and its repeat.
        consistent: the number of those with the same answer.
        seconds: the median time of an answer.
    """

    rater: str
    answered: int
    asked: int
    checks: int
    failed: int
    repeats: int
    consistent: int
    seconds: float

    @property
    def excluded(self) -> bool:
        """Whether the exclusion rule applies: more than one failed check, or repeat consistency under 0.6."""
        inconsistent = self.repeats > 0 and self.consistent < LEAST_CONSISTENCY * self.repeats
        return self.failed > MOST_FAILED or inconsistent


@dataclass(frozen=True)
class Preference:
    """The answers to one question. All shares are those of the second model against the first.

    Attributes:
        wins: votes for the second model.
        ties: votes for "about the same".
        losses: votes for the first model.
        win_rate: (wins + ties / 2) / votes.
        by_prompts: its 95 % bootstrap interval over prompts.
        by_both: its 95 % bootstrap interval over prompts and raters.
        decisive: wins / (wins + losses).
        wilson: its 95 % Wilson interval, which treats votes as independent.
        sign_test: p value of the exact two-sided sign test over prompts.
        left: the share of decisive votes for the left side.
        left_interval: its 95 % Wilson interval.
        fleiss: Fleiss' kappa; NaN unless all raters answered all items.
        alpha: Krippendorff's alpha for nominal data.
        agreement: the share of equal answers among pairs of raters.
    """

    wins: int
    ties: int
    losses: int
    win_rate: float
    by_prompts: tuple[float, float]
    by_both: tuple[float, float]
    decisive: float
    wilson: tuple[float, float]
    sign_test: float
    left: float
    left_interval: tuple[float, float]
    fleiss: float
    alpha: float
    agreement: float

    @property
    def biased(self) -> bool:
        """Whether the interval of the share of left votes excludes one half."""
        return self.left_interval[0] > 0.5 or self.left_interval[1] < 0.5


def reliability(answers: Answers, study: Study) -> Reliability:
    """Returns how carefully a rater answered.

    A check against noise is failed if any question was answered otherwise than for the clean medium; one against
    another prompt's medium is failed if that medium was said to match the prompt better.
    """
    checks = failed = repeats = consistent = 0
    pairs = {trial.item: place for place, trial in enumerate(answers.trials) if trial.kind == "pair"}
    for place, trial in enumerate(answers.trials):
        given = {question: answers.votes.get((place, question)) for question in study.questions}
        votes = {question: vote for question, vote in given.items() if vote}
        if trial.kind == "noise" and votes:
            checks += 1
            failed += any(vote.choice != 0 for vote in votes.values())
        if trial.kind == "mismatch" and "alignment" in votes:
            checks += 1
            failed += votes["alignment"].choice == 1
        if trial.kind == "repeat":
            before = [(vote, answers.votes.get((pairs[trial.item], question))) for question, vote in votes.items()]
            repeats += sum(first is not None for _, first in before)
            consistent += sum(first is not None and first.choice == vote.choice for vote, first in before)
    return Reliability(
        rater=answers.rater,
        answered=len(answers.votes),
        asked=len(answers.trials) * len(study.questions),
        checks=checks,
        failed=failed,
        repeats=repeats,
        consistent=consistent,
        seconds=float(np.median([vote.milliseconds for vote in answers.votes.values()])) / 1000,
    )


def ratings(answers: Sequence[Answers], items: Sequence[str], question: str) -> np.ndarray:
    """Returns the answers about pairs `(items, raters)`: 0 first model, 1 second, 2 about the same, -1 no answer."""
    table = np.full((len(items), len(answers)), -1)
    rows = {item: row for row, item in enumerate(items)}
    for column, rater in enumerate(answers):
        for place, trial in enumerate(rater.trials):
            if trial.kind == "pair" and (vote := rater.votes.get((place, question))):
                table[rows[trial.item], column] = vote.choice
    return table


def pair_items(study: Study) -> list[str]:
    """Returns the ids of the items that all raters compare, sorted."""
    return sorted({trial.item for rows in study.raters.values() for trial in rows if trial.kind == "pair"})


def preference(answers: Sequence[Answers], study: Study, question: str) -> Preference | None:
    """Returns the tally of one question over all given raters; None if it has no answer."""
    items = pair_items(study)
    table = ratings(answers, items, question)
    wins, ties, losses = ((table == choice).sum(axis=1) for choice in (1, SAME, 0))
    counts = [int(values.sum()) for values in (wins, ties, losses)]
    votes, decisive = sum(counts), counts[0] + counts[2]
    if not votes:
        return None
    prompts = np.unique([study.prompts[item] for item in items], return_inverse=True)[1]
    net = np.bincount(prompts, wins - losses)
    sides = [
        vote.side
        for rater in answers
        for (place, asked), vote in rater.votes.items()
        if asked == question and rater.trials[place].kind == "pair"
    ]
    left = sides.count("left")
    return Preference(
        wins=counts[0],
        ties=counts[1],
        losses=counts[2],
        win_rate=(counts[0] + counts[1] / 2) / votes,
        by_prompts=bootstrap_win_rate(table, prompts, over_raters=False),
        by_both=bootstrap_win_rate(table, prompts, over_raters=True),
        decisive=counts[0] / decisive if decisive else math.nan,
        wilson=_interval(counts[0], decisive),
        sign_test=sign_test(int((net > 0).sum()), int((net < 0).sum())),
        left=left / decisive if decisive else math.nan,
        left_interval=_interval(left, decisive),
        fleiss=fleiss_kappa(table),
        alpha=krippendorff_alpha(table),
        agreement=pairwise_agreement(table),
    )


def _interval(count: int, n: int) -> tuple[float, float]:
    return wilson(count, n) if n else (0.0, 1.0)


def sign_test(wins: int, losses: int) -> float:
    """Returns the p value of the exact two-sided sign test: binomial with probability 1/2, ties left out."""
    n = wins + losses
    term = tail = 1  # exact integers: the binomial coefficients of 0, 1, ... and their sum
    for count in range(min(wins, losses)):
        term = term * (n - count) // (count + 1)
        tail += term
    return min(1.0, 2 * tail / 2**n)


def bootstrap_win_rate(
    table: np.ndarray, prompts: np.ndarray, *, over_raters: bool, draws: int = DRAWS
) -> tuple[float, float]:
    """Returns the 95 % percentile bootstrap interval of the win rate, ties counted half.

    Whole prompts are resampled, with all of their items and votes, because votes for the same prompt are dependent.

    Args:
        table: answers `(items, raters)` as `ratings` returns them.
        prompts: the number of each item's prompt `(items,)`, from 0 on.
        over_raters: whether raters are resampled too, independently (the pigeonhole bootstrap, Owen 2007, which is
            conservative). With fewer than two raters the result is the same.
        draws: the number of draws, from a fixed seed.
    """
    count, raters = int(prompts.max()) + 1, table.shape[1]
    score = np.where(table == 1, 1.0, np.where(table == SAME, 0.5, 0.0))
    points, votes = np.zeros((count, raters)), np.zeros((count, raters))
    np.add.at(points, prompts, score)
    np.add.at(votes, prompts, table >= 0)
    rng = keyed_rng(0, "human bootstrap", int(over_raters))
    rates = []
    for start in range(0, draws, _DRAWS_AT_ONCE):
        size = min(_DRAWS_AT_ONCE, draws - start)
        rows = rng.multinomial(count, np.full(count, 1 / count), size).astype(np.float64)
        columns = np.ones((size, raters))
        if over_raters:
            columns = rng.multinomial(raters, np.full(raters, 1 / raters), size).astype(np.float64)
        weighted = [((rows @ values) * columns).sum(axis=1) for values in (points, votes)]
        filled = weighted[1] > 0  # a draw may hold no vote if answers are missing
        rates.append(weighted[0][filled] / weighted[1][filled])
    low, high = np.quantile(np.concatenate(rates), [0.025, 0.975])
    return float(low), float(high)
