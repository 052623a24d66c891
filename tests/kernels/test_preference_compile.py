"""The machine code of the loss's kernels, compiled for GPUs that are not present, from arguments of real launches."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from unittest import mock

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget

import seppo_fast.kernels.denoising_error as errors
import seppo_fast.kernels.preference as preference
from seppo_fast.kernels.eager import LossForm
from tests.kernels.offline import Code, compiled

CAPABILITIES = (80, 90, 100)
PAIRS = 1000  # enough for the means to use their widest blocks; memory that is never touched costs nothing
ONE_CHUNK, CHUNKS = 4 * 64 * 64, 4 * 128 * 128  # SD-1.5 and SDXL
FORM = LossForm(2000.0, -1.0, 0.0)
OPTIONS = LossForm(2000.0, -1.0, 0.0, sft_weight=4.0, safeguard=0.9)


def _latents(dtype, size=ONE_CHUNK, shared=True, target_dtype=None):
    pred = torch.empty(2 * PAIRS, size, dtype=dtype)
    return pred, torch.empty(PAIRS if shared else 2 * PAIRS, size, dtype=target_dtype or dtype), torch.empty_like(pred)


def _at_once(dtype, form=FORM, **options):
    pred, target, ref_pred = _latents(dtype, **options)
    preference.loss_and_grad(pred, target, ref_pred, None, None, form, 1.0, None)


def _at_once_from_errors(dtype):
    pred, target, _ = _latents(dtype)
    inputs = (pred, target, None, torch.empty(2 * PAIRS), torch.empty(PAIRS))
    preference.loss_and_grad(*inputs, FORM, torch.empty(()), None)


def _at_once_from_contiguous_target(dtype):
    """Predictions are channels_last, so a contiguous target arrives with its dims permuted to that order."""
    pred, target, ref_pred = _latents(dtype)
    ordered = target.view(PAIRS, 4, 64, 64).permute(0, 2, 3, 1)
    preference.loss_and_grad(pred, ordered, ref_pred, None, None, FORM, 1.0, None)


def _forward(dtype, form=FORM, **options):
    pred, target, ref_pred = _latents(dtype, **options)
    preference.forward(pred, target, ref_pred, None, None, form)


def _gradient(dtype):
    pred, target, grad = _latents(dtype)
    errors.write_gradient(pred, target, torch.empty(2 * PAIRS), torch.empty(()), grad)


def _errors(dtype):
    errors.denoising_errors(*_latents(dtype, shared=False)[:2])


@dataclass(frozen=True)
class Case:
    """A launch and what its machine code should contain.

    Attributes:
        call: a function that makes the launch, for latents of a dtype.
        loaded: the number of latents that the program of a chunk loads, by the byte model.
        stored: the number of latents that it stores.
        numbers: the number of 4-byte loads outside the means: factors, reference errors, weights.
        results: the number of 4-byte stores: loss, four rates, ticket, a logit, and errors and coefficients of both
            halves.
        registers: the most registers allowed per thread, in programs of 8 warps.
    """

    call: Callable[[torch.dtype], None]
    loaded: int
    stored: int
    numbers: int
    results: int
    registers: int


CASES = {
    # A thread keeps 8 elements x 8 folds x 2 halves of residuals; one program of 256 threads fills a multiprocessor.
    "at once, shared": Case(_at_once, 5, 2, 0, 13, 224),
    "at once, separate": Case(lambda dtype: _at_once(dtype, shared=False), 6, 2, 0, 13, 224),
    "at once, ref_error": Case(_at_once_from_errors, 3, 2, 4, 11, 224),
    # Few enough registers for at least two programs at a time.
    "forward": Case(_forward, 5, 0, 0, 13, 96),
    "forward, chunks": Case(lambda dtype: _forward(dtype, size=CHUNKS), 5, 0, 0, 13, 96),
    "at once, options": Case(lambda dtype: _at_once(dtype, OPTIONS), 5, 2, 0, 13, 240),
    "forward, options, chunks": Case(lambda dtype: _forward(dtype, OPTIONS, size=CHUNKS), 5, 0, 0, 13, 96),
    # For at least four programs at a time.
    "gradient": Case(_gradient, 3, 2, 3, 0, 64),
    "errors": Case(_errors, 2, 0, 0, 1, 64),
}
# float16 code differs from bfloat16 code only in the conversions, so the three most demanding cases are enough.
COMPILED = [(torch.bfloat16, case) for case in CASES] + [
    (torch.float16, case) for case in ("at once, shared", "at once, ref_error", "gradient")
]


@pytest.mark.parametrize("division", errors.DIVISIONS)
def test_largest_chunk_is_a_latent_of_sd15(division):
    lanes, folds = errors.DIVISIONS[division]
    assert lanes * folds == ONE_CHUNK


@cache
def _code(capability: int, case: str, dtype: torch.dtype, division: str = errors.DEFAULT) -> Code:
    with mock.patch.dict(errors.CHOSEN, {None: division}):  # the key is None because the tensors are on a CPU
        (code,) = compiled(GPUTarget("cuda", capability, 32), lambda: CASES[case].call(dtype))
    return code


def _no_memory_of_its_own(code: Code) -> bool:
    """Returns whether no register is spilled and nothing else is kept on a stack."""
    return code.usage["STACK"] == code.usage["LOCAL"] == 0 and not code.count("LDL") and not code.count("STL")


@pytest.mark.parametrize(("dtype", "case"), COMPILED, ids=str)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_no_spills_and_few_registers(capability, dtype, case):
    code = _code(capability, case, dtype)
    assert f".target sm_{capability}" in code.ptx
    assert _no_memory_of_its_own(code)
    assert code.usage["REG"] <= CASES[case].registers


@pytest.mark.parametrize("case", [case for case in CASES if "options" not in case])
@pytest.mark.parametrize("capability", CAPABILITIES[:2])
def test_sixteen_warps_do_not_spill_and_keep_the_byte_model(capability, case):
    """512 threads share 65,536 registers.

    Excluded because some bytes do spill there: sm_100 (in the `at once` cases), and options in chunks (on sm_90).
    """
    code = _code(capability, case, torch.bfloat16, "16 warps")
    assert code.kernel.metadata.num_warps == 16
    assert _no_memory_of_its_own(code)
    assert code.usage["REG"] <= 128
    _check_traffic(code, case, torch.bfloat16)


def _check_traffic(code: Code, case: str, dtype: torch.dtype) -> None:
    """Checks that latents move 16 bytes at a time and once each, as test_traffic_interpreter.py counts for elements."""
    expected = CASES[case]
    at_a_time = 8 * dtype.itemsize // 16  # instructions for a thread's eight elements of a fold
    loads, stores = code.count("LDG"), code.count("STG")
    # The loop over the folds is unrolled by a divisor of their number.
    unrolled, rest = divmod(loads[".E.128"], expected.loaded * at_a_time)
    assert rest == 0 and unrolled > 0 and code.folds % unrolled == 0
    assert unrolled == code.folds or not expected.stored
    assert stores[".E.128"] == expected.stored * at_a_time * code.folds
    # All other accesses are of single numbers: no latent is moved with another width.
    assert loads[".E"] == expected.numbers
    assert set(loads) <= {".E.128", ".E", ".E.STRONG.GPU", ".E.U8.STRONG.GPU", ".E.64.STRONG.GPU"}
    assert stores[".E"] == expected.results
    assert set(stores) <= {".E.128", ".E", ".E.U8", ".E.64"}
    assert stores[".E.64"] == (6 + ("options" in case) if case.endswith("chunks") else 0)  # partial sums


@pytest.mark.parametrize(("dtype", "case"), COMPILED, ids=str)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_latents_go_16_bytes_at_a_time_and_as_often_as_the_byte_model_says(capability, dtype, case):
    _check_traffic(_code(capability, case, dtype), case, dtype)


@pytest.mark.parametrize("case", ["at once, shared", "gradient"])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_float32_keeps_the_byte_model_and_shows_its_spills(capability, case, record_property):
    code = _code(capability, case, torch.float32)
    _check_traffic(code, case, torch.float32)
    print(f"sm_{capability} {case}: {code.usage['REG']} registers, {code.usage['STACK']} bytes of stack")
    record_property("stack", code.usage["STACK"])


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith(("at once", "forward"))])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_last_program_is_found_by_one_integer(capability, case):
    code = _code(capability, case, torch.bfloat16)
    assert re.findall(r"\b(?:atom|red)\.global\S*", code.ptx) in (
        ["atom.global.gpu.acq_rel.add.u32"],
        ["atom.global.gpu.acq_rel.add.s32"],
    )
    assert list(code.count("ATOMG")) == [".E.ADD.STRONG.GPU"]
    assert not code.count("RED") and not code.count("ATOM")
    # A barrier and a fence separate the program's last store from the ticket, a barrier the ticket from the means.
    ticket = code.operations.index("ATOMG.E.ADD.STRONG.GPU")
    places = {
        name: [place for place, x in enumerate(code.operations) if x.startswith(name)]
        for name in ("STG", "LDG", "BAR.SYNC", "MEMBAR")
    }
    last_store = max(place for place in places["STG"] if place < ticket)
    first_load = min(place for place in places["LDG"] if place > ticket)
    assert any(last_store < place < ticket for place in places["BAR.SYNC"])
    assert any(last_store < place < ticket for place in places["MEMBAR"])
    assert any(ticket < place < first_load for place in places["BAR.SYNC"])


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_products_and_sums_of_latents_are_not_contracted(capability):
    """Otherwise an error's bits could depend on the kernel that computes it."""
    if capability == 100 and triton.__version__ < "3.7":
        pytest.skip("its ptxas (CUDA 12.9) contracts packed products and sums of two floats despite the option not to")
    contracted = {case: sum(_code(capability, case, torch.bfloat16).count("FFMA").values()) for case in CASES}
    # A pair's exponential, logarithm and divisions contain some; operations repeated for all eight elements have none.
    assert contracted["forward"] == contracted["at once, shared"] == contracted["at once, separate"]
    assert contracted["errors"] <= 1
    assert contracted["gradient"] == 0
    assert not any(_code(capability, case, torch.bfloat16).count("FFMA2") for case in CASES)


