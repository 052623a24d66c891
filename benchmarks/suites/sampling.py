"""Suite `sampling`: guided DDIM sampling from a frozen UNet, in latent space, with diffusers' pipeline and our sampler.

Both run the same weights in the same dtype, from the same noise and prompt embeddings. The pipeline is timed as loaded,
with one sample per call and with the whole batch, and also tuned as in diffusers' own guide to speed: with its UNet in
channels_last and, in cases that also time our compiled sampler, with the UNet compiled as a whole. Times are per
sample; launches and host syncs are per solver step.

Our samples must equal the pipeline's within 1e-3 (relative RMS) in float32; this is always checked. If half precision
is timed, they must also agree in that precision, within twice the distance between the pipeline's own samples in half
precision and in float32 (but at least 1e-3, at most 0.25).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from benchmarks.harness import cases as suites
from benchmarks.harness.cases import Shared
from benchmarks.harness.counters import allocated, host_syncs, launches, peak_bytes
from benchmarks.harness.estimates import COMPILED_GRAPH, COMPILED_UNET, FORWARD_LAUNCHES, PICTURE, Unet, h200
from benchmarks.harness.measure import Bench, Machine, Provider, agrees, distance
from benchmarks.harness.models import Workplace, load_pipeline, shared_workplace
from benchmarks.harness.rows import Row
from seppo_fast.config.schema import SamplerConfig
from seppo_fast.diffusion.conditioning import Conditioning
from seppo_fast.models.denoiser import Denoiser
from seppo_fast.models.encoders import PROMPT_EMBEDS
from seppo_fast.models.registry import load_family
from seppo_fast.models.trainable import DTYPES, compile_blocks
from seppo_fast.models.unet import UNetFamily
from seppo_fast.shapes.world import caption, scene

GUIDANCE = 7.5
PIPELINE_ALONE, PIPELINE, OURS, COMPILED = "diffusers, batch 1", "diffusers, same batch", "ours", "ours, compiled"
CHANNELS_LAST, CHANNELS_LAST_COMPILED = "diffusers, channels_last", "diffusers, channels_last, compiled"
# The settings of diffusers' own Stable Diffusion timings; the guide's max-autotune would take many minutes.
_COMPILE: dict[str, Any] = {"mode": "reduce-overhead", "fullgraph": True}
_TOLERANCE = 1e-3
_EXACT_STEPS = 4
_LARGEST_TOLERANCE = 0.25  # upper bound, whatever the effect of rounding: beyond it, agreement would mean nothing

Sample = Callable[[int, int], Tensor]
"""(number of samples, solver steps) -> latents (samples, C, H, W)"""


@dataclass(frozen=True)
class Case:
    """A batch of samples: its size, solver steps, rounds of timing, and whether compiled providers are also timed."""

    batch: int
    steps: int
    rounds: int
    compiled: bool = False

    def __str__(self) -> str:
        return f"{self.batch} sample{'s' * (self.batch > 1)}, {self.steps} DDIM steps"


# The number after each case is its estimated seconds on an H200 (see `estimate`); the shared set-up takes another 33.
# The cost per step does not depend on the number of steps, so the first large batch takes 20 steps instead of 50. Six
# minutes suffice for the set-up and the first four cases, but for neither of the last two.
SIZES = {
    "gpu": (
        Case(1, 50, 3),  # 12
        Case(64, 20, 1, True),  # 191
        Case(16, 20, 2),  # 26
        Case(4, 50, 3),  # 23
        Case(64, 50, 1, True),  # 293
        Case(128, 10, 1),  # 85
    ),
    "cpu": (Case(1, 20, 10), Case(8, 20, 5), Case(32, 20, 5), Case(64, 20, 5)),
    "quick": (Case(1, 4, 3), Case(8, 4, 3)),
}
_COUNTED_STEPS = 14  # untimed, per provider: 2 + 4 to count launches, 2 + 4 to count host syncs, 2 for memory


def estimate(case: Case, unet: Unet = PICTURE) -> float:
    """Returns a case's estimated seconds on an H200, for each provider's check, counted steps and timed rounds."""
    steps = (1 + case.rounds) * case.steps + _COUNTED_STEPS
    alone, batch = (h200(bf16=2 * rows * unet.forward, launches=FORWARD_LAUNCHES) for rows in (1, case.batch))
    exact = h200(fp32=4 * case.steps * unet.forward)  # two samples, to measure the effect of rounding
    compiling = (COMPILED_UNET + 4 * COMPILED_GRAPH) if case.compiled else 0.0  # a block at each of four widths
    return exact + compiling + steps * (alone + (2 + (case.batch > 1) + case.compiled) * batch)


class Samplers:
    """Generates the same samples with diffusers' pipeline and with our sampler.

    Args:
        place: the model and its machine.
        samples: the largest number of samples in a batch.

    Attributes:
        place: the model, its machine, and the resolution of the samples.
    """

    def __init__(self, place: Workplace, samples: int) -> None:
        device = place.machine.device
        model = place.config(model={"precision": "fp32"})
        self.dtype = DTYPES[place.machine.precision]
        family = load_family(model, device)
        prompts = [caption(scene(5, index)) for index in range(samples)]
        embeds = family.collate(family.encode_prompts(["", *prompts]))[PROMPT_EMBEDS].to(device, self.dtype)
        self.uncond_embeds, self.embeds = embeds[:1], embeds[1:]
        family.park_encoders()
        self._family = family
        self.pipe = load_pipeline(model.model, self.dtype, device)
        self.exact = load_pipeline(model.model, torch.float32, device)
        self.unet = copy.deepcopy(self.pipe.unet).to(memory_format=torch.channels_last)  # as the trainer keeps it
        self._clip = {} if place.frames is None else {"num_frames": place.frames}
        self._make(place)

    def at(self, resolution: int) -> Samplers:
        """Returns the same models for another resolution; `right`, the float32 check, is kept from this one."""
        other = copy.copy(self)
        other.right = self.right
        other._make(replace(self.place, resolution=resolution))
        return other

    def _make(self, place: Workplace) -> None:
        """Sets the attributes that depend on the resolution."""
        self.place = place
        self._tolerances: dict[int, float] = {}
        shape = (len(self.embeds), *self._family.latent_shape(place.resolution))
        self.noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(place.machine.device)

    def pipeline(self, count: int, steps: int) -> Tensor:
        """Returns the pipeline's samples, from one call with the whole batch."""
        return self._call(self.pipe, count, steps)

    def channels_last(self, compiled: bool) -> Sample:
        """Returns the pipeline as a sampler, with its UNet in channels_last and, if `compiled`, compiled as a whole."""
        pipe = type(self.pipe)(**self.pipe.components | {"unet": self.unet})
        pipe.set_progress_bar_config(disable=True)
        if compiled:
            pipe.unet = torch.compile(self.unet, **_COMPILE)
        return partial(self._call, pipe)

    def ours(self, count: int, steps: int, unet: nn.Module | None = None) -> Tensor:
        """Returns our samples, generated in one batch."""
        return self._ours(count, steps, self.unet if unet is None else unet, self.dtype)

    def compiled(self) -> Sample:
        """Returns our sampler with the UNet's repeated blocks compiled; each new input shape compiles them again."""
        unet = copy.deepcopy(self.unet)
        compile_blocks(unet, "sdpa", UNetFamily)
        return lambda count, steps: self.ours(count, steps, unet)

    @cached_property
    def right(self) -> bool:
        """Whether two of our samples equal the pipeline's in float32 within the tolerance, after a few solver steps."""
        exact = self._ours(2, _EXACT_STEPS, self.exact.unet, torch.float32)
        return agrees("ours, float32", [exact], [self._call(self.exact, 2, _EXACT_STEPS)], _TOLERANCE)

    def tolerance(self, steps: int) -> float:
        """Returns the allowed distance: twice the effect of rounding on the pipeline's samples, within [1e-3, 0.25]."""
        if self.dtype == torch.float32:
            return _TOLERANCE
        if steps not in self._tolerances:
            rounding = distance([self.pipeline(2, steps)], [self._call(self.exact, 2, steps)])
            self._tolerances[steps] = min(_LARGEST_TOLERANCE, max(_TOLERANCE, 2 * rounding))
        return self._tolerances[steps]

    def _ours(self, count: int, steps: int, unet: nn.Module, dtype: torch.dtype) -> Tensor:
        config = SamplerConfig(name="ddim", steps=steps, guidance=GUIDANCE, batch=count)
        sampler = self._family.sampler(config, self.noise.shape[1:])
        prompts = (Conditioning({PROMPT_EMBEDS: t.to(dtype)}) for t in (self.embeds[:count], self.uncond_embeds))
        return Denoiser(self._family, dtype).sample(unet, sampler, self.noise[:count], *prompts)

    @torch.no_grad()
    def _call(self, pipe: DiffusionPipeline, count: int, steps: int) -> Tensor:
        return pipe(
            prompt_embeds=self.embeds[:count],
            negative_prompt_embeds=self.uncond_embeds.expand(count, -1, -1),
            latents=self.noise[:count].to(pipe.dtype),
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            output_type="latent",
            return_dict=False,
            **self._clip,
        )[0]


