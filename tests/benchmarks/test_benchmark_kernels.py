"""Tests of suite `kernels`: its truth against autograd in float64, and what it omits and rejects."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.harness import losses
from benchmarks.harness.losses import EMBEDDED, LATENTS, LAYOUTS, SD, Case, Truth, make_inputs
from benchmarks.harness.measure import Machine
from benchmarks.suites import kernels
from seppo_fast.capacity.footprint import _LiveBytes
from seppo_fast.kernels import denoising_error as errors
from tests.helpers.benchmark import MACHINE, driven, smallest_kernels
from tests.helpers.drop_in import seppo_before

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture
def smallest(monkeypatch):
    """Shrinks the suite to about a second."""
    smallest_kernels(monkeypatch)


@pytest.fixture
def pieces(monkeypatch):
    """Lets only a few pairs be computed at once, so that the last piece is smaller."""
    monkeypatch.setattr(losses, "_AT_ONCE", 2 * 4 * 8 * 8)


def by_autograd(case, inputs):
    """Returns loss and gradient in float64 from B.2's differences; `ref_error` replaces the reference's errors."""
    pred = inputs.pred.detach().double().requires_grad_()
    target = inputs.target.double().repeat(2, 1, 1, 1)
    ref_error = inputs.ref_error
    if ref_error is None:
        ref_error = (inputs.ref_pred.double() - target).square().mean((1, 2, 3))
    winner, loser = ((pred - target).square().mean((1, 2, 3)) - ref_error.double()).chunk(2)
    sign = torch.where(winner > 0, 1.0, -1.0)
    loss = torch.nn.functional.softplus(losses.BETA / 2 * (winner + sign * loser)).mean()
    return loss.detach(), torch.autograd.grad(loss, pred)[0]


@pytest.mark.parametrize("ahead", [False, True])
def test_the_truth_is_autograds_in_float64(ahead, pieces):
    case = Case(5, EMBEDDED, ahead)
    inputs = make_inputs(case, CPU, 3)
    truth, (loss, grad) = Truth(case, inputs), by_autograd(case, inputs)
    assert truth.loss == pytest.approx(float(loss), rel=1e-9)
    gaps = truth.gaps(loss * 1.5, grad)
    assert gaps["loss"] == pytest.approx(0.5) and gaps["gradient"] < 1e-9
    wrong = grad.clone()
    wrong[4] *= -1  # one half of one pair
    assert truth.gaps(loss, wrong)["gradient"] > 0.2
    assert truth.gaps(loss, torch.full_like(grad, torch.nan))["gradient"] != pytest.approx(0)


def test_inputs_are_no_ties_and_of_both_kinds(pieces):
    case = Case(6, EMBEDDED)
    inputs = make_inputs(case, CPU, 0)
    error, reference = (
        (x.double() - inputs.repeated.double()).square().flatten(1).mean(1)
        for x in (inputs.pred.detach(), inputs.ref_pred)
    )
    difference = error - reference
    assert (0.1 < reference).all() and (reference < 0.3).all()
    assert (difference.abs() > 5e-5).all() and (difference[:6] > 0).tolist() == 3 * [False, True]
    assert torch.equal(inputs.scratch, inputs.pred) and inputs.pred.requires_grad
    assert losses.set_bytes(case) == inputs.nbytes(("pred", "target", "repeated", "ref_pred", "scratch"))
    errors = make_inputs(Case(6, EMBEDDED, ahead=True), CPU, 0)
    assert losses.set_bytes(Case(6, EMBEDDED, ahead=True)) == errors.nbytes(("pred", "target", "repeated", "scratch"))
    torch.testing.assert_close(errors.ref_error, reference.float())
    assert not torch.equal(make_inputs(case, CPU, 1).pred, inputs.pred)


def test_the_baseline_is_the_papers(pieces):
    inputs = make_inputs(Case(5, EMBEDDED), CPU, 0)
    before = seppo_before(inputs.pred, inputs.ref_pred, inputs.repeated, losses.BETA)
    after = losses.appendix_b2(inputs.pred, inputs.repeated, inputs.ref_pred, None)
    assert torch.equal(torch.stack(before), torch.stack(after))
    errors = (inputs.ref_pred.float() - inputs.repeated.float()).pow(2).mean(dim=[1, 2, 3])
    assert torch.equal(torch.stack(before), torch.stack(losses.appendix_b2(inputs.pred, inputs.repeated, None, errors)))


@pytest.mark.parametrize(
    ("latent", "ahead", "autograd", "one_pass"),
    [(SD, False, 10, 7), (SD, True, 8, 5), ("SDXL 1024 px", False, 10, 10), ("video 16 x 512 px", True, 8, 8)],
)
def test_the_byte_model(latent, ahead, autograd, one_pass):
    assert losses.transfers(Case(4, latent, ahead)) == (autograd, one_pass)


def test_inputs_take_turns_over_the_cache():
    class OnGpu(Machine):
        cache_bytes = 2**20

    case = Case(1, SD)
    sets = losses.input_sets(case, OnGpu(CPU, quick=False))
    assert (len(sets) - 1) * losses.set_bytes(case) < 2 * 2**20 <= len(sets) * losses.set_bytes(case)
    called = []
    call, calls = kernels.in_turn(MACHINE, called.append, sets, seconds=1e-9)
    assert calls == 1
    del called[:]
    for _ in range(len(sets) + 1):
        call()
    assert list(map(id, called)) == list(map(id, [*sets, sets[0]]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_that_of_the_tensors_and_nothing_else(layout):
    contiguous, case = make_inputs(Case(3, EMBEDDED), CPU, 2), Case(3, EMBEDDED, layout=layout)
    inputs = make_inputs(case, CPU, 2)
    for name, tensor in vars(inputs).items():
        if tensor is not None:
            assert torch.equal(tensor, getattr(contiguous, name))
            is_last = layout == LAYOUTS[2] or (layout == LAYOUTS[1] and name not in ("target", "repeated"))
            assert tensor.is_contiguous(memory_format=torch.channels_last if is_last else torch.contiguous_format)
    assert losses.set_bytes(case) == inputs.nbytes(("pred", "target", "repeated", "ref_pred", "scratch"))
    truth, (loss, grad) = Truth(case, inputs), by_autograd(case, inputs)
    assert max(truth.gaps(loss, grad).values()) < 1e-9
    for name, way in losses.ways(case, MACHINE, compiled=False).items():
        assert losses.is_right(name, case, way, inputs, truth)
    said = str(case).removeprefix("3 pairs, embedded 32 px, ref_pred")
    assert said == {LAYOUTS[0]: "", LAYOUTS[1]: ", channels_last predictions", LAYOUTS[2]: ", channels_last"}[layout]


def test_another_division_is_one_more_provider_on_a_gpu(monkeypatch):
    """The kernels use the named division while it runs, and their former one afterwards."""
    seen, gpu = [], torch.device("cuda", 0)

    def run(inputs, overwrite):
        seen.append({key: value for key, value in errors.division(4 * 64 * 64, gpu).items() if key != "CHUNKS"})

    monkeypatch.setattr(errors, "capability", lambda device: (9, 0))
    monkeypatch.setattr(losses, "_ours", run)
    assert losses.other_divisions(gpu) == ["16 warps"] and losses.OTHER_DIVISIONS == len(errors.DIVISIONS) - 1
    ways = losses.ways(Case(1, SD), Machine(gpu, False), compiled=False)
    assert list(ways)[-1] == f"{losses.ONE_PASS}, 16 warps"
    assert losses.transfers(Case(1, SD)) == (10, 7)
    for name in (losses.ONE_PASS, f"{losses.ONE_PASS}, 16 warps", losses.ONE_PASS):
        ways[name].run(None)
    eight, sixteen = ({"FOLDS": f, "LANES": n, "num_warps": w} for f, n, w in ((8, 2048, 8), (4, 4096, 16)))
    assert seen == [eight, sixteen, eight] and errors.CHOSEN == {}
    monkeypatch.setitem(errors.CHOSEN, (9, 0), "16 warps")
    assert losses.other_divisions(gpu) == ["8 warps"]


def test_on_a_cpu_there_is_one_division():
    assert losses.other_divisions(CPU) == []


GB = 10**9


@pytest.mark.parametrize(
    ("latent", "free", "fits", "graphs"),
    [
        ("SDXL 1024 px", 60 * GB, True, True),
        ("video 16 x 512 px", 141 * GB, True, False),  # needs 133 GB, and 227 with graphs
        ("video 16 x 512 px", 230 * GB, True, True),
        ("video 16 x 512 px", 130 * GB, False, False),
    ],
)
def test_graphs_are_made_where_memory_is_enough_for_their_calls_and_those_without(
    latent, free, fits, graphs, monkeypatch, capsys
):
    """Memory that a graph keeps is not available to the calls that are timed without it."""
    gpu, case, pool = Machine(torch.device("cuda"), quick=False), Case(8192, latent), object()
    monkeypatch.setattr(kernels, "free_bytes", lambda device: free)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: pool)
    assert (kernels.missing(case, gpu) is None) == fits
    assert kernels.graph_pool(case, gpu) is (pool if graphs else None)
    needed = (9 + 2 * 22) * case.elements / GB
    said = f"{case}: no CUDA graphs: {needed:.1f} GB are needed, {free / GB:.1f} GB are free\n"
    assert capsys.readouterr().out == ("" if graphs else said)
    assert kernels.graph_pool(case, MACHINE) is None


def test_a_wrong_gradient_gets_no_ratio(smallest, tmp_path, monkeypatch, capsys):
    right = losses.loss_and_grad

    def wrong(pred, *others, overwrite, **options):
        result, grad = right(pred, *others, overwrite=overwrite, **options)
        return result, grad if overwrite else grad * 1.5

    monkeypatch.setattr(losses, "loss_and_grad", wrong)
    code, rows = driven("kernels", tmp_path)
    assert code == 1
    for row in rows:
        assert row["value_ok"] == (row["ratio"] is not None) == (row["provider"] != losses.ONE_PASS)
    out = capsys.readouterr().out
    assert "1 pair, embedded 32 px, ref_pred, ours, loss_and_grad: the gradient is off by 0.5 " in out


def test_where_nothing_compiles_its_rows_are_left_out(smallest, tmp_path, monkeypatch, capsys):
    def broken(graph, inputs):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(losses, "COMPILER", broken)
    code, rows = driven("kernels", tmp_path)
    assert code == 0
    assert {row["provider"] for row in rows} & {losses.B2_COMPILED, losses.TWIN_COMPILED} == set()
    out = capsys.readouterr().out
    assert out.count("torch.compile does not work here") == 1 and "no C++ compiler" in out


def test_what_does_not_fit_is_left_out_and_said(smallest, tmp_path, monkeypatch, capsys):
    small, large = kernels.SIZES["quick"].cases
    needed = losses.set_bytes(large) + 26 * large.elements
    monkeypatch.setattr(kernels, "free_bytes", lambda device: needed - 1)
    monkeypatch.setattr(kernels, "compiles", lambda machine: False)
    code, rows = driven("kernels", tmp_path)
    assert code == 0
    assert {row["case"] for row in rows[1:]} == {str(small)}
    out, err = capsys.readouterr()
    assert f"{large}: left out: " in out and err == f"missing: {large}: 0.0 GB are needed, 0.0 GB are free\n"


def test_the_bytes_of_a_case_are_those_that_pytorch_takes():
    """They bound what each uncompiled provider needs besides its inputs, and are nearly reached; on fake tensors."""
    peaks = {}
    with FakeTensorMode():
        for ahead in (False, True):
            case = Case(64, SD, ahead)
            inputs = make_inputs(case, CPU, 0)
            held = torch.nn.ParameterDict({name: x for name, x in vars(inputs).items() if x is not None})
            for name, way in losses.ways(case, MACHINE, compiled=False).items():
                with _LiveBytes(held) as live:
                    way.run(inputs)
                peaks[name, ahead] = live.peak / case.elements
    assert max(peaks.values()) == pytest.approx(kernels._TEMPORARY_BYTES["cpu"], rel=0.01)
    assert peaks[losses.B2, False] + 2 == pytest.approx(kernels._TEMPORARY_BYTES["cuda"], rel=0.01)


def test_the_same_under_pytest_benchmark():
    pytest.importorskip("pytest_benchmark")
    words = [
        "-m",
        "pytest",
        "-q",
        "--benchmark-disable",
        "-k",
        "embedded and not compiled",
        "benchmarks/test_kernels.py",
    ]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "4 passed" in done.stdout


def test_sizes_name_known_latents():
    for size in kernels.SIZES.values():
        assert {case.latent for case in size.cases} <= set(LATENTS)
        assert len(set(map(str, size.cases))) == len(size.cases)
