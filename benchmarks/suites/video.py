"""Suite `video`: AnimateDiff clips. Measures sampling, training steps, whole updates, and attention over frames.

The first three are the suites `sampling`, `step` and `endtoend` on a UNet with motion modules; their docstrings
describe the providers and what must agree. A sample is a clip. The baselines are diffusers' AnimateDiff pipeline and
the naive loop around it; both set AnimateDiff's linear schedule independently of the library. `temporal` makes the
remaining rows.

On a GPU the model is SD-1.5's architecture with motion modules in the shape of v1-5-2, 1312.7 M random parameters in
total, at 16 x 256 x 256 and 16 x 512 x 512; without a GPU, the embedded pipeline and a small random adapter at
8 x 32 x 32. Values are compared in float32 at the smaller size, and as they are timed at each size. At 512 px all
providers recompute activations in a step, since a pair would take 65 GB otherwise.

Counted cost: a forward is 4.11 TFLOP at 256 px and 17.7 at 512, forward and backward of a LoRA 8.30 and 37.4. By these
counts and the assumed loading times (`harness.estimates`), the clips of 256 px and the first cases of attention fit
into six minutes on an H200; the whole suite takes ten.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.harness import cases as suites
from benchmarks.harness.cases import Shared
from benchmarks.harness.estimates import CLIPS, PICTURE, Unet
from benchmarks.harness.measure import Bench, Machine
from benchmarks.harness.models import Workplace, shared_workplace
from benchmarks.suites import endtoend, sampling, step, temporal
from seppo_fast.shapes import motion


@dataclass(frozen=True)
class Size:
    """What is done with clips of one size.

    Attributes:
        resolution: size of their frames in pixels.
        sampling: cases for suite `sampling`.
        step: the size for suite `step`.
        update: the size for suite `endtoend`, exact mode.
    """

    resolution: int
    sampling: tuple[sampling.Case, ...]
    step: step.Size
    update: endtoend.Size


@dataclass(frozen=True)
class Sizes:
    """All that is done on a machine; values are compared in float32 at the first of `clips`.

    Attributes:
        frames: number of frames per clip.
        clips: what is done at each resolution.
        checked: the size at which whole updates are compared in float32.
    """

    frames: int
    clips: tuple[Size, ...]
    checked: endtoend.Size


_WAYS = ("ahead", "together", "apart")
# Seconds on an H200 by the suites' estimates, with set-up in brackets. At 256 px: updates 14 (125), samples 10 (22) and
# 24, steps 17 (87) and 4. At 512 px, which exceeds six minutes: updates 16 (48), samples 23 and 39, steps 17 (47).
_CHECKED = endtoend.Size(pairs=2, naive_pairs=2, rounds=1, steps=2, micro_batch=2, samples=2, recomputed=True)
_SMALL = Size(
    256,
    (sampling.Case(1, 10, 3), sampling.Case(4, 10, 2)),
    step.Size({"lora": (4, 1)}, rounds=3, ways=_WAYS, checked=3, micro_batch=2),
    endtoend.Size(
        pairs=4, naive_pairs=1, rounds=2, steps=20, micro_batch=4, samples=4, recomputed=False, compiled=False
    ),
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
                step.Size({"lora": (4, 1)}, rounds=5, ways=_WAYS),
                endtoend.Size(pairs=8, naive_pairs=4, rounds=2, steps=20),
            ),
        ),
        replace(_CHECKED, pairs=4, naive_pairs=4, micro_batch=3, recomputed=None),
    ),
    "quick": Sizes(
        motion.FRAMES,
        (
            Size(
                32,
                (sampling.Case(2, 2, 2),),
                step.Size({"lora": (2,)}, rounds=2, ways=_WAYS, checked=3, micro_batch=2),
                endtoend.Size(pairs=2, naive_pairs=1, rounds=1, steps=2, micro_batch=2, samples=2),
            ),
        ),
        _CHECKED,
    ),
}


def cases(machine: Machine) -> list[suites.Case]:
    """Returns the suite's cases: updates, samples and steps at the first size, attention, then the other sizes.

    Values in float32 are compared at the first size.
    """
    sizes, bench = SIZES[machine.size], Shared(lambda _: Bench(machine, "video"))
    place = shared_workplace(machine, sizes.frames)
    first, *others = sizes.clips
    here, unet = _resized(place, first), _unet(first)
    every = [case for size in sizes.clips for case in size.sampling]
    samplers = sampling.shared_samplers(here, every, unet)
    right_steps = {train: step.shared_right(here, first.step, train, unet) for train in first.step.pairs}
    right_updates = {False: endtoend.shared_right(here, False, sizes.checked, unet)}

    def of(size: Size, here: Shared[Workplace], samplers: Shared[sampling.Samplers]) -> list[suites.Case]:
        unet, clips = _unet(size), f" of {sizes.frames} x {size.resolution} x {size.resolution}, "
        return [
            *endtoend.cases_of(bench, here, size.update, right_updates, unet, f"update{clips}"),
            *sampling.cases_of(bench, samplers, size.sampling, unet, f"sampling{clips}"),
            *step.cases_of(bench, here, size.step, right_steps, unet, f"step{clips}"),
        ]

    made = [suites.limit_case("matmul", bench), *of(first, here, samplers), *temporal.cases(machine)]
    for size in others:
        made += of(size, _resized(place, size), _at(samplers, size))
    return made


def _unet(size: Size) -> Unet:
    return CLIPS.get(size.resolution, PICTURE)  # without a GPU nothing is estimated, so any will do


def _resized(place: Shared[Workplace], size: Size) -> Shared[Workplace]:
    return Shared(lambda _: replace(place(), resolution=size.resolution), needs=(place,))


def _at(samplers: Shared[sampling.Samplers], size: Size) -> Shared[sampling.Samplers]:
    return Shared(lambda _: samplers().at(size.resolution), needs=(samplers,))
