"""Tests of the benchmark driver through its command line, what it rejects, and what is made from its rows."""

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import run, tables
from benchmarks.harness import counters, loops, losses, speed, steps, switches
from benchmarks.harness.measure import Bench, Provider, Stopwatch, captured, copy_limit, distance, interleaved
from benchmarks.harness.models import Workplace, workplace
from benchmarks.harness.naive import NaiveLoop
from benchmarks.harness.rows import (
    KEYS,
    NAIVE,
    NAIVE_BATCH,
    NAIVE_FAST,
    NAIVE_FAST_BATCH,
    OURS,
    PHASES,
    SEPARATOR,
    Row,
    table,
    with_ratios,
)
from benchmarks.suites import endtoend, sampling, score, step, temporal, video
from tests.helpers.benchmark import MACHINE, driven, smallest_cache, smallest_kernels
from tests.helpers.drop_in import seppo_before
from tests.helpers.runs import tiny_config

ROOT = Path(__file__).parents[2]


@pytest.fixture
def smallest(monkeypatch):
    """Shrinks every suite to a second or two."""
    monkeypatch.setitem(sampling.SIZES, "quick", (sampling.Case(1, 2, 1), sampling.Case(3, 2, 1)))
    monkeypatch.setitem(step.SIZES, "quick", step.Size({"lora": (2, 1)}, rounds=1))
    monkeypatch.setitem(endtoend.SIZES, "quick", (endtoend.Size(4, 2, 1, 2, 2, 2, 2, 2),))
    smallest_kernels(monkeypatch)
    smallest_cache(monkeypatch)
    smallest_video(monkeypatch)
    size = score.Size(pictures=3, side=232, generated=2, batch=2, steps=1, rounds=1)
    monkeypatch.setitem(score.SIZES, "quick", size)


def smallest_video(monkeypatch):
    """Shrinks suite `video` to two clips of four frames."""
    update = endtoend.Size(2, 1, 1, 2, micro_batch=2, samples=2)
    steps = step.Size({"lora": (2,)}, 1, ways=("ahead", "together"), checked=2, micro_batch=1)
    sizes = video.Size(32, (sampling.Case(2, 1, 1),), steps, update)
    checked = endtoend.Size(2, 2, 1, 1, micro_batch=2, samples=2)
    monkeypatch.setitem(video.SIZES, "quick", video.Sizes(4, (sizes,), checked))
    case = temporal.Case("attention", 1, 4, 40, True)
    monkeypatch.setitem(temporal.SIZES, "quick", temporal.Size((case,), 1, 1e-3))


