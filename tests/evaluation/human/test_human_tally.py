"""The tally of a human comparison: preferences, exclusion, refusal of files, agreement with scorers."""

import itertools
import json
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from seppo_fast.evaluation.human.answers import answers_digest, read_answers
from seppo_fast.evaluation.human.items import read_items
from seppo_fast.evaluation.human.scorers import read_scores_table, scorer_agreement
from seppo_fast.evaluation.human.study import draw_study
from seppo_fast.evaluation.human.tally import (
    bootstrap_win_rate,
    pair_items,
    preference,
    ratings,
    reliability,
    sign_test,
)
from seppo_fast.evaluation.statistics import wilson
from seppo_fast.utils.errors import ConfigError, DataError
from tests.helpers.study import MODELS, answer_file, score_folder, side_of

PROMPTS = [f"{colour} {shape}" for colour in ("red", "blue") for shape in ("ring", "star", "cube", "cone")]
BASE, TUNED = MODELS


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Two samples of eight prompts, three raters."""
    folder = score_folder(tmp_path_factory.mktemp("scored"), PROMPTS, samples=2)
    return draw_study(read_items(folder), raters=["anna", "ben", "carl"], questions=["overall", "alignment"])


def by_item(winners):
    """Answers pairs and repeats by the item's winner, and passes every check."""

    def choose(place, trial, question):
        if trial.good:
            return trial.good
        winner = winners(trial.item, question)
        return side_of(trial, winner) if winner in MODELS else winner

    return choose


# Preferences, by hand


def test_votes_are_counted_by_model_whatever_the_side(study, tmp_path):
    """anna: sample 0 of all prompts for the tuned model, sample 1 a tie; ben: all for the base; carl: nothing."""
    answer_file(tmp_path, study, "anna", by_item(lambda item, question: TUNED if item.endswith("-0") else "same"))
    answer_file(tmp_path, study, "ben", by_item(lambda item, question: BASE if question == "overall" else TUNED))
    answers = read_answers(tmp_path, study)
    assert [rater.rater for rater in answers] == ["anna", "ben"]
    found = preference(answers, study, "overall")
    assert (found.wins, found.ties, found.losses) == (8, 8, 16)
    assert found.win_rate == pytest.approx(12 / 32) and found.decisive == pytest.approx(8 / 24)
    assert found.wilson == pytest.approx(wilson(8, 24))
    # Every prompt has one vote for the tuned model and two for the base.
    assert found.sign_test == pytest.approx(2 / 2**8)
    assert found.by_prompts == pytest.approx((12 / 32, 12 / 32))
    assert found.by_both == pytest.approx((0, 0.75))  # only ben, only anna
    # Items with sample 0: tuned, base; with sample 1: same, base. No pair of answers agrees.
    assert found.agreement == 0
    values = [TUNED, BASE] * 8 + ["same", BASE] * 8
    unlike = sum(a != b for a, b in itertools.permutations(values, 2)) / (32 * 31)
    assert found.alpha == pytest.approx(1 - 1 / unlike)
    shares = [count / 32 for count in Counter(values).values()]
    expected = sum(share**2 for share in shares)
    assert found.fleiss == pytest.approx(-expected / (1 - expected))
    second = preference(answers, study, "alignment")
    assert (second.wins, second.ties, second.losses) == (24, 8, 0) and second.decisive == 1


def test_no_answers_to_a_question(study, tmp_path):
    answer_file(tmp_path, study, "anna", lambda place, trial, question: "same" if question == "overall" else None)
    answers = read_answers(tmp_path, study)
    assert preference(answers, study, "alignment") is None and preference([], study, "overall") is None
    found = preference(answers, study, "overall")
    assert (found.wins, found.ties, found.losses) == (0, 16, 0) and found.win_rate == 0.5 and found.sign_test == 1
    assert math.isnan(found.decisive) and found.wilson == (0, 1) and not found.biased and math.isnan(found.fleiss)


def test_one_item_and_one_rater(tmp_path):
    folder = score_folder(tmp_path / "scored", ["alone"])
    study = draw_study(read_items(folder), raters=["anna"])
    answer_file(tmp_path, study, "anna", by_item(lambda item, question: TUNED))
    found = preference(read_answers(tmp_path, study), study, "overall")
    assert (found.wins, found.win_rate, found.by_prompts, found.sign_test) == (1, 1, (1, 1), 1)


def test_a_preferred_side_is_noticed(study, tmp_path):
    for rater in study.raters:
        answer_file(tmp_path, study, rater, lambda place, trial, question: "left")
    found = preference(read_answers(tmp_path, study), study, "overall")
    assert found.biased and found.left == 1 and found.left_interval == pytest.approx(wilson(48, 48))
    assert found.win_rate == 0.5  # sides are balanced within each rater


