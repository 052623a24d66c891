"""How time is taken: the providers of a case in turn, in one process, the device synchronised around each call."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness.provenance import device_name
from benchmarks.harness.rows import Row, with_ratios

T = TypeVar("T")

# Nominal dense bf16 peak in FLOP/s, by what the device's name holds; NVIDIA's data sheets.
_NOMINAL = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
_LIMIT_ROUNDS = 20
_COPIED_BYTES = 2**30  # on a GPU: many times its L2 cache
_COPIES = 4  # in a call, so that on a GPU the two waits for the host are under 1 % of it


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
        """The GPU's, or the number of threads of the CPU."""
        return device_name(self.device)

    @property
    def precision(self) -> str:
        """In which training is timed: `bf16` on a GPU, `fp32` on a CPU."""
        return "bf16" if self.device.type == "cuda" else "fp32"

    @property
    def cache_bytes(self) -> int:
        """Of the GPU's L2 cache; for a CPU, which does not say, 32 MiB."""
        gpu = self.device.type == "cuda"
        return torch.cuda.get_device_properties(self.device).L2_cache_size if gpu else 2**25

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
        call: does it, once or some times.
        units: that a call makes.
        pairs: samples or pairs of a unit.
        replay: does it from a CUDA graph; None where there is none.
        replayed: units of a replay.
        flops: of a call, counted; None: not counted.
        moved_bytes: of a unit, read and written, by a model that stands beside the code; None: there is none.
        value_ok: whether its values were found right.
        launches: see `Row`.
        host_syncs: see `Row`.
        peak_bytes: see `Row`.
    """

    name: str
    call: Callable[[], object]
    units: int
    pairs: int = 1
    replay: Callable[[], object] | None = None
    replayed: int = 1
    flops: float | None = None
    moved_bytes: float | None = None
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


@dataclass(frozen=True)
class Limit:
    """What the device does at best; rates of the providers are given as shares of it.

    Attributes:
        name: `matmul` or `copy`.
        case: of its row.
        call: does it `units` times.
        work: of a call: FLOP, or bytes that are read and written.
        units: that a call makes.
    """

    name: str
    case: str
    call: Callable[[], object]
    work: float
    units: int = 1


def matmul_limit(machine: Machine) -> Limit:
    """A plain matrix product, in bfloat16 on a GPU."""
    gpu = machine.device.type == "cuda"
    size, dtype, name = (8192, torch.bfloat16, "bf16") if gpu else (1024, torch.float32, "fp32")
    one, other = (torch.randn(size, size, device=machine.device).to(dtype) for _ in range(2))
    return Limit("matmul", f"{name} {size} cubed", lambda: one @ other, 2.0 * size**3)


def copy_limit(machine: Machine) -> Limit:
    """A plain copy of random numbers within the device's memory, some times a call."""
    size = _COPIED_BYTES if machine.device.type == "cuda" else 2 * machine.cache_bytes
    source = torch.randn(size // 4, device=machine.device)
    copied = torch.empty_like(source)

    def call() -> None:
        for _ in range(_COPIES):
            copied.copy_(source)

    return Limit("copy", f"{size / 2**20:.0f} MiB", call, 2.0 * size * _COPIES, _COPIES)


class Bench:
    """Times the cases of a suite, and beside them a limit, with whose rate `limit_fraction` compares.

    Args:
        machine: where.
        suite: of the rows.
        limit: what providers are bound by; None: a matrix product.

    Attributes:
        limit_row: the limit's own row.
    """

    def __init__(self, machine: Machine, suite: str, limit: Limit | None = None) -> None:
        self.machine = machine
        self._suite = suite
        self._limit = matmul_limit(machine) if limit is None else limit
        self._limit_seconds: list[float] = []
        name, call, work, units = self._limit.name, self._limit.call, self._limit.work, self._limit.units
        provider = (
            Provider(name, call, units, flops=work)
            if name == "matmul"
            else Provider(name, call, units, moved_bytes=work / units)
        )
        self.measure_limit(1)
        self.measure_limit(_LIMIT_ROUNDS)
        (self.limit_row,) = with_ratios([self.row(self._limit.case, provider, name, self._limit_seconds)])

    def measure_limit(self, rounds: int) -> None:
        """Takes the limit's rate anew: other work on the machine, or its clock, may have changed it."""
        (self._limit_seconds,) = interleaved(self.machine, [self._limit.call], rounds)

    def case(self, case: str, providers: Sequence[Provider], rounds: int) -> list[Row]:
        """Returns the rows of one case: its providers' calls, which have run once, are timed, then their graphs.

        The first provider is the baseline.
        """
        calls = [self._limit.call, *(provider.call for provider in providers)]
        self._limit_seconds, *seconds = interleaved(self.machine, calls, rounds)
        replays = {provider.name: provider.replay for provider in providers if provider.replay is not None}
        graphs = dict(zip(replays, interleaved(self.machine, list(replays.values()), rounds), strict=True))
        rows = [
            self.row(case, provider, providers[0].name, taken, graphs.get(provider.name))
            for provider, taken in zip(providers, seconds, strict=True)
        ]
        return with_ratios(rows)

    def row(
        self,
        case: str,
        provider: Provider,
        baseline: str,
        seconds: Sequence[float],
        graph_seconds: Sequence[float] | None = None,
    ) -> Row:
        """A provider's row from the seconds of its calls and of its graph's replays; `ratio` is not known yet.

        Bytes a second are those of the graph, where there is one: the device's own, without the host's.
        """
        fast, middle, slow = (float(value) for value in np.quantile(seconds, (0.2, 0.5, 0.8)) / provider.units)
        graph = None if graph_seconds is None else float(np.median(graph_seconds)) / provider.replayed
        flops = None if provider.flops is None else provider.flops / provider.units / middle
        moved = None if provider.moved_bytes is None else provider.moved_bytes / (graph or middle)
        rate = {"matmul": flops, "copy": moved}[self._limit.name]
        best = self._limit.work / float(np.median(self._limit_seconds))
        peak = self.machine.nominal_peak()
        return Row(
            suite=self._suite,
            case=case,
            provider=provider.name,
            baseline=baseline,
            value_ok=provider.value_ok,
            p20_ms=fast * 1e3,
            p50_ms=middle * 1e3,
            p80_ms=slow * 1e3,
            graph_p50_ms=None if graph is None else graph * 1e3,
            launches=provider.launches,
            host_syncs=provider.host_syncs,
            peak_allocated_bytes=provider.peak_bytes,
            limit=None if rate is None else self._limit.name,
            limit_fraction=None if rate is None else rate / best,
            mfu=None if flops is None or peak is None else flops / peak,
            pairs_per_s=provider.pairs / middle,
            gb_per_s=None if moved is None else moved / 1e9,
        )


def captured(
    what: str, run: Callable[[T], object], sets: Sequence[T], count: int, pool: Any
) -> Callable[[], None] | None:
    """Replays `count` runs, on one set of inputs after another; None, and a line, where they cannot be captured.

    Args:
        what: for that line.
        run: of a set of inputs; it has run before.
        sets: the result of each is kept until its next turn, so that results too take turns in memory.
        count: runs in the graph.
        pool: `torch.cuda.graph_pool_handle()`, which graphs that are never replayed at once may share.
    """
    graph = torch.cuda.CUDAGraph()
    results: list[object] = [None] * len(sets)
    try:
        # The outer block gives the stream back where the inner one fails.
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, pool=pool):
            for turn in range(count):
                results[turn % len(sets)] = None
                results[turn % len(sets)] = run(sets[turn % len(sets)])
    except RuntimeError as error:
        print(f"{what}: no CUDA graph, {str(error).splitlines()[0]}")
        return None
    graph.replay()  # the first also brings it to the device
    return graph.replay


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