def test_the_command_as_a_user_types_it(tmp_path):
    words = [sys.executable, "-m", "benchmarks.run", "--suite", "sampling", "--quick", "--json", tmp_path / "rows.json"]
    done = subprocess.run(
        [*words, "--cases", "LIMIT", "--cases", "1 sample,"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stderr == ""
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["provider"] for row in rows] == ["matmul", *PROVIDERS["1 sample"]]
    lines = done.stdout.splitlines()
    assert len(lines) == 2 * 3 + len(rows) + 1  # per case its headings, its name, its seconds
    assert lines[-1].startswith("sampling on CPU")
    assert [file.name for file in tmp_path.iterdir()] == ["rows.json"]
    assert subprocess.run([*words[:4], "painting"], cwd=ROOT, capture_output=True).returncode == 2


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--json", "nowhere/rows.json"], "nowhere does not exist"),
        (["--json", "/dev/null"], "/dev/null: exists and is not a regular file"),
        (["--minutes", "0"], "--minutes 0.0: must be more than 0"),
        (["--minutes", "nan"], "must be more than 0"),
    ],
)
def test_mistakes_are_refused_before_anything_runs(words, problem, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run.main(["--suite", "sampling", "--quick", *words])
    assert stop.value.code == 2 and problem in capsys.readouterr().err


def test_cases_that_match_nothing_are_an_error_that_lists_the_titles(smallest, capsys):
    assert run.main(["--suite", "sampling", "--quick", "--cases", "5 samples"]) == 2
    out, err = capsys.readouterr()
    titles = ["  limit: matmul", "  1 sample, 2 DDIM steps", "  3 samples, 2 DDIM steps"]
    assert out == "" and err.splitlines() == ["--cases: no case's title contains '5 samples'; the titles are", *titles]


@pytest.mark.parametrize("suite", run.SUITES)
def test_the_rows_of_a_suite(suite, smallest, tmp_path, capsys):
    code, rows = driven(suite, tmp_path)
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert {suite} == {row["suite"] for row in rows}
    for row in rows:
        assert tuple(row) == KEYS
        assert row["value_ok"] and row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["device"].startswith("CPU") and row["versions"]["torch"] == torch.__version__
        assert row["launches"] is row["host_syncs"] is row["peak_allocated_bytes"] is row["mfu"] is None
        assert row["graph_p50_ms"] is None and (row["gb_per_s"] is None) == (row["limit"] != "copy")
        (baseline,) = [other for other in rows if other["case"] == row["case"] and other["provider"] == row["baseline"]]
        assert row["ratio"] == pytest.approx(baseline["p50_ms"] / row["p50_ms"])
        assert row["case"] in printed and row["provider"] in printed
    if suite == "sampling":
        assert [row["provider"] for row in rows] == ["matmul", *PROVIDERS["1 sample"], *PROVIDERS["samples"]]
    if suite == "step":
        first_format = "ahead, channels first"
        both = {("lora, 1 pair", name) for name in [*PROVIDERS["pairs"], first_format] if name != steps.NAIVE_BATCH}
        both |= {("lora, 2 pairs", name) for name in [*PROVIDERS["pairs"], first_format]}
        assert {(row["case"], row["provider"]) for row in rows[1:]} == both
    if suite == "endtoend":
        assert phases_add_up(rows) == 2
        whole = [row["provider"] for row in rows if SEPARATOR not in row["case"]]
        assert whole == ["matmul", *PROVIDERS["exact"], *PROVIDERS["fast"]]
    if suite == "kernels":
        assert [row["provider"] for row in rows] == ["copy", *2 * WAYS]
        assert [row["share_of_step"] is None for row in rows] == [True, *6 * [False], *6 * [True]]  # copy, 1 pair, 3
    if suite == "cache":
        switched, stepped = 2 * SWITCHES, [switches.ALONE, switches.SWITCH, switches.AHEAD]
        assert [row["provider"] for row in rows] == [*2 * switched, *stepped]
        assert all((row["share_of_step"] is None) == ("steps of" in row["case"]) for row in rows)
    if suite == "score":
        threads, alone = [score.ONE_THREAD, score.FOUR_THREADS], [score.ALONE, score.BATCHES]
        phases = ["copy", *3 * threads, *2 * alone, score.ALONE, "batches of 2"]
        assert [row["provider"] for row in rows] == ["matmul", score.ALONE, score.PHASE, *phases]
    if suite == "video":
        assert phases_add_up([row for row in rows if row["case"].startswith("update")]) == 1
        assert [(row["case"], row["provider"]) for row in rows if SEPARATOR not in row["case"]] == VIDEO


PROVIDERS = {
    "1 sample": [sampling.PIPELINE_ALONE, sampling.CHANNELS_LAST, sampling.OURS],
    "samples": [sampling.PIPELINE_ALONE, sampling.PIPELINE, sampling.CHANNELS_LAST, sampling.OURS],
    "pairs": [steps.NAIVE, steps.NAIVE_BATCH, "ahead", steps.WITH_ERRORS, "together", "apart"],
    "exact": [NAIVE, NAIVE_BATCH, OURS],
    "fast": [NAIVE, NAIVE_FAST, NAIVE_FAST_BATCH, OURS],
}
VIDEO = [
    ("fp32 1024 cubed", "matmul"),
    *(
        (f"{what} of 4 x 32 x 32, {case}", provider)
        for what, case, providers in [
            ("update", "exact: DDIM 2 steps", PROVIDERS["exact"]),
            ("sampling", "2 samples, 1 DDIM steps", PROVIDERS["samples"]),
            ("step", "lora, 2 pairs", PROVIDERS["pairs"][:-1]),
        ]
        for provider in providers
    ),
    ("64 MiB", "copy"),
    *(
        ("attention, 1 pair, 16 frames x 4 positions, 8 heads of 40, forward + backward", provider)
        for provider in [temporal.SDPA, temporal.THEIR_LAYOUT, temporal.IN_PLACE]
    ),
]


WAYS = [
    losses.B2, losses.B2_COMPILED, losses.TWIN_COMPILED, losses.AUTOGRAD, losses.ONE_PASS, losses.OVERWRITING,
]  # fmt: skip


SWITCHES = [switches.LOAD, switches.READ, switches.COPY, switches.SWITCH, switches.IN_PLACE]


def phases_add_up(rows):
    """Checks that each provider's phases add up to its whole in each case; returns the number of cases."""
    cases = {row["case"].partition(SEPARATOR)[0] for row in rows if row["provider"] != "matmul"}
    for case in cases:
        for provider in {row["provider"] for row in rows if row["case"] == case}:
            mine = {row["case"]: row for row in rows if row["provider"] == provider}
            phases = [mine[case + SEPARATOR + phase] for phase in PHASES]
            # One round, so that medians add up.
            assert sum(row["p50_ms"] for row in phases) == pytest.approx(mine[case]["p50_ms"])
            assert sum(row["share_of_step"] for row in phases) == pytest.approx(1)
    return len(cases)


def test_wrong_samples_get_no_ratio(smallest, tmp_path, monkeypatch, capsys):
    ours = sampling.Samplers.ours
    monkeypatch.setattr(sampling.Samplers, "ours", lambda *arguments: ours(*arguments) * 1.01)
    code, rows = driven("sampling", tmp_path)
    assert code == 1
    for row in rows:
        assert row["value_ok"] == (row["ratio"] is not None) == (row["provider"] != sampling.OURS)
    out, err = capsys.readouterr()
    assert "values differ from the baseline's by 0.01" in out and "DIFFER" in out
    assert "2 rows without a ratio" in err


def test_compiled_diffusers_is_one_graph_of_the_whole_unet_channels_last(monkeypatch):
    """The UNet is traced as a whole, but its graph runs uncompiled: inductor with CUDA graphs needs a GPU."""
    graphs = []
    monkeypatch.setattr(
        sampling, "_COMPILE", {"backend": lambda graph, _: graphs.append(graph) or graph, "fullgraph": True}
    )
    with workplace(MACHINE) as place:
        samplers = sampling.Samplers(place, 2)
        torch._dynamo.reset()
        sample = samplers.channels_last(compiled=True)
        made = sample(2, 2)
        assert torch.equal(sample(2, 2), made) and len(graphs) == 1
        weight = samplers.unet.conv_in.weight
        assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
        assert distance([made], [samplers.pipeline(2, 2)]) < 1e-3


def test_another_objective_gets_no_ratio(smallest, tmp_path, monkeypatch):
    """Without its flipper the loss has another sign for the pairs that are learned."""
    config = Workplace.config

    def never(*arguments, **sections):
        return config(*arguments, **sections).model_copy(update={"objective": "seppo-never"})

    monkeypatch.setattr(Workplace, "config", never)
    monkeypatch.setitem(step.SIZES, "quick", step.Size({"lora": (2,)}, rounds=1, ways=("ahead",)))
    code, rows = driven("step", tmp_path)
    assert code == 1
    right = {row["provider"] for row in rows if row["ratio"] is not None}
    assert right == {"matmul", steps.NAIVE, steps.NAIVE_BATCH}


@pytest.mark.parametrize("fast", [False, True])
def test_the_naive_loop_trains_to_our_weights(fast, tiny, tmp_path):
    """In batches too; within 0.5 % of the weights' change, which AdamW makes nearly the sign of the gradient."""
    config = tiny_config(
        tiny,
        tmp_path,
        data={"prompt_dropout": 0.0},
        train={"updates": 1, "updates_per_iteration": 1, "micro_batch": 3},
        sampler={"name": "dpmsolver++", "steps": 3} if fast else {},
        reference={"uses": 2 if fast else 1},
    )
    changes = loops.weight_changes(config, MACHINE)
    assert distance(changes[OURS], changes[NAIVE]) < 0.005
    assert distance(changes[NAIVE_BATCH], changes[NAIVE]) < 0.005
    assert all(change.any() for change in changes[NAIVE])


def test_where_batches_of_the_naive_loop_do_not_fit_the_other_loops_stay(smallest, tmp_path, monkeypatch, capsys):
    update = NaiveLoop.update

    def short(loop, examples, start_noise, pairs, batch=1):
        if batch > 1 and len(examples) == 4:
            raise torch.OutOfMemoryError
        return update(loop, examples, start_noise, pairs, batch)

    monkeypatch.setattr(NaiveLoop, "update", short)
    monkeypatch.setattr(endtoend, "weights_agree", lambda *_: endtoend.RightLoops(True, True))
    size = endtoend.Size(4, 2, 1, 2, micro_batch=4, samples=4)
    monkeypatch.setitem(endtoend.SIZES, "quick", (size,))
    file = tmp_path / "rows.json"
    assert run.main(["--suite", "endtoend", "--quick", "--cases", "exact", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    assert [row["provider"] for row in rows if SEPARATOR not in row["case"]] == [NAIVE, OURS]
    assert f"{NAIVE_BATCH}: 4 pairs at once do not fit into memory beside ours" in capsys.readouterr().out


def test_the_naive_loop_has_the_papers_loss(tiny, tmp_path):
    loop = NaiveLoop(tiny_config(tiny, tmp_path, train={"beta": 300.0}), MACHINE)
    predictions = torch.randn(5, 3, 2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    losses = [loop.preference(*parts) for parts in predictions]
    torch.testing.assert_close(losses, [seppo_before(*parts, 300.0)[0] for parts in predictions])


def test_calls_take_turns_and_time_is_per_unit():
    order = []
    calls = [lambda: order.append("a"), lambda: order.append("b")]
    assert [len(taken) for taken in interleaved(MACHINE, calls, 3)] == [3, 3]
    assert order == ["a", "b"] * 3
    bench = Bench(MACHINE, "sampling")
    row = bench.row("case", Provider("ours", calls[0], units=4, flops=8e6), "ours", [0.1, 0.2, 0.3, 0.4, 1.5])
    assert (row.p20_ms, row.p50_ms, row.p80_ms) == pytest.approx((45, 75, 155))
    assert row.pairs_per_s == pytest.approx(4 / 0.3)
    matmul = bench.limit_row
    assert row.limit_fraction == pytest.approx(8e6 / 0.3 * matmul.p50_ms / 1e3 / (2 * 1024**3))
    assert row.gb_per_s is row.graph_p50_ms is None


def test_bytes_a_second_are_those_of_the_graph_where_there_is_one():
    """Calls have 4 units of 2 pairs and 6 MB each; replays have 3 units."""
    work = copy_limit(MACHINE)
    bench = Bench(MACHINE, "kernels", work)
    limit = bench.limit_row
    assert work.units == 4
    assert (limit.limit_fraction, limit.gb_per_s) == pytest.approx((1, work.work / 4 / limit.p50_ms / 1e6))
    provider = Provider("ours", list, units=4, pairs=2, replay=list, replayed=3, moved_bytes=6e6)
    row = bench.row("case", provider, "ours", [0.04] * 3)
    assert (row.p50_ms, row.pairs_per_s, row.gb_per_s) == pytest.approx((10, 200, 0.6))
    row = bench.row("case", provider, "ours", [0.04] * 3, [0.006] * 3)
    assert (row.p50_ms, row.graph_p50_ms, row.gb_per_s) == pytest.approx((10, 2, 3))
    assert row.limit_fraction == pytest.approx(3 / limit.gb_per_s) and row.mfu is None
    (row,) = bench.case("case", [provider], 2)
    assert row.graph_p50_ms > 0


def test_a_graph_takes_its_inputs_in_turn_and_says_where_there_is_none(monkeypatch, capsys):
    """CUDA is replaced by stand-ins."""
    replayed = []
    graph = SimpleNamespace(replay=lambda: replayed.append(1))
    for name in ("graph", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    seen = []
    captured("case", seen.append, ["a", "b", "c"], 7, None)()
    assert seen == list("abcabca") and len(replayed) == 2

    def refused(inputs):
        raise RuntimeError("operation not permitted when stream is capturing\nCUDA error")

    assert captured("case, ours", refused, ["a"], 1, None) is None
    assert capsys.readouterr().out == "case, ours: no CUDA graph: operation not permitted when stream is capturing\n"


def test_a_stopwatch_adds_up_what_a_phase_takes():
    watch = Stopwatch(MACHINE)
    for _ in range(2):
        with watch.phase("generation"):
            pass
    watch.add("generation", 3.0)
    assert 3.0 < watch.seconds["generation"] < 4.0


def test_distance_is_relative_and_refuses_what_is_not_finite():
    one = [torch.tensor([3.0, 0.0]), torch.tensor([4.0])]
    assert distance([torch.tensor([3.0, 0.5]), torch.tensor([4.0])], one) == pytest.approx(0.1)
    assert distance([torch.full((2,), torch.nan), torch.ones(1)], one) == float("inf")


def test_flops_are_those_of_the_layers(tiny):
    layer = torch.nn.Linear(5, 7, device="meta")
    assert counters.count_flops(lambda: layer(torch.empty(3, 5, device="meta"))) == 2 * 3 * 5 * 7
    forward = counters.unet_flops(str(tiny))
    trained = counters.unet_flops(str(tiny), tiny_config(tiny, tiny).model)
    assert 2.5 * forward < trained < 3 * forward  # all weights: two more forwards, less the input's gradient


ROWS = [
    dict.fromkeys(KEYS) | asked
    for asked in [
        {"case": "exact: DDIM 50 steps", "provider": NAIVE, "p50_ms": 900.0, "ratio": 1.0, "pairs_per_s": 1.11},
        {"case": "exact: DDIM 50 steps", "provider": OURS, "p50_ms": 100.0, "ratio": 9.0, "pairs_per_s": 10.0},
        {"case": "fast: 20 steps", "provider": NAIVE_FAST, "p50_ms": 90.0, "pairs_per_s": 11.0},
        {"case": "fast: 20 steps", "provider": OURS, "p50_ms": 20.0, "value_ok": False, "pairs_per_s": 50.0},
        {"case": "never run", "provider": OURS},
    ]
]
ROWS = [
    {"value_ok": True} | {key: value for key, value in row.items() if key != "value_ok" or value is not None}
    | {"suite": "endtoend", "device": "NVIDIA H200", "versions": {"torch": "2.13.0"}, "commit": "abc1234"}
    for row in ROWS
]  # fmt: skip


def test_the_table_leaves_empty_what_was_not_measured():
    lines = speed.speed_table(ROWS).splitlines()
    assert lines[0] == "| endtoend | | ms | x baseline | per second |"
    assert lines[2] == "| exact: DDIM 50 steps | naive loop | 900 | 1.00 | 1.11 |"
    assert "| | ours | 20 | values differ | 50 |" in lines
    assert "| never run | ours | | | |" in lines
    assert lines[-1] == "`python -m benchmarks.run --suite endtoend`: NVIDIA H200, torch 2.13.0, commit abc1234."
    assert len({line.count("|") for line in lines[:-2]}) == 1
    more = speed.speed_table([*ROWS, ROWS[0] | {"suite": "step", "peak_allocated_bytes": 2_500_000_000}])
    assert more.startswith("\n".join(lines)) and "| 2.5 |" in more.removeprefix("\n".join(lines))
    assert speed.speed_table([]) == "Not measured yet."


def written(folder, name, *rows):
    """Writes a file of results, with all keys of a row."""
    full = [
        dict.fromkeys(KEYS) | {"value_ok": True, "versions": {"torch": "2.11.0"}, "device": "NVIDIA H200"} | row
        for row in rows
    ]
    (folder / name).write_text(json.dumps(full))


def test_of_each_case_the_newest_results_stand_in_the_table(tmp_path, monkeypatch):
    """`gpu_check` measures a few cases of several suites, which are shown until the suite has measured them."""
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    loss = [{"suite": "kernels", "case": f"{pairs} pairs", "provider": OURS} for pairs in (1, 16)]
    check = {"suite": "gpu_check", "provider": OURS, "commit": "b"}
    written(
        tmp_path, "H200-20261203-b-gpu-check.json",
        check | {"case": "loss, odd"}, check | {"case": "loss, even", "value_ok": False},
        *(row | {"p50_ms": 2.0, "commit": "b"} for row in loss),
        {"suite": "step", "case": "lora / policy", "provider": OURS, "p50_ms": 7.0, "commit": "b"},
    )  # fmt: skip
    written(tmp_path, "H200-20261201-a-kernels.json", *(row | {"p50_ms": 1.0, "commit": "a"} for row in loss))
    written(tmp_path, "H200-20261203-b-kernels.json", loss[1] | {"p50_ms": 3.0, "commit": "b"})
    written(tmp_path, "cpu-20261204-c-kernels.json", loss[0] | {"p50_ms": 9.0, "commit": "c"})
    rows = tables.suite_rows(on_cpu=False)
    found = {(row["suite"], row["case"]): (row["p50_ms"], row["command"]) for row in rows}
    by_check = "python -m benchmarks.gpu_check"
    assert found == {
        ("kernels", "1 pairs"): (2.0, by_check),
        ("kernels", "16 pairs"): (3.0, "python -m benchmarks.run --suite kernels"),
        ("gpu_check", "loss, odd"): (None, by_check),
        ("gpu_check", "loss, even"): (None, by_check),
        ("step", "lora / policy"): (7.0, by_check),
    }
    lines = speed.speed_table(rows).splitlines()
    assert lines[0] == f"1 of 2 values right; wrong: loss, even. `{by_check}`: NVIDIA H200, torch 2.11.0, commit b."
    assert f"`{by_check}`: NVIDIA H200, torch 2.11.0, commit b." in lines
    assert "`python -m benchmarks.run --suite kernels`: NVIDIA H200, torch 2.11.0, commit b." in lines


def test_the_projection_says_that_it_is_one_and_takes_right_values_on_a_gpu_alone():
    text = speed.projection(ROWS)
    assert text.startswith("A projection, not a measurement")
    assert f"ours, exact: DDIM 50 steps: {210 * 2048 / 10 / 3600:.1f} GPU-hours" in text
    assert text.count("naive loop: ") == 1 and "20 steps" not in text
    nothing = "No projection of the paper's whole run"
    assert speed.projection([]).startswith(nothing)
    assert speed.projection([row | {"device": "CPU, 2 threads"} for row in ROWS]).startswith(nothing)


def test_the_table_of_the_kernels():
    """Columns of values that only a GPU can measure appear if a GPU has measured them."""
    measured = {"p50_ms": 0.05, "graph_p50_ms": 0.0123, "ratio": 3.0, "pairs_per_s": 123456.0, "launches": 1.0}
    measured |= {"limit": "copy", "limit_fraction": 0.912, "gb_per_s": 4000.0, "share_of_step": 0.00123}
    rows = [
        dict.fromkeys(KEYS) | {"case": "1 pair", "value_ok": True, **where, **mine}
        for where in [
            {"suite": "kernels", "device": "NVIDIA H200", "versions": {"torch": "2.13.0"}, "commit": "abc1234"}
        ]
        for mine in [{"provider": "copy", "limit": "copy"}, {"provider": losses.ONE_PASS, **measured}]
    ]
    lines = speed.speed_table(rows).splitlines()
    assert (
        lines[0] == "| kernels | | ms | in a graph | x baseline | per second | of copy's speed | of a step | launches |"
    )
    assert lines[2] == "| 1 pair | ours, loss_and_grad | 0.05 | 0.0123 | 3.00 | 123,000 | 91.2% | 0.12% | 1 |"
    assert len(lines) == 5


def test_each_loop_of_each_mode_has_a_bar_of_its_own():
    modes = {
        "exact: DDIM": [NAIVE, NAIVE_BATCH, OURS],
        "fast (another distribution): DPM": [NAIVE, NAIVE_FAST, NAIVE_FAST_BATCH, OURS],
        "exact: DDIM, compiled": [NAIVE, NAIVE_BATCH, OURS],
    }
    cases = [(case, provider) for case, providers in modes.items() for provider in providers]
    rows = [
        ROWS[0] | {"case": case + SEPARATOR + phase, "provider": provider, "p50_ms": 10.0 * place}
        for place, (case, provider) in enumerate(cases, 1)
        for phase in PHASES
    ]
    assert {name: phases[PHASES[0]] for name, phases in speed._bars(rows).items()} == {
        "naive loop": 80.0,  # the same in all modes, so it has one bar
        "naive loop in batches, exact": 20.0,
        "ours, exact": 30.0,
        "naive loop, fast": 50.0,
        "naive loop in batches, fast": 60.0,
        "ours, fast": 70.0,
        "naive loop in batches, exact, compiled": 90.0,
        "ours, exact, compiled": 100.0,
    }


def test_the_picture_needs_every_phase(tmp_path):
    rows = [
        ROWS[0] | {"case": f"{case}{SEPARATOR}{phase}", "provider": provider, "p50_ms": 10.0}
        for case, provider in [("exact: a", NAIVE), ("exact: a", OURS), ("fast (other): b", NAIVE), ("fast: b", OURS)]
        for phase in PHASES
    ]
    speed.phase_chart(rows, tmp_path / "phases.png")
    assert (tmp_path / "phases.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="every phase"):
        speed.phase_chart(rows[:-1], tmp_path / "none.png")
    with pytest.raises(ValueError, match="every phase"):
        speed.phase_chart([], tmp_path / "none.png")
    with pytest.raises(ValueError, match="values of 'ours' differ"):
        speed.phase_chart([*rows[:-1], rows[-1] | {"value_ok": False}], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_a_ratio_needs_right_values_and_the_terminal_table_names_each_case_once():
    rows = with_ratios(
        [
            Row("step", "1 pair", "script", "script", True, p50_ms=6.0),
            Row("step", "1 pair", "ahead", "script", True, p50_ms=2.0),
            Row("step", "1 pair", "wrong", "script", False, p50_ms=1.0),
        ]
    )
    assert [row.ratio for row in rows] == [1.0, 3.0, None]
    lines = table(rows).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["1", "script", "ahead", "wrong"]
    assert "3.00 x" in lines[3] and "DIFFER" in lines[4]