def test_sign_test_against_all_sequences():
    for n in range(9):
        for wins in range(n + 1):
            far = abs(wins - n / 2)
            extreme = sum(abs(sum(signs) - n / 2) >= far for signs in itertools.product((0, 1), repeat=n))
            assert sign_test(wins, n - wins) == pytest.approx(extreme / 2**n)
    assert sign_test(0, 0) == 1 and 0 < sign_test(600, 700) < 0.01 and sign_test(5000, 5000) == 1


def test_the_bootstrap_covers_the_variance_between_prompts():
    """Ten items per prompt with equal answers: the interval must have the width of 40 prompts, not of 400 items."""
    rng = np.random.default_rng(0)
    answers = np.repeat(rng.integers(0, 2, 40), 10)
    prompts = np.repeat(np.arange(40), 10)
    low, high = bootstrap_win_rate(answers[:, None], prompts, over_raters=False)
    share = answers.mean()
    assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt(share * (1 - share) / 40), rel=0.06)
    assert low < share < high


def test_the_bootstrap_interval_covers_the_truth():
    """95 % of intervals of 60 prompts contain .6; 120 studies: within three standard errors of that, .89 to 1."""
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(120):
        table = (rng.random((60, 1)) < 0.6).astype(int)
        low, high = bootstrap_win_rate(table, np.arange(60), over_raters=False, draws=1000)
        hits += low <= 0.6 <= high
    assert hits / 120 >= 0.89


def test_the_bootstrap_is_seeded_and_takes_missing_answers():
    table = np.array([[1, -1, 0], [2, 1, -1], [-1, -1, -1], [0, 1, 1]])
    found = bootstrap_win_rate(table, np.array([0, 1, 2, 3]), over_raters=True)
    assert (
        found == bootstrap_win_rate(table, np.array([0, 1, 2, 3]), over_raters=True) and 0 <= found[0] < found[1] <= 1
    )


# Exclusion


def test_a_careful_rater_is_kept(study, tmp_path):
    answer_file(tmp_path, study, "anna", by_item(lambda item, question: TUNED))
    found = reliability(read_answers(tmp_path, study)[0], study)
    assert (found.checks, found.failed, found.repeats, found.consistent) == (4, 0, 8, 8)
    assert found.answered == found.asked == 2 * 24 and found.seconds == 1.5 and not found.excluded


@pytest.mark.parametrize(("failures", "excluded"), [(1, False), (2, True)])
def test_more_than_one_failed_check_excludes(study, tmp_path, failures, excluded):
    right = by_item(lambda item, question: TUNED)
    noise = [place for place, trial in enumerate(study.raters["anna"]) if trial.kind == "noise"][:failures]

    def choose(place, trial, question):
        # "About the same" as noise, for one question only, is a failure too.
        return "same" if place in noise and question == "overall" else right(place, trial, question)

    answer_file(tmp_path, study, "anna", choose)
    found = reliability(read_answers(tmp_path, study)[0], study)
    assert (found.failed, found.excluded) == (failures, excluded)


def test_a_mismatch_is_failed_only_by_preferring_the_other_prompts_picture_in_alignment(study, tmp_path):
    def choose(answer):
        def choice(place, trial, question):
            if trial.kind != "mismatch":
                return trial.good or "same"
            other = {"left": "right", "right": "left"}[trial.good]
            return other if question == "overall" else answer or other

        return choice

    answer_file(tmp_path / "a", study, "anna", choose("same"))
    assert reliability(read_answers(tmp_path / "a", study)[0], study).failed == 0
    answer_file(tmp_path / "b", study, "anna", choose(None))
    assert reliability(read_answers(tmp_path / "b", study)[0], study).failed == 2


@pytest.mark.parametrize(("changed", "excluded"), [(3, False), (4, True)])
def test_consistency_below_point_six_excludes(study, tmp_path, changed, excluded):
    """8 answers are repeated: 5 of 8 is above .6, 4 of 8 below."""
    right = by_item(lambda item, question: TUNED)
    repeats = [(place, q) for place, trial in enumerate(study.raters["anna"]) if trial.kind == "repeat"
               for q in study.questions][:changed]  # fmt: skip
    answer_file(tmp_path, study, "anna", lambda p, trial, q: "same" if (p, q) in repeats else right(p, trial, q))
    found = reliability(read_answers(tmp_path, study)[0], study)
    assert (found.repeats, found.consistent, found.excluded) == (8, 8 - changed, excluded)


