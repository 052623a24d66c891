"""Tests how the cases of a suite are chosen, run, kept and stopped, and that they fit into six minutes by estimate."""

import importlib
import json
import os
import signal

import pytest
import torch
from diffusers import AutoencoderKL, MotionAdapter, UNet2DConditionModel
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from benchmarks import run
from benchmarks.harness import cases as suites
from benchmarks.harness import counters, estimates
from benchmarks.harness.cases import Case, LeftOut, Shared, chosen, run_cases
from benchmarks.harness.measure import Machine
from benchmarks.harness.rows import Row
from benchmarks.suites import score, temporal
from seppo_fast import shapes
from seppo_fast.config.schema import ModelConfig
from seppo_fast.scorers.clip import VIT_H_14

H200 = Machine(torch.device("cuda"), quick=False)
MINUTES = 6


class Clock:
    """A clock that cases advance."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def pass_(self, seconds):
        self.now += seconds


def row(title, value_ok=True):
    return Row("kernels", title, "ours", "ours", value_ok, p20_ms=1.0, p50_ms=1.0, p80_ms=1.0)


def case(title, clock=None, takes=0.0, **fields):
    """Returns a case that makes a row and advances the clock by `takes` seconds."""

    def made():
        for need in fields.get("needs", ()):
            need()
        if clock is not None:
            clock.now += takes
        return [row(title)]

    return Case(title, made, **fields)


def titles(rows):
    return [row.case for row in rows]


def test_cases_are_chosen_by_parts_of_their_titles():
    cases = [case("1 pair, SD"), case("16 pairs, SD"), case("16 pairs, SDXL")]
    assert chosen(cases, []) == cases
    assert chosen(cases, ["sdxl"]) == cases[2:] and chosen(cases, ["1 PAIR", "xl"]) == [cases[0], cases[2]]
    with pytest.raises(ValueError) as raised:
        chosen(cases, ["SD", "32 pairs"])
    listed = ["  1 pair, SD", "  16 pairs, SD", "  16 pairs, SDXL"]
    assert str(raised.value).splitlines() == ["no case's title contains '32 pairs'; the titles are", *listed]


def test_rows_are_kept_after_each_case():
    kept = []
    outcome = run_cases([case("a"), case("b"), case("c")], keep=lambda rows: kept.append(titles(rows)))
    assert kept == [["a"], ["a", "b"], ["a", "b", "c"]] and titles(outcome.rows) == kept[-1]
    assert outcome.missing == {} and outcome.failed == []


def test_a_case_begins_only_where_its_estimate_fits():
    clock = Clock()
    cases = [case(name, clock, takes, seconds=takes) for name, takes in [("a", 20), ("b", 50), ("c", 30), ("d", 11)]]
    outcome = run_cases(cases, 60, clock=clock)
    assert titles(outcome.rows) == ["a", "c"]  # b would end at 70 s, d at 61
    assert outcome.missing == {
        "b": "needs about 50 s, but only 40 s are left",
        "d": "needs about 11 s, but only 10 s are left",
    }


def test_an_estimate_grows_as_much_as_those_before_it_were_too_small():
    clock = Clock()
    cases = [case("a", clock, 20, seconds=10), case("b", clock, 10, seconds=25), case("c", clock, 20, seconds=20)]
    assert titles(run_cases(cases, 60, clock=clock).rows) == ["a", "c"]  # b would take 50 s
    clock = Clock()
    cases = [case("a", clock, 5, seconds=10), case("b", clock, 50, seconds=50)]
    assert titles(run_cases(cases, 60, clock=clock).rows) == ["a", "b"]  # overestimates do not shrink it


def test_without_estimates_a_case_begins_as_long_as_time_is_left():
    clock = Clock()
    cases = [case(name, clock, 30, seconds=1000) for name in "abc"]
    outcome = run_cases(cases, 60, estimated=False, clock=clock)
    assert titles(outcome.rows) == ["a", "b"] and outcome.missing == {"c": "no time is left"}


def recorded(events, name, **options):
    def make(stack):
        events.append(f"make {name}")
        stack.callback(lambda: events.append(f"end {name}"))
        return name

    return Shared(make, **options)


def test_set_up_is_made_when_a_case_needs_it_and_ends_when_none_does():
    events = []
    folder = recorded(events, "folder")
    model = Shared(lambda stack: events.append(f"make model in {folder()}"), needs=(folder,))
    other = recorded(events, "other", needs=(folder,))
    never = recorded(events, "never")
    cases = [case("a"), case("b", needs=(model,)), case("c", needs=(other,)), case("d", needs=(model,)), case("e")]
    run_cases([*cases, case("f", seconds=99, needs=(never,))], 10, keep=lambda rows: events.append(rows[-1].case))
    made = ["a", "make folder", "make model in folder", "b", "make other", "c", "end other", "d", "end folder", "e"]
    assert events == made
    assert not any(one.exists for one in (folder, model, other, never))


def test_set_up_counts_once_and_only_where_it_does_not_exist():
    folder = Shared(lambda stack: None, 20)
    model = Shared(lambda stack: folder(), 10, needs=(folder,))
    one = case("a", seconds=5, needs=(model, folder))
    assert one.cost() == 35
    folder()
    assert one.cost() == 15
    model()
    assert one.cost() == 5
    model.end()
    assert one.cost() == 15


def test_set_up_ends_on_an_interruption_too():
    events = []
    folder = recorded(events, "folder")

    def interrupted():
        folder()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_cases([Case("a", interrupted, needs=(folder,)), case("b", needs=(folder,))])
    assert events == ["make folder", "end folder"]


def raising(error):
    def call(*_):
        raise error

    return call


def test_a_case_without_rows_does_not_take_the_others_with_it(capsys):
    broken = Shared(raising(RuntimeError("no such kernel")))
    cases = [
        Case("too large", raising(torch.OutOfMemoryError())),
        Case("no room", raising(LeftOut("there is room for 2"))),
        case("first", needs=(broken,)),
        case("second", needs=(broken,)),
        case("last"),
    ]
    outcome = run_cases(cases)
    assert titles(outcome.rows) == ["last"] and outcome.failed == ["first"]
    assert outcome.missing == {
        "too large": "does not fit into memory",
        "no room": "there is room for 2",
        "first": "failed with RuntimeError: no such kernel",
        "second": "its set-up failed with RuntimeError: no such kernel",
    }
    out, err = capsys.readouterr()
    assert "no room: left out: there is room for 2\n" in out and "RuntimeError: no such kernel" in err


@pytest.fixture
def played(monkeypatch):
    """Returns a function that replaces the cases of suite `sampling`."""

    def play(*cases):
        monkeypatch.setattr(importlib.import_module("benchmarks.suites.sampling"), "cases", lambda machine: list(cases))

    return play


def test_what_is_missing_is_named_and_only_what_fails_changes_the_exit_code(played, tmp_path, capsys):
    file = tmp_path / "rows.json"
    words = ["--suite", "sampling", "--quick", "--json", str(file)]
    played(case("a"), Case("b", raising(LeftOut("too large"))))
    assert run.main(words) == 0
    assert [row["case"] for row in json.loads(file.read_text())] == ["a"]
    assert capsys.readouterr().err == "missing: b: too large\n"
    played(case("a"), Case("b", raising(RuntimeError("no such kernel"))), case("c"))
    assert run.main(words) == 1
    assert [row["case"] for row in json.loads(file.read_text())] == ["a", "c"]
    assert capsys.readouterr().err.endswith("missing: b: failed with RuntimeError: no such kernel\n")
    played(case("a"), Case("b", lambda: [row("b", value_ok=False)]))
    assert run.main(words) == 1
    played(case("a"))
    assert run.main([*words, "--minutes", "1e-9"]) == 0
    assert capsys.readouterr().err.endswith("missing: a: no time is left\n")


def test_a_killed_run_loses_one_case(played, tmp_path):
    """The run is in a process of its own, which kills itself in its third case."""
    file = tmp_path / "rows.json"
    file.write_text("[]")

    def killed():
        assert [row["case"] for row in json.loads(file.read_text())] == ["a", "b"]
        os.kill(os.getpid(), signal.SIGKILL)

    played(case("a"), case("b"), Case("c", killed), case("d"))
    child = os.fork()
    if not child:
        try:
            run.main(["--suite", "sampling", "--quick", "--json", str(file)])
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert [row["case"] for row in json.loads(file.read_text())] == ["a", "b"]
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_is_the_old_one_where_the_new_one_is_not_whole(tmp_path, monkeypatch):
    file = tmp_path / "rows.json"
    run.write_rows(file, [row("a")], Machine(torch.device("cpu"), quick=True))
    monkeypatch.setattr(json, "dumps", lambda rows, indent: "[")
    monkeypatch.setattr(os, "replace", raising(OSError("killed here")))
    with pytest.raises(OSError, match="killed here"):
        run.write_rows(file, [row("a"), row("b")], Machine(torch.device("cpu"), quick=True))
    assert [row["case"] for row in json.loads(file.read_text())] == ["a"]


# Cases that do not fit into six minutes of an H200; all other cases of a suite do.
BEYOND = {
    "sampling": {"64 samples, 50 DDIM steps", "128 samples, 10 DDIM steps"},
    "endtoend": {
        "exact: DDIM 50 steps, compiled",
        "fast (another distribution): DPM-Solver++ 20 steps, 4 draws a sample, compiled",
    },
    "video": {
        "update of 16 x 512 x 512, exact: DDIM 20 steps",
        "sampling of 16 x 512 x 512, 1 sample, 5 DDIM steps",
        "sampling of 16 x 512 x 512, 2 samples, 5 DDIM steps",
        "step of 16 x 512 x 512, lora, 1 pair, recomputing",
        *map(str, temporal.SIZES["gpu"].cases[len(temporal.FIRST) :]),  # seconds each: as many as fit run
    },
}


def simulated(cases, clock):
    """Returns cases that advance the clock by their estimates, including those of their set-up."""
    shared = {}

    def played(one):
        if id(one) not in shared:
            needs = [played(need) for need in one.chain()[:-1]]
            shared[id(one)] = Shared(lambda _: clock.pass_(one.seconds), one.seconds, needs)
        return shared[id(one)]

    return [case(c.title, clock, c.seconds, seconds=c.seconds, needs=tuple(map(played, c.chain()))) for c in cases]


@pytest.mark.parametrize("suite", run.SUITES)
def test_a_suite_fits_six_minutes_by_its_estimates(suite):
    cases, clock = suites.listed(suite, H200), Clock()
    assert len({one.title for one in cases}) == len(cases)
    assert all(one.seconds > 0 for one in cases if not one.title.startswith("limit: "))
    outcome = run_cases(simulated(cases, clock), 60 * MINUTES, clock=clock)
    needed = [one for one in cases if one.title not in BEYOND.get(suite, set())]
    assert {one.title for one in needed} <= set(titles(outcome.rows))
    everything = {id(one): one.seconds for case in needed for one in case.chain()}
    assert sum(everything.values()) + sum(one.seconds for one in needed) <= 60 * MINUTES
    assert clock.now - 100 <= 60 * MINUTES


@pytest.mark.parametrize("suite", run.SUITES)
def test_listing_a_suite_makes_nothing(suite, monkeypatch):
    for name in ("get_device_properties", "get_device_name", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, raising(AssertionError(name)))
    for machine in (H200, Machine(torch.device("cpu"), quick=False), Machine(torch.device("cpu"), quick=True)):
        cases = suites.listed(suite, machine)
        assert cases[0].title.startswith("limit: ") or suite == "cache"
        assert not any(one.exists for case in cases for one in case.chain())


def test_time_is_that_of_the_device_or_of_the_host():
    assert estimates.h200(bf16=500) == 2 and estimates.h200(fp32=70, gb=4300) == 3
    assert estimates.h200(bf16=250, launches=10**6) == pytest.approx(15)
    assert estimates.h200(bf16=250, launches=1000, setup=4) == 5


BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}


def test_flops_that_estimates_count_are_those_of_the_true_architecture(tmp_path):
    with torch.device("meta"):
        UNet2DConditionModel(**counters.SD15).save_config(tmp_path / "unet")
        AutoencoderKL(block_out_channels=(1, 1, 1, 1), norm_num_groups=1, **BLOCKS).save_config(tmp_path / "vae")
        adapter = MotionAdapter(use_motion_mid_block=True)
        adapter.save_config(tmp_path / "adapter")
    tokenizer = CLIPTokenizer.from_pretrained(shapes.PIPELINE / "tokenizer", model_max_length=77)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert sum(weight.numel() for weight in adapter.parameters()) == 453_209_280
    forward = counters.unet_flops(str(tmp_path), None, str(tmp_path / "adapter"), 16, 256)
    assert forward / 1e12 == pytest.approx(estimates.CLIPS[256].forward, rel=1e-3)
    assert counters.unet_flops(str(tmp_path)) / 1e12 == pytest.approx(estimates.PICTURE.forward, rel=1e-3)
    trained = counters.unet_flops(str(tmp_path), ModelConfig(train="full"))
    assert trained / 1e12 == pytest.approx(estimates.PICTURE.trained["full"], rel=1e-3)


def test_flops_of_towers_that_estimates_count_are_those_of_vit_h_14():
    with torch.device("meta"), torch.no_grad():
        model, pixels = CLIPModel(CLIPConfig(**VIT_H_14)), torch.empty(1, 3, 224, 224)
        tokens = torch.zeros(1, 77, dtype=torch.int64)
        assert sum(weight.numel() for weight in model.parameters()) == 986_109_441
        image = counters.count_flops(lambda: model.get_image_features(pixel_values=pixels))
        text = counters.count_flops(lambda: model.get_text_features(input_ids=tokens))
    assert {"image": image / 1e12, "text": text / 1e12} == pytest.approx(score.FLOPS, rel=0.01)


def test_launches_that_estimates_count_are_those_of_the_census():
    census = json.loads((run.Path(__file__).parents[2] / "benchmarks/results/census.json").read_text())["phases"]
    operations = {(train, phase["phase"]): phase["operations"] for train in census for phase in census[train]}
    assert estimates.FORWARD_LAUNCHES == operations["full", "UNet, doubled batch"]
    assert estimates.STEP_LAUNCHES == {train: operations[train, "policy, forward and backward"] for train in census}
