"""Times the providers of a case in turn, in one process, with the device synchronised around each call."""

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

# Nominal dense bf16 peak in FLOP/s by a part of the device's name, from NVIDIA's data sheets.
_NOMINAL = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
_LIMIT_ROUNDS = 20
_COPIED_BYTES = 2**30  # on a GPU: many times its L2 cache
_COPIES = 4  # copies per call, so that on a GPU its two synchronizations take under 1 % of its time


@dataclass(frozen=True)
class Machine:
    """The machine that a suite runs on.

    Attributes:
        device: the device of all providers.
        quick: whether to run only for seconds on a CPU, to show that everything works.
    """

    device: torch.device
    quick: bool

    @property
    def size(self) -> str:
        """The key for a suite's table of sizes: `quick`, `cpu` or `gpu`."""
        return "quick" if self.quick else ("gpu" if self.device.type == "cuda" else "cpu")

    @property
    def name(self) -> str:
        """The GPU's name, or the CPU's number of threads."""
        return device_name(self.device)

    @property
    def precision(self) -> str:
        """The precision in which training is timed: `bf16` on a GPU, `fp32` on a CPU."""
        return "bf16" if self.device.type == "cuda" else "fp32"

    @property
    def cache_bytes(self) -> int:
        """The size of the GPU's L2 cache; 32 MiB for a CPU, whose cache size is not known."""
        gpu = self.device.type == "cuda"
        return torch.cuda.get_device_properties(self.device).L2_cache_size if gpu else 2**25

    def nominal_peak(self) -> float | None:
        """Returns the data sheet's FLOP/s; None for a device that is not in the table."""
        return next((peak for part, peak in _NOMINAL.items() if part in self.name), None)

    def synchronize(self) -> None:
        """Waits until the device has finished all work submitted to it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class Provider:
    """One of the implementations that a case compares.

    Attributes:
        name: its name in the row.
        call: does the work once or several times.
        units: units of work per call.
        pairs: samples or pairs per unit.
        replay: does the work from a CUDA graph; None: it has no graph.
        replayed: units of work per replay.
        flops: counted FLOP per call; None: not counted.
        moved_bytes: bytes read and written per unit, by a documented byte model; None: no model applies.
        value_ok: whether its values were found to be right.
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
    """Returns the seconds of each call in each round; the calls alternate: A B A B. Each must have run before."""
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
    """An operation whose rate is taken as the device's best; providers' rates are reported as fractions of it.

    Attributes:
        name: `matmul` or `copy`.
        case: the case in its row.
        call: runs the operation `units` times.
        work: work per call: FLOP, or bytes read and written.
        units: units of work per call.
    """

    name: str
    case: str
    call: Callable[[], object]
    work: float
    units: int = 1


def matmul_limit(machine: Machine) -> Limit:
    """Returns the limit of a plain matrix product, in bfloat16 on a GPU and in float32 on a CPU."""
    gpu = machine.device.type == "cuda"
    size, dtype, name = (8192, torch.bfloat16, "bf16") if gpu else (1024, torch.float32, "fp32")
    one, other = (torch.randn(size, size, device=machine.device).to(dtype) for _ in range(2))
    return Limit("matmul", f"{name} {size} cubed", lambda: one @ other, 2.0 * size**3)


def copy_limit(machine: Machine) -> Limit:
    """Returns the limit of copying random numbers within the device's memory, several times per call."""
    size = _COPIED_BYTES if machine.device.type == "cuda" else 2 * machine.cache_bytes
    source = torch.randn(size // 4, device=machine.device)
    copied = torch.empty_like(source)

    def call() -> None:
        for _ in range(_COPIES):
            copied.copy_(source)

    return Limit("copy", f"{size / 2**20:.0f} MiB", call, 2.0 * size * _COPIES, _COPIES)


class Bench:
    """Times the cases of a suite, and with them a limit, to whose rate `limit_fraction` is relative.

    Args:
        machine: the machine that it runs on.
        suite: the suite's name in the rows.
        limit: what bounds the providers; None: a matrix product.

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
        """Measures the limit's rate again, since other work on the machine or its clock may have changed it."""
        (self._limit_seconds,) = interleaved(self.machine, [self._limit.call], rounds)

    def case(self, case: str, providers: Sequence[Provider], rounds: int) -> list[Row]:
        """Times the providers' calls, each of which must have run before, then their graphs; returns the case's rows.

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
        """Returns a provider's row from the seconds of its calls and of its graph's replays; `ratio` is not set yet.

        `gb_per_s` is that of the graph, if there is one: the device's own rate, without the host's time.
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
    """Captures `count` runs, cycling through sets of inputs, in a CUDA graph and returns its replay.

    If they cannot be captured, prints why and returns None.

    Args:
        what: name to print in that case.
        run: does the work on a set of inputs; it must have run before.
        sets: sets of inputs. The result of each is kept until its next turn, so results cycle through memory too.
        count: number of runs in the graph.
        pool: `torch.cuda.graph_pool_handle()`, which graphs that are never replayed at the same time may share.
    """
    graph = torch.cuda.CUDAGraph()
    results: list[object] = [None] * len(sets)
    try:
        # The outer block restores the stream if the inner one fails.
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, pool=pool):
            for turn in range(count):
                results[turn % len(sets)] = None
                results[turn % len(sets)] = run(sets[turn % len(sets)])
    except RuntimeError as error:
        print(f"{what}: no CUDA graph: {str(error).splitlines()[0]}")
        return None
    graph.replay()  # the first replay also uploads the graph to the device
    return graph.replay


class Stopwatch:
    """Measures the seconds of phases. The device is synchronised at the end of each, so phases never overlap.

    Args:
        machine: the machine whose device is synchronised.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.seconds: dict[str, float] = {}

    def now(self) -> float:
        """Waits for the device, then returns the time in seconds."""
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
    """Returns the relative RMS distance `||actual - expected|| / ||expected||` over all tensors, in float64.

    A non-finite value makes the distance infinite.
    """
    pairs = [(a.detach().double().cpu(), e.detach().double().cpu()) for a, e in zip(actual, expected, strict=True)]
    apart = sum(float((a - e).square().sum()) for a, e in pairs)
    whole = sum(float(e.square().sum()) for _, e in pairs)
    relative = (apart / whole) ** 0.5 if whole else float(apart > 0)
    return relative if np.isfinite(relative) else float("inf")


def agrees(what: str, actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> bool:
    """Returns whether `distance` is within the tolerance; if not, prints a line."""
    far = distance(actual, expected)
    if far > tolerance:
        print(f"{what}: values differ from the baseline's by {far:.3g} (relative RMS); {tolerance:.3g} is allowed")
    return far <= tolerance