def test_an_unfinished_rater_is_judged_by_what_was_answered(study, tmp_path):
    answer_file(tmp_path, study, "anna", lambda place, trial, question: "left" if place == 0 else None)
    found = reliability(read_answers(tmp_path, study)[0], study)
    assert (found.answered, found.repeats, found.excluded) == (2, 0, False)


# Files that are refused


def saved(folder, study, rater="anna", changed=None):
    return answer_file(folder, study, rater, by_item(lambda item, question: TUNED), changed)


def test_a_folder_without_answers(study, tmp_path):
    with pytest.raises(ConfigError, match="no answers-"):
        read_answers(tmp_path, study)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"schema": 2}, "not a file of answers with schema 1"),
        ({"study": "0" * 32}, "belongs to study '00000000000000000000000000000000', the key to"),
        ({"rater": "dora"}, "the rater 'dora' is not in the study; it has anna, ben, carl"),
        ({"rater": ["anna"]}, "is not in the study"),
        ({"rater": "ben"}, "was changed after it had been saved"),
        ({"digest": "0" * 64}, "was changed after it had been saved"),
        ({"digest": None}, "was changed after it had been saved"),
        ({"answers": [[0, "overall", "left", 1]]}, "was changed after it had been saved"),
        ({"answers": {}}, "answers must be a list"),
        ({"answers": [[0, "overall", "left"]]}, "answers must be a list"),
    ],
)
def test_a_changed_or_foreign_file_is_refused_by_name(study, tmp_path, changed, message):
    saved(tmp_path, study, changed=changed)
    saved(tmp_path, study, "carl")
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        read_answers(tmp_path, study)
    assert "1 of 2 files of answers are refused" in str(caught.value) and "answers-anna.json" in str(caught.value)
    assert "carl" not in str(caught.value).replace("anna, ben, carl", "")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([24, "overall", "left", 1], "trial 24 does not exist"),
        ([-1, "overall", "left", 1], "trial -1 does not exist"),
        ([True, "overall", "left", 1], "trial True does not exist"),
        ([0, "quality", "left", 1], "question 'quality' is not in the study"),
        ([0, ["overall"], "left", 1], "is not in the study"),
        ([0, "overall", "up", 1], "choice 'up'"),
        ([0, "overall", {}, 1], "choice {}"),
        ([0, "overall", "left", -1], "milliseconds -1"),
        ([0, "overall", "left", 1.5], "milliseconds 1.5"),
        ([0, "overall", "left", 1 << 50], "milliseconds"),
    ],
)
def test_impossible_answers_are_refused_even_with_a_valid_digest(study, tmp_path, row, message):
    saved(tmp_path, study, changed={"answers": [row], "digest": answers_digest(study.id, "anna", [row])})
    with pytest.raises(DataError, match=re.escape(message)):
        read_answers(tmp_path, study)


def test_doubled_answers_are_refused(study, tmp_path):
    rows = [[0, "overall", "left", 1], [0, "overall", "right", 1]]
    file = saved(tmp_path, study, changed={"answers": rows, "digest": answers_digest(study.id, "anna", rows)})
    with pytest.raises(DataError, match="trial 0 has two answers to overall"):
        read_answers(tmp_path, study)
    saved(tmp_path, study)
    (tmp_path / "answers-anna (1).json").write_bytes(file.read_bytes())
    with pytest.raises(DataError, match=re.escape("anna has answered in answers-anna (1).json too")):
        read_answers(tmp_path, study)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_other_files_are_refused(study, tmp_path, content):
    (tmp_path / "answers-x.json").write_bytes(content)
    with pytest.raises(DataError, match="answers-x.json"):
        read_answers(tmp_path, study)


def test_answers_to_a_study_with_another_seed_are_refused(study, tmp_path):
    other = draw_study(read_items(score_folder(tmp_path / "s", PROMPTS, samples=2)), raters=list(study.raters), seed=1)
    saved(tmp_path, other)
    with pytest.raises(DataError, match="belongs to study"):
        read_answers(tmp_path, study)


# Scorers


def scores_file(folder, rows, names=("good", "bad")):
    lines = [",".join(("id", "prompt", "sample", "model", *names)), *(",".join(map(str, row)) for row in rows)]
    (folder / "scores.csv").write_text("\n".join(lines) + "\n")


