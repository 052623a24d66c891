"""The speed measurements of `gpu_check`: the machine itself, and one headline figure per benchmark suite.

Each function is a step, as in `value_checks`. Cases, providers and value checks are those of the suites.
"""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version

import psutil  # type: ignore[import-untyped]
import torch

from benchmarks.checks.value_checks import SUITE, Found
from benchmarks.harness import cases as suites
from benchmarks.harness.cases import Shared
from benchmarks.harness.estimates import PICTURE
from benchmarks.harness.losses import SD, Case
from benchmarks.harness.measure import Bench, Machine, copy_limit
from benchmarks.harness.models import Workplace
from benchmarks.harness.rows import GENERATION, NAIVE, OURS, POLICY, SEPARATOR, Row
from benchmarks.suites import endtoend, kernels, sampling, step
from seppo_fast.utils.memory import host_bytes, page_locked

_PACKAGES = ("torch", "triton", "diffusers", "peft", "accelerate", "transformers", "xformers", "bitsandbytes")
_PINNED_BYTES = 2**30


def machine(place: Workplace, found: Found) -> None:
    """Describes the machine and measures its rates: a matrix product, a copy, and pinned host memory to device."""
    here = place.machine
    found.lines.append(f"{here.name}, {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    found.lines.append(", ".join(f"{name} {_version(name)}" for name in _PACKAGES))
    memory, disk = psutil.virtual_memory().available, shutil.disk_usage(place.folder).free
    found.lines.append(f"free: {memory / 1e9:.0f} GB of host memory, {disk / 1e9:.0f} GB of disk")
    if here.device.type == "cuda":
        gpu = torch.cuda.get_device_properties(here.device)
        free, total = torch.cuda.mem_get_info(here.device)
        found.lines.append(
            f"compute capability {gpu.major}.{gpu.minor}, {gpu.multi_processor_count} multiprocessors, "
            f"{free / 1e9:.0f} of {total / 1e9:.0f} GB free, CUDA {torch.version.cuda}"
        )
    matmul, copy = Bench(here, SUITE).limit_row, Bench(here, SUITE, copy_limit(here)).limit_row
    found.rows += [matmul, copy]
    assert matmul.p50_ms and copy.gb_per_s
    size = 8192 if here.device.type == "cuda" else 1024
    rate = 2 * size**3 / matmul.p50_ms / 1e9
    found.lines.append(f"matrix product: {rate:.3g} TFLOP/s, copy: {copy.gb_per_s:.4g} GB/s")
    if here.device.type == "cuda":
        found.rows.append(_pinned(here))
        found.lines.append(f"pinned host memory to the device: {found.rows[-1].gb_per_s:.3g} GB/s")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def _pinned(here: Machine) -> Row:
    source = page_locked(host_bytes(_PINNED_BYTES))
    target = torch.empty(_PINNED_BYTES, dtype=torch.uint8, device=here.device)
    target.copy_(source, non_blocking=True)
    here.synchronize()
    started = time.perf_counter()
    for _ in range(4):
        target.copy_(source, non_blocking=True)
    here.synchronize()
    seconds = (time.perf_counter() - started) / 4
    title = "pinned host memory to the device, 1024 MiB"
    return Row(SUITE, title, "copy", "copy", True, p50_ms=seconds * 1e3, gb_per_s=_PINNED_BYTES / seconds / 1e9)


def _run(cases: Sequence[suites.Case], found: Found) -> list[Row]:
    """Runs some cases of a suite and returns their rows.

    Raises:
        RuntimeError: a case produced no row.
    """
    outcome = suites.run_cases(cases)
    found.rows += outcome.rows
    found.lines += [f"{row.case}, {row.provider}: values WRONG" for row in outcome.rows if not row.value_ok]
    if outcome.missing:
        raise RuntimeError("; ".join(f"{title}: {reason}" for title, reason in outcome.missing.items()))
    return outcome.rows


def loss_rate(place: Workplace, found: Found) -> None:
    """Measures the loss kernels for every division of a latent: time (also in a CUDA graph), share of a copy's rate."""
    here = place.machine
    gpu = here.device.type == "cuda"
    wanted = [Case(1024, SD), Case(16, SD)] if gpu else list(kernels.SIZES["quick"].cases[:1])
    by_title = {case.title: case for case in suites.listed("kernels", here)}
    rows = _run([by_title[str(case)] for case in wanted], found)
    for row in rows:
        if row.provider.startswith(OURS):
            graph = "" if row.graph_p50_ms is None else f", {row.graph_p50_ms * 1e3:.1f} us in a graph"
            share = "" if row.limit_fraction is None else f", {row.limit_fraction:.0%} of a copy"
            found.lines.append(f"{row.case}, {row.provider}: {(row.p50_ms or 0) * 1e3:.1f} us{graph}{share}")


def sampling_rate(place: Workplace, found: Found) -> None:
    """Measures guided samples per second and MFU, compared with diffusers' own pipeline."""
    here = place.machine
    sizes = [sampling.Case(16, 20, 2)] if here.device.type == "cuda" else list(sampling.SIZES["quick"][-1:])
    bench, shared = Shared(lambda _: Bench(here, "sampling")), _shared(place)
    rows = _run(sampling.cases_of(bench, sampling.shared_samplers(shared, sizes, PICTURE), sizes, PICTURE), found)
    _tell(rows, "samples", found)


def learning_rate_of_pairs(place: Workplace, found: Found) -> None:
    """Measures pairs per second in a LoRA training step, reference errors ahead, against the Diffusion-DPO script."""
    here = place.machine
    size = replace(step.SIZES[here.size], ways=("ahead",))
    size = replace(size, pairs={"lora": (16,)}) if here.device.type == "cuda" else size
    bench, shared = Shared(lambda _: Bench(here, "step")), _shared(place)
    right = {"lora": step.shared_right(shared, size, "lora")}
    size = replace(size, pairs={"lora": size.pairs["lora"][:1]})
    _tell(_run(step.cases_of(bench, shared, size, right), found), "pairs", found)


def whole_updates(place: Workplace, found: Found) -> None:
    """Measures whole updates in exact mode, compared with the naive loop."""
    here = place.machine
    size = endtoend.SIZES[here.size][0]
    checked = endtoend.CHECKED
    if here.device.type == "cuda":
        size = endtoend.Size(pairs=32, naive_pairs=2, rounds=1, compiled=False)
    bench, shared = Shared(lambda _: Bench(here, "endtoend")), _shared(place)
    right = {False: endtoend.shared_right(shared, False, checked)}
    rows = _run(endtoend.cases_of(bench, shared, size, right), found)
    _tell([row for row in rows if SEPARATOR not in row.case], "pairs", found)
    phases = {row.case.rpartition(SEPARATOR)[2]: row for row in rows if row.provider == OURS and SEPARATOR in row.case}
    shown = ", ".join(f"{name} {phases[name].share_of_step:.0%}" for name in (GENERATION, POLICY) if name in phases)
    found.lines.append(f"of ours: {shown}; the baseline is the {NAIVE}")


def _shared(place: Workplace) -> Shared[Workplace]:
    return Shared(lambda _: place)


def _tell(rows: Sequence[Row], what: str, found: Found) -> None:
    for row in rows:
        ratio = "" if row.ratio is None else f", {row.ratio:.2f} x"
        share = "" if row.limit_fraction is None else f", {row.limit_fraction:.0%} of {row.limit}"
        mfu = "" if row.mfu is None else f", MFU {row.mfu:.0%}"
        found.lines.append(f"{row.case}, {row.provider}: {row.pairs_per_s or 0:.3g} {what}/s{ratio}{share}{mfu}")