def cases(machine: Machine) -> list[suites.Case]:
    """Returns the suite's cases."""
    bench = Shared(lambda _: Bench(machine, "sampling"))
    place, sizes = shared_workplace(machine), SIZES[machine.size]
    samplers = shared_samplers(place, sizes, PICTURE)
    return [suites.limit_case("matmul", bench), *cases_of(bench, samplers, sizes, PICTURE)]


def shared_samplers(place: Shared[Workplace], sizes: Sequence[Case], unet: Unet) -> Shared[Samplers]:
    """Returns the set-up of samplers that all cases share."""
    most = max(2, *(case.batch for case in sizes))  # two samples are compared in float32
    exact = h200(fp32=2 * 2 * 2 * _EXACT_STEPS * unet.forward)
    return Shared(lambda _: Samplers(place(), most), 3 * unet.pipeline + exact, (place,))


def cases_of(
    bench: Shared[Bench], samplers: Shared[Samplers], sizes: Sequence[Case], unet: Unet, prefix: str = ""
) -> list[suites.Case]:
    """Returns one case per size. Titles start with `prefix`, which distinguishes them from other suites' titles."""

    def one(case: Case) -> suites.Case:
        title = f"{prefix}{case}"
        return suites.Case(
            title, lambda: case_rows(bench(), samplers(), case, title), estimate(case, unet), (bench, samplers)
        )

    return [one(case) for case in sizes]


