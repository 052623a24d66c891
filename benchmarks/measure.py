"""How time is taken: the providers of a case in turn, in one process, the device synchronised around each call."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.rows import Row, with_ratios

# Nominal dense bf16 peak in FLOP/s, by what the device's name holds; NVIDIA's data sheets.
_NOMINAL = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
_MATMUL_ROUNDS = 20


@dataclass(frozen=True)
class Machine:
    """Where a suite runs.

    Attributes:
        device: of all providers.
        quick: whether only to show that everything works: a CPU, seconds.
    """

    device: torch.device
    quick: bool

    @property
    def size(self) -> str:
        """The row of a suite's table of sizes: `quick`, `cpu` or `gpu`."""
        return "quick" if self.quick else ("gpu" if self.device.type == "cuda" else "cpu")

    @property
    def name(self) -> str:
        """Of the GPU, or the number of threads of the CPU."""
        gpu = self.device.type == "cuda"
        return torch.cuda.get_device_name(self.device) if gpu else f"CPU, {torch.get_num_threads()} threads"

    @property
    def precision(self) -> str:
        """In which training is timed: `bf16` on a GPU, `fp32` on a CPU."""
        return "bf16" if self.device.type == "cuda" else "fp32"

    def nominal_peak(self) -> float | None:
        """FLOP/s of the data sheet; None for a device that is not in the table."""
        return next((peak for part, peak in _NOMINAL.items() if part in self.name), None)

    def synchronize(self) -> None:
        """Waits until the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class Provider:
    """One of the ways to do what a case asks for.

    Attributes:
        name: in the row.
        call: does it once.
        units: samples or pairs that a call makes.
        flops: of a call, counted; None: not counted.
        value_ok: whether its values were found to agree with the baseline's.
        launches: see `Row`.
        host_syncs: see `Row`.
        peak_bytes: see `Row`.
    """

    name: str
    call: Callable[[], object]
    units: int
    flops: float | None = None
    value_ok: bool = True
    launches: float | None = None
    host_syncs: float | None = None
    peak_bytes: int | None = None


def interleaved(machine: Machine, calls: Sequence[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Seconds of each call in each round, the calls in turn within a round: A B A B. Each must have run before."""
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, taken in zip(calls, seconds, strict=True):
            machine.synchronize()
            started = time.perf_counter()
            call()
            machine.synchronize()
            taken.append(time.perf_counter() - started)
    return seconds


class Bench:
    """Times the cases of a suite, and beside them a plain matrix product, whose rate `limit_fraction` compares with.

    Args:
        machine: where.
        suite: of the rows.

    Attributes:
        rows: of all cases so far; the first is that of the matrix product.
    """

    def __init__(self, machine: Machine, suite: str) -> None:
        self.machine = machine
        self._suite = suite
        gpu = machine.device.type == "cuda"
        size, dtype, name = (8192, torch.bfloat16, "bf16") if gpu else (1024, torch.float32, "fp32")
        self._factors = [torch.randn(size, size, device=machine.device).to(dtype) for _ in range(2)]
        self._matmul_flops = 2.0 * size**3
        self._matmul_seconds: list[float] = []
        provider = Provider("matmul", self._multiply, units=1, flops=self._matmul_flops)
        self.measure_matmul(1)
        self.measure_matmul(_MATMUL_ROUNDS)
        seconds = self._matmul_seconds
        self.rows = with_ratios([self.row(f"{name} {size} cubed", provider, provider.name, seconds)])

    def measure_matmul(self, rounds: int) -> None:
        """Takes the matrix rate anew: other work on the machine, or its clock, may have changed it."""
        (self._matmul_seconds,) = interleaved(self.machine, [self._multiply], rounds)

    def case(self, case: str, providers: Sequence[Provider], rounds: int) -> None:
        """Times the providers of one case, whose calls have run once; the first is the baseline."""
        calls = [self._multiply, *(provider.call for provider in providers)]
        self._matmul_seconds, *seconds = interleaved(self.machine, calls, rounds)
        rows = [
            self.row(case, provider, providers[0].name, taken)
            for provider, taken in zip(providers, seconds, strict=True)
        ]
        self.rows += with_ratios(rows)

    def row(self, case: str, provider: Provider, baseline: str, seconds: Sequence[float]) -> Row:
        """A provider's row from the seconds of its calls; `ratio` is not known yet."""
        fast, middle, slow = (float(value) for value in np.quantile(seconds, (0.2, 0.5, 0.8)))
        rate = None if provider.flops is None else provider.flops / middle
        matmul = self._matmul_flops / float(np.median(self._matmul_seconds))
        peak = self.machine.nominal_peak()
        to_ms = 1e3 / provider.units
        return Row(
            suite=self._suite,
            case=case,
            provider=provider.name,
            baseline=baseline,
            value_ok=provider.value_ok,
            p20_ms=fast * to_ms,
            p50_ms=middle * to_ms,
            p80_ms=slow * to_ms,
            launches=provider.launches,
            host_syncs=provider.host_syncs,
            peak_allocated_bytes=provider.peak_bytes,
            limit=None if rate is None else "matmul",
            limit_fraction=None if rate is None else rate / matmul,
            mfu=None if rate is None or peak is None else rate / peak,
            pairs_per_s=provider.units / middle,
        )

    def _multiply(self) -> Tensor:
        return self._factors[0] @ self._factors[1]


class Stopwatch:
    """Seconds by phase; the device is synchronised at the end of each, so phases never overlap.

    Args:
        machine: whose device.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.seconds: dict[str, float] = {}

    def now(self) -> float:
        """Seconds, once the device has done all that it was given."""
        self._machine.synchronize()
        return time.perf_counter()

    def add(self, phase: str, seconds: float) -> None:
        """Adds time to a phase."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the block's time to the phase."""
        started = time.perf_counter()
        yield
        self.add(name, self.now() - started)


def distance(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Relative RMS distance `||actual - expected|| / ||expected||` over all tensors together, in float64.

    A value that is not finite counts as infinitely far.
    """
    pairs = [(a.detach().double().cpu(), e.detach().double().cpu()) for a, e in zip(actual, expected, strict=True)]
    apart = sum(float((a - e).square().sum()) for a, e in pairs)
    whole = sum(float(e.square().sum()) for _, e in pairs)
    relative = (apart / whole) ** 0.5 if whole else float(apart > 0)
    return relative if np.isfinite(relative) else float("inf")


def agrees(what: str, actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> bool:
    """Whether `distance` is within the tolerance; where it is not, a line says so."""
    far = distance(actual, expected)
    if far > tolerance:
        print(f"{what}: values differ from the baseline's by {far:.3g} (relative RMS); {tolerance:.3g} is allowed")
    return far <= tolerance