def test_agreement_of_scorers_with_the_majority(study, tmp_path):
    """Two of three raters prefer the tuned model on sample 0; on sample 1 one vote each way and a tie: no majority."""
    answer_file(tmp_path, study, "anna", by_item(lambda item, question: TUNED))
    answer_file(tmp_path, study, "ben", by_item(lambda item, question: TUNED if item.endswith("-0") else BASE))
    answer_file(tmp_path, study, "carl", by_item(lambda item, question: BASE if item.endswith("-0") else "same"))
    answers, items = read_answers(tmp_path, study), pair_items(study)
    rows = []
    for item in items:
        index = int(item.split("-")[0])
        # `good` prefers the tuned model, except for a tie on prompt 0 and the base on prompt 1; `bad` lacks some.
        rows.append((item, f'"p, {index}"', item[-1], BASE, 1 + (index == 1), "" if index < 5 else 3))
        rows.append((item, f'"p, {index}"', item[-1], TUNED, 1 + (index > 1), 2))
    scores_file(tmp_path, rows)
    scores = read_scores_table(tmp_path)
    table = ratings(answers, items, "overall")
    good = scorer_agreement(scores["good"], study, items, table)
    assert (good.items, good.agree, good.ties) == (8, 6, 1) and good.share == pytest.approx(6.5 / 8)
    assert good.interval == pytest.approx(wilson(6, 7))
    bad = scorer_agreement(scores["bad"], study, items, table)
    assert (bad.items, bad.agree, bad.share) == (3, 0, 0)
    reverse = scorer_agreement(scores["good"], study, items, table, higher_is_better=False)
    assert (reverse.items, reverse.agree, reverse.ties) == (8, 1, 1)  # what agreed disagrees, and ties stay
    lower = {place: -score for place, score in scores["good"].items()}
    assert scorer_agreement(lower, study, items, table, higher_is_better=False) == good
    none = scorer_agreement({}, study, items, table)
    assert none.items == 0 and math.isnan(none.share) and none.interval == (0, 1)


def test_no_scores_file(tmp_path):
    assert read_scores_table(tmp_path) == {}


@pytest.mark.parametrize(
    "content",
    [b"", b"id,prompt\n", b"id,prompt,sample,model,a,a\n", b"id,prompt,sample,model,a\n1,2\n", b"\xff\xff",
     b"id,prompt,sample,model,a\n1,p,0,m,x\n", b"id,prompt,sample,model,a\n1,p,0,m,1,2\n",
     b'id,prompt,sample,model,a\n1,"p,0,m,1\n'],
)  # fmt: skip
def test_malformed_scores(tmp_path, content):
    (tmp_path / "scores.csv").write_bytes(content)
    with pytest.raises(DataError, match="scores.csv"):
        read_scores_table(tmp_path)


# Wilson


@pytest.mark.parametrize(
    ("wins", "n", "low", "high"),
    [(0, 10, 0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1), (81, 263, 0.2553, 0.3662)],
)
def test_wilson_against_published_values(wins, n, low, high):
    """81 of 263: Newcombe (1998), "Two-sided confidence intervals for the single proportion", table I, method 3."""
    assert wilson(wins, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_ends_solve_its_equation():
    for wins, n, z in ((3, 17, 1.6448536269514722), (29, 31, 1.6448536269514722)):
        for end in wilson(wins, n, 0.9):
            assert (wins / n - end) ** 2 == pytest.approx(z**2 * end * (1 - end) / n, rel=1e-12)
    assert wilson(0.0, 1)[0] == 0 and wilson(7, 7)[1] == 1


@pytest.mark.parametrize("arguments", [(3, 2), (-1, 2), (1, math.inf), (math.nan, 2), (1, 2, 1.0), (1, 2, 0)])
def test_wilson_refuses_impossible_counts(arguments):
    with pytest.raises(ValueError, match="wins, n"):
        wilson(*arguments)


def test_the_table_of_sizes_in_the_docs():
    page = (Path(__file__).parents[3] / "docs" / "human.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| ± ([\d.]+) points \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", page, re.MULTILINE)
    assert len(rows) == 7
    for count, half, *powers in rows:
        n = int(count)
        low, high = wilson(n / 2, n)
        assert f"{50 * (high - low):.1f}" == half
        significant = [wins for wins in range(n // 2, n + 1) if sign_test(wins, n - wins) <= 0.05]
        for share, power in zip((55, 60, 65), powers, strict=True):
            found = sum(math.comb(n, wins) * share**wins * (100 - share) ** (n - wins) for wins in significant)
            assert f"{found / 100**n:.2f}" == power, (n, share)


def test_a_file_of_answers_is_plain_json(study, tmp_path):
    assert set(json.loads(saved(tmp_path, study).read_text())) == {"schema", "study", "rater", "answers", "digest"}