def case_rows(bench: Bench, samplers: Samplers, case: Case, title: str) -> list[Row]:
    """Returns the rows of a case, after checking each provider's samples, counting its work and timing them all."""
    exact, tolerance = samplers.right, samplers.tolerance(case.steps)
    flops = samplers.place.flops()
    held = sum(weight.nbytes for weight in samplers.pipe.unet.parameters())
    if case.compiled:
        torch._dynamo.reset()  # only before the first compilation: it drops all compiled code

    def provider(name: str, sample: Sample, batch: int, expected: list[Tensor]) -> Provider:
        def call(steps: int = case.steps) -> Tensor:
            return sample(batch, steps)

        made = call()
        agreed = [agrees(f"{name}, {batch} at once", [made[: len(rows)]], [rows], tolerance) for rows in expected]
        expected.append(made)
        return Provider(
            name,
            call,
            units=batch,
            flops=flops * batch * 2 * case.steps,
            value_ok=all(agreed) and (exact or not name.startswith(OURS)),
            launches=_per_step(lambda steps: launches(bench.machine, lambda: call(steps))),
            host_syncs=_per_step(lambda steps: host_syncs(bench.machine, lambda: call(steps))),
            peak_bytes=peak_bytes(bench.machine, lambda: call(2), allocated(bench.machine) - held),
        )

    known: list[Tensor] = []  # each provider must agree with all earlier ones, on the samples that both made
    providers = [provider(PIPELINE_ALONE, samplers.pipeline, 1, known)]
    if case.batch > 1:
        providers.append(provider(PIPELINE, samplers.pipeline, case.batch, known))
    name = CHANNELS_LAST_COMPILED if case.compiled else CHANNELS_LAST
    providers.append(provider(name, samplers.channels_last(case.compiled), case.batch, known))
    providers.append(provider(OURS, samplers.ours, case.batch, known))
    if case.compiled:
        providers.append(provider(COMPILED, samplers.compiled(), case.batch, known))
    return bench.case(title, providers, case.rounds)


def _per_step(count: Callable[[int], int | None]) -> float | None:
    """Returns the count per solver step: half the difference between 4 and 2 steps, so a call's fixed part cancels."""
    few, more = count(2), count(4)
    return None if few is None or more is None else (more - few) / 2
