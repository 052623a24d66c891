"""`seppo-fast human make|tally`: writes a page for a blind comparison by people, and tallies their answers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from seppo_fast.evaluation.human.answers import read_answers
from seppo_fast.evaluation.human.items import read_items
from seppo_fast.evaluation.human.page import SHIPPED, write_study
from seppo_fast.evaluation.human.scorers import read_scores_table, scorer_agreement
from seppo_fast.evaluation.human.study import KEY, Study, draw_study, read_key
from seppo_fast.evaluation.human.tally import Preference, Reliability, pair_items, preference, ratings, reliability
from seppo_fast.evaluation.real.metrics import METRICS
from seppo_fast.evaluation.scoring.score_files import SCORES, read_infos
from seppo_fast.utils.errors import CheckpointError
from seppo_fast.utils.files import disk_message

_SCHEMA = 1


def make(
    folder: Path,
    *,
    models: Sequence[str] | None = None,
    items: int | None = None,
    seed: int = 0,
    raters: Sequence[str] | None = None,
    questions: Sequence[str] | None = None,
    output: Path | None = None,
    report: Callable[[str], object] = print,
) -> Path:
    """Writes a study into a new folder: `for-raters/`, which is sent to raters, and `key.json`, which is not.

    Args:
        folder: the output folder of `seppo-fast score`.
        models: the two models to compare; None: those of the folder, if it has exactly two.
        items: the number of items; None: all, but at most 100.
        seed: seed of all draws.
        raters: the raters' names; None: three numbered ones.
        questions: the questions' names; None: all that apply.
        output: the folder to create; None: `human` in `folder`.
        report: receives lines for the user.

    Returns:
        The new folder.

    Raises:
        ConfigError: an argument is invalid, or `output` exists.
        DataError: `items.json` is malformed, or a medium is missing or damaged.
        CheckpointError: the output cannot be written.
    """
    material = read_items(folder)
    study = draw_study(material, models, items, seed, raters, questions)
    target = output or folder / "human"
    write_study(study, material, target)
    rows = next(iter(study.raters.values()))
    kinds = [trial.kind for trial in rows]
    checks = kinds.count("noise") + kinds.count("mismatch")
    report(
        f"study {study.id}: {study.models[1]} against {study.models[0]}, {kinds.count('pair')} items, "
        f"{checks} attention checks, {kinds.count('repeat')} repeats, {len(study.questions)} questions, "
        f"{len(study.raters)} raters"
    )
    report(f"send to the raters: {target / SHIPPED}")
    report(f"keep, and do not send: {target / KEY}")
    return target


def tally(folder: Path, key: Path, output: Path | None = None, report: Callable[[str], object] = print) -> None:
    """Tallies all `answers-*.json` in a folder, with and without the raters that the exclusion rule applies to.

    Args:
        folder: the folder with the answers; if it has a `scores.csv`, scorers are and metrics of pairs
            are compared with the raters; its subfolder `scores` says for which scorers lower is better.
        key: the study's `key.json`.
        output: a JSON file for the results, or None; an older one is replaced.
        report: receives lines for the user.

    Raises:
        ConfigError: no answers or no key.
        DataError: the key, the answers, `scores.csv` or a file in `scores` are malformed or do not belong together.
        CheckpointError: `output` cannot be written.
    """
    study = read_key(key)
    answers = read_answers(folder, study)
    scores = read_scores_table(folder)
    higher_is_better = {name: metric.higher_is_better for name, metric in METRICS.items()}
    higher_is_better |= {info.key: info.higher_is_better for info in read_infos(folder)}
    raters = [reliability(rater, study) for rater in answers]
    kept = [rater for rater, found in zip(answers, raters) if not found.excluded]
    groups = {"all": answers, "kept": kept}
    preferences = {
        name: {question: preference(group, study, question) for question in study.questions}
        for name, group in groups.items()
    }
    items = pair_items(study)
    scorers = {
        question: {
            name: scorer_agreement(
                found, study, items, ratings(kept, items, question), higher_is_better=higher_is_better.get(name, True)
            )
            for name, found in scores.items()
        }
        for question in study.questions
    }
    for line in _lines(study, raters, preferences):
        report(line)
    for name in sorted(scores.keys() - higher_is_better.keys()):
        report(f"{name}: {folder / SCORES} does not say which direction is better; higher is assumed")
    for question, by_scorer in scorers.items():
        for name, agreement in by_scorer.items():
            report(
                f"{name} agrees with the majority ({question}) on {agreement.agree} of {agreement.items} items, "
                f"{agreement.ties} ties: {agreement.share:.3f} {_span(agreement.interval)}"
            )
    if output:
        tree = {
            "schema": _SCHEMA,
            "study": study.id,
            "models": study.models,
            "raters": [asdict(found) | {"excluded": found.excluded} for found in raters],
            "preferences": {
                name: {question: _record(found) for question, found in by_question.items()}
                for name, by_question in preferences.items()
            },
            "scorers": {
                question: {name: asdict(found) for name, found in by_scorer.items()}
                for question, by_scorer in scorers.items()
            },
        }
        try:
            output.write_text(json.dumps(_finite(tree), indent=1) + "\n", encoding="utf-8")
        except OSError as problem:
            raise CheckpointError(disk_message(output, problem)) from problem
        report(f"results: {output}")


def _lines(
    study: Study, raters: Sequence[Reliability], preferences: dict[str, dict[str, Preference | None]]
) -> list[str]:
    first, second = study.models
    lines = [f"study {study.id}: {second} against {first}, {len(pair_items(study))} items, {len(raters)} raters"]
    for rater in raters:
        lines.append(
            f"{rater.rater}: {rater.answered} of {rater.asked} answers, {rater.failed} of {rater.checks} attention "
            f"checks failed, {rater.consistent} of {rater.repeats} repeats consistent, median {rater.seconds:.1f} s"
            + ("; excluded" if rater.excluded else "")
        )
    excluded = sum(rater.excluded for rater in raters)
    if not excluded:
        lines.append("no rater is excluded")
    for name, group in {"all": f"all {len(raters)} raters", "kept": f"without {excluded} excluded"}.items():
        if name == "kept" and not excluded:
            continue
        for question, found in preferences[name].items():
            lines += _question_lines(f"{question}, {group}", found, study)
    return lines


def _question_lines(title: str, found: Preference | None, study: Study) -> list[str]:
    if found is None:
        return [f"{title}: no answers"]
    first, second = study.models
    lines = [
        f"{title}: {second} {found.wins}, about the same {found.ties}, {first} {found.losses}",
        f"  win rate {found.win_rate:.3f} (ties half), 95 % {_span(found.by_prompts)} over prompts, "
        f"{_span(found.by_both)} over prompts and raters",
        f"  of decisive votes {found.decisive:.3f} {_span(found.wilson)} (Wilson), sign test over prompts "
        f"p = {found.sign_test:.3g}",
        f"  agreement: Fleiss' kappa {found.fleiss:.3f}, Krippendorff's alpha {found.alpha:.3f}, pairwise "
        f"{found.agreement:.3f}",
        f"  left side {found.left:.3f} {_span(found.left_interval)}",
    ]
    if found.biased:
        lines.append("  warning: raters prefer one side; sides are balanced, so this adds noise but favours no model")
    return lines


def _span(interval: tuple[float, float]) -> str:
    return f"[{interval[0]:.3f}, {interval[1]:.3f}]"


def _record(found: Preference | None) -> dict[str, Any] | None:
    return asdict(found) | {"biased": found.biased} if found else None


def _finite(value: Any) -> Any:
    """Returns a tree in which undefined numbers are None, because JSON has no NaN."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
