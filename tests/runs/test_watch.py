"""The health rules: on logs made unhealthy on purpose, on healthy logs, and on real runs made unhealthy on purpose."""

import itertools
import math
import random
import shutil

import pytest

from seppo_fast.config.load import parse_config
from seppo_fast.runs.watch import RULES, WINDOW, HealthWatch, intervals
from seppo_fast.train import train
from tests.helpers.runs import log_of

NAMES = [rule.name for rule in RULES]


def entry(number, **more):
    healthy = {
        "update": number, "loss": 0.69, "preference_loss": 0.69, "winner_error": 0.1, "ref_winner_error": 0.1,
        "logit_abs": 0.2, "grad_norm": 1.0, "kept": 1.0, "clipped_step1": 0.0, "clipped_step2": 0.05,
    }  # fmt: skip
    return healthy | more


ILL = {
    "winner_above_reference": {"winner_error": 0.1032},
    "logits_large": {"logit_abs": 1.1},
    "gradient_grown": {"grad_norm": 8.1},
    "losers_worse": {"preference_loss": 0.64, "winner_error": 0.1001},
    "little_kept": {"kept": 0.0},
    "step_clipped": {"clipped_step2": 0.6},
}


def log_of_values(name, ill):
    """Returns one healthy update, then one for each value of `ill`: if it is true, with the rule's condition met."""
    return [entry(1), *(entry(number, **(ILL[name] if bad else {})) for number, bad in enumerate(ill, 2))]


@pytest.mark.parametrize("name", NAMES)
def test_each_rule_holds_while_its_mean_is_ill_and_no_other_does(name):
    found = intervals(log_of_values(name, [True] * 10 + [False] * 10))
    assert list(found) == [name]
    ((first, last),) = found[name]
    assert first == WINDOW + 1  # one of the first five updates is healthy
    assert last == 11  # one healthy update brings each of these means back below its limit


@pytest.mark.parametrize("name", NAMES)
def test_the_other_side_of_a_limit_is_no_spell(name):
    below = {
        "winner_above_reference": {"winner_error": 0.1029},
        "logits_large": {"logit_abs": 0.99},
        "gradient_grown": {"grad_norm": 7.9},
        "losers_worse": {"preference_loss": 0.64, "winner_error": 0.0999},
        "little_kept": {"kept": 0.11},
        "step_clipped": {"clipped_step1": 0.49, "clipped_step2": 0.49},
    }
    assert intervals([entry(1), *(entry(number, **below[name]) for number in range(2, 30))]) == {}
    assert intervals([entry(number, preference_loss=0.66, winner_error=0.1001) for number in range(1, 30)]) == {}


def test_a_mean_is_what_counts():
    """One update far above the limit causes a spell of the five updates whose mean it raises."""
    values = [0.2] * 10 + [4.5] + [0.2] * 10
    found = intervals([entry(number, logit_abs=value) for number, value in enumerate(values, 1)])
    assert found == {"logits_large": [(11, 15)]}  # (4.5 + 4 * 0.2) / 5 = 1.06


def test_a_number_at_its_limit_is_not_told_of_again_and_again():
    watch, told = HealthWatch(), []
    for number in range(1, 61):
        told += [number for _ in watch.update(entry(number, logit_abs=3.0 if number % 3 == 1 else 0.01))]
    # Of five updates one or two are high, so the mean passes the limit twice in three updates.
    assert told[0] == WINDOW and len(told) <= 60 / WINDOW
    assert min(b - a for a, b in itertools.pairwise(told)) >= WINDOW


def test_a_second_spell_is_told_again():
    watch, told = HealthWatch(), []
    for line in log_of_values("winner_above_reference", [True] * 10 + [False] * 10 + [True] * 10):
        told += [(line["update"], rule.name) for rule in watch.update(line)]
    assert told == [(6, "winner_above_reference"), (26, "winner_above_reference")]


@pytest.mark.parametrize("seed", range(3))
def test_a_healthy_run_is_silent(seed):
    """Errors within 1 % of the reference's, a loss around ln 2, gradients within a factor of two."""
    draw = random.Random(seed)
    log = [
        entry(
            number, winner_error=0.1 * draw.gauss(1, 0.01), preference_loss=draw.gauss(0.693, 0.01),
            logit_abs=draw.uniform(0, 0.6), grad_norm=draw.uniform(0.7, 1.4),
        )
        for number in range(1, 200)
    ]  # fmt: skip
    assert intervals(log) == {}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [None, math.nan, math.inf, 10**400, "x"])