@pytest.mark.parametrize("capability", CAPABILITIES[1:])
@pytest.mark.parametrize(
    "call",
    [
        lambda: _at_once(torch.bfloat16, target_dtype=torch.float32),
        lambda: _at_once_from_contiguous_target(torch.bfloat16),
    ],
    ids=["float32 target", "target in another memory format"],
)
def test_no_spills_whatever_the_target_is(capability, call):
    (code,) = compiled(GPUTarget("cuda", capability, 32), call)
    assert _no_memory_of_its_own(code)
    assert code.count("LDG")[".E.128"] >= 4 * code.folds  # the predictions
    assert code.count("STG")[".E.128"] == 2 * code.folds


@pytest.mark.parametrize(
    "call", [_at_once, lambda dtype: _forward(dtype, size=CHUNKS), _gradient], ids=["at once", "forward", "gradient"]
)
def test_amd(call):
    (code,) = compiled(GPUTarget("hip", "gfx942", 64), lambda: call(torch.bfloat16))
    text = code.kernel.asm["amdgcn"]
    for kept in ("private_segment_fixed_size", "vgpr_spill_count", "sgpr_spill_count"):
        assert re.findall(rf"{kept}:\s*(\d+)", text) == ["0"]
    assert not re.search(r"\bscratch_(load|store)", text)
    # A wavefront has 64 threads instead of 32, so a thread has four elements of a fold: 8 bytes.
    assert re.search(r"\b(buffer|global)_load_dwordx2\b", text)
    assert not re.search(r"\b(buffer|global)_(load|store)_(short|ushort)", text)
    assert len(code.kernel.asm["hsaco"]) > 0
