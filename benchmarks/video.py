"""Suite `video`: clips of AnimateDiff. Sampling, a training step and whole updates, and attention over frames.

The first three are the suites `sampling`, `step` and `endtoend` on a UNet with motion modules, where their providers
and what must agree are written; a sample is a clip. The baselines are diffusers' AnimateDiff pipeline and the naive
loop around it, both told AnimateDiff's linear schedule by themselves. `temporal` makes the rest of the rows.

On a GPU it is SD-1.5's architecture with motion modules in the shape of v1-5-2, 1312.7 M random parameters together, at
16 x 256 x 256 and 16 x 512 x 512; without one the embedded pipeline and a small random adapter at 8 x 32 x 32. Values
in float32 are compared at the smaller size, and as they are timed at each. At 512 px a step recomputes activations, in
all providers: else a pair takes 65 GB.

What it costs, counted: a forward is 4.11 TFLOP at 256 px and 17.7 at 512, forward and backward of a LoRA 8.30 and 37.4.
Times the number of calls that is 12 PFLOP in bfloat16 for sampling, 9 for steps, 12 for updates, and 1.6 in float32. At
200 and 35 TFLOP/s an H200 takes three and a half minutes. Writing and loading models may take another three, attention
over frames two: about eight and a half in all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks import endtoend, sampling, step, temporal
from benchmarks.measure import Bench, Machine
from benchmarks.models import Workplace, workplace
from benchmarks.rows import Row
from seppo_fast.shapes import motion


@dataclass(frozen=True)
class Size:
    """What is done with clips of one size.

    Attributes:
        resolution: of their frames.
        sampling: cases of suite `sampling`.
        step: of suite `step`.
        update: of suite `endtoend`, exact mode.
    """

    resolution: int
    sampling: tuple[sampling.Case, ...]
    step: step.Size
    update: endtoend.Size


@dataclass(frozen=True)
class Sizes:
    """All that is done on a machine; values are compared in float32 at the first of `clips`.

    Attributes:
        frames: of every clip.
        clips: by resolution.
        checked: what is compared in float32 of whole updates.
    """

    frames: int
    clips: tuple[Size, ...]
    checked: endtoend.Size


_WAYS = ("ahead", "together", "apart")
_CHECKED = endtoend.Size(pairs=2, naive_pairs=2, rounds=1, steps=2, micro_batch=1, samples=2)
_SMALL = Size(
    256,
    (sampling.Case(1, 10, 3), sampling.Case(4, 10, 2)),
    step.Size({"lora": (1, 4)}, rounds=3, ways=_WAYS, checked=3, micro_batch=2),
    endtoend.Size(pairs=4, naive_pairs=1, rounds=2, micro_batch=4, samples=4, recomputed=False, compiled=False),
)
_LARGE = Size(
    512,
    (sampling.Case(1, 5, 2), sampling.Case(2, 5, 2)),
    step.Size({"lora": (1,)}, rounds=3, ways=("ahead", "together"), recomputed=True),
    endtoend.Size(
        pairs=2, naive_pairs=1, rounds=1, steps=20, micro_batch=2, samples=2, recomputed=True, compiled=False
    ),
)
SIZES = {
    "gpu": Sizes(16, (_SMALL, _LARGE), _CHECKED),
    "cpu": Sizes(
        motion.FRAMES,
        (
            Size(
                32,
                (sampling.Case(1, 10, 5), sampling.Case(8, 10, 3)),
                step.Size({"lora": (1, 4)}, rounds=5, ways=_WAYS),
                endtoend.Size(pairs=8, naive_pairs=4, rounds=2, steps=20),
            ),
        ),
        replace(_CHECKED, pairs=4, naive_pairs=4, micro_batch=3),
    ),
    "quick": Sizes(
        motion.FRAMES,
        (
            Size(
                32,
                (sampling.Case(1, 2, 2), sampling.Case(2, 2, 2)),
                step.Size({"lora": (2,)}, rounds=2, ways=_WAYS, checked=3, micro_batch=2),
                endtoend.Size(pairs=2, naive_pairs=1, rounds=1, steps=2, micro_batch=2, samples=2),
            ),
        ),
        _CHECKED,
    ),
}


def rows(machine: Machine) -> list[Row]:
    """All rows of the suite."""
    bench = Bench(machine, "video")
    sizes = SIZES[machine.size]
    with workplace(machine, sizes.frames) as place:
        _samples(bench, place, sizes)
        _steps(bench, place, sizes)
        _updates(bench, place, sizes)
    return [*bench.rows, *temporal.rows(machine)]


def _samples(bench: Bench, place: Workplace, sizes: Sizes) -> None:
    most = max(case.batch for size in sizes.clips for case in size.sampling)
    samplers = sampling.Samplers(replace(place, resolution=sizes.clips[0].resolution), max(2, most))
    exact = samplers.agree_exactly()
    for size in sizes.clips:
        sampling.compare(bench, samplers.at(size.resolution), size.sampling, exact)


def _steps(bench: Bench, place: Workplace, sizes: Sizes) -> None:
    right: step.RightWays = {}
    for size in sizes.clips:
        here = replace(place, resolution=size.resolution)
        right = right or step.exact_values(here, size.step)
        step.compare(bench, here, size.step, right)


def _updates(bench: Bench, place: Workplace, sizes: Sizes) -> None:
    right: dict[bool, bool] = {}
    for size in sizes.clips:
        here = replace(place, resolution=size.resolution)
        right = right or {False: endtoend.weights_agree(here, False, sizes.checked)}
        endtoend.compare(bench, here, size.update, right)