def test_values_that_are_not_finite_do_not_count(name, value):
    rule = next(rule for rule in RULES if rule.name == name)
    broken = [entry(number, **{key: value}) for number in range(2, 9) for key in rule.keys]
    ill = log_of_values(name, [True] * 10)
    assert name not in intervals([ill[0], *broken])
    assert len(intervals([ill[0], *broken, *ill[1:3], *broken, *ill[3:]])[name]) == 1
    assert intervals([*broken, *[entry(number) for number in range(9, 20)]]).get(name) is None


@pytest.mark.parametrize("name", NAMES)
def test_missing_numbers_do_not_count(name):
    rule = next(rule for rule in RULES if rule.name == name)
    for key in rule.keys:
        gone = {key, {"preference_loss": "loss", "most_clipped": "clipped_step2"}.get(key, key)}
        log = [{k: v for k, v in line.items() if k not in gone} for line in log_of_values(name, [True] * 10)]
        watch = HealthWatch()
        assert not [rule for line in log for rule in watch.update(line) if rule.name == name]
        assert name not in watch.flags(log[-1])


def test_an_update_without_any_clipped_ratio_says_nothing_about_the_steps():
    """The first update of each iteration is one: its ratios are 1, so a mean over all updates would hide the others."""
    log = [entry(n, clipped_step1=0.0, clipped_step2=0.9 * (n % 2 == 0)) for n in range(1, 21)]
    ((first, last),) = intervals(log)["step_clipped"]
    assert (first, last) == (2 * WINDOW, 20)
    watch = HealthWatch()
    watch.update(log[0])
    assert "step_clipped" not in watch.flags(log[0]) and watch.flags(log[1])["step_clipped"] == 0.0


def test_an_objective_without_a_reference_warns_of_its_gradient_alone():
    ill = {"winner_error": 9.0, "logit_abs": 9.0, "loss": 0.1, "grad_norm": 99.0}
    log = [{"update": 1, **ill, "grad_norm": 1.0}, *({"update": number, **ill} for number in range(2, 30))]
    assert list(intervals(log)) == ["gradient_grown"]


def test_the_loss_of_kto_is_no_preference_loss():
    """It is 0.5 where policy and reference agree; other rules hold for it as for every objective with a reference."""
    log = [{"update": n, "loss": 0.5, "liked": 0.4, "winner_error": 0.1001, "ref_winner_error": 0.1, "grad_norm": 1.0}
           for n in range(1, 10)]  # fmt: skip
    assert intervals(log) == {}
    assert list(intervals([{**line, "winner_error": 0.11} for line in log])) == ["winner_above_reference"]
    assert list(intervals([{k: v for k, v in line.items() if k != "liked"} for line in log])) == ["losers_worse"]


def test_logs_without_a_loss_of_preference_have_their_loss():
    log = [entry(number, loss=0.6, winner_error=0.1001) for number in range(1, 10)]
    assert intervals(log) == {}
    for line in log:
        del line["preference_loss"]
    assert list(intervals(log)) == ["losers_worse"]


@pytest.mark.parametrize(
    ("objective", "learning_rate", "expected"),
    [
        ("seppo", 1e-3, {"winner_above_reference", "logits_large", "gradient_grown"}),
        ("seppo-never", 1e-4, {"winner_above_reference", "logits_large", "losers_worse"}),
    ],
)
def test_real_runs_made_ill_on_purpose_warn(tmp_path_factory, capsys, objective, learning_rate, expected):
    """The learning rate is ten or thirty times that of a healthy run, without warm-up."""
    folder = tmp_path_factory.mktemp("ill")
    tree = {
        "objective": objective, "output": str(folder / "run"),
        "model": {"path": "shapes", "train": "full", "precision": "fp32"},
        "data": {"source": "shapes:16:11", "resolution": 32, "prompt_dropout": 0.1, "cache": str(folder / "cache")},
        "train": {
            "updates": WINDOW, "updates_per_iteration": WINDOW, "pairs_per_update": 8, "micro_batch": 8,
            "learning_rate": learning_rate, "warmup_updates": 0, "beta": 500.0,
        },
        "sampler": {"steps": 2, "guidance": 1.0, "batch": 8}, "log": {"sample_every": 0}, "save": {"minutes": 60},
    }  # fmt: skip
    config = parse_config(tree)
    train(config)
    out = capsys.readouterr().out
    assert {rule.name for rule in RULES if rule.warning in out} == expected == set(intervals(log_of(config)))
    assert {name for name in NAMES if log_of(config)[-1].get(name)} == expected
    shutil.rmtree(folder)
