"""Suite `sampling`: guided DDIM samples of a frozen UNet in latent space; diffusers' own pipeline against ours.

The pipeline and our sampler run the same weights in the same dtype from the same noise and prompt embeddings. A unit is
a sample; launches and host syncs are those of one solver step. Our samples must equal the pipeline's: within 1e-3
(relative RMS) in float32, which is checked whatever is timed, and where half precision is timed, also within twice the
distance that the pipeline's own samples have from its samples in float32.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from benchmarks.counters import allocated, host_syncs, launches, peak_bytes
from benchmarks.measure import Bench, Machine, Provider, agrees, distance
from benchmarks.models import Workplace, load_pipeline, workplace
from benchmarks.rows import Row
from seppo_fast.config import SamplerConfig
from seppo_fast.diffusion import NoiseSchedule, Sampler
from seppo_fast.families.load import load_family
from seppo_fast.forward import Forward
from seppo_fast.policy import DTYPES, compile_blocks
from seppo_fast.rollout import sample_latents
from seppo_fast.shapes.world import caption, scene

GUIDANCE = 7.5
PIPELINE_ALONE, PIPELINE, OURS, COMPILED = "diffusers, batch 1", "diffusers, same batch", "ours", "ours, compiled"
_TOLERANCE = 1e-3
_EXACT_STEPS = 4
_LARGEST_TOLERANCE = 0.25  # rounding that moves a sample further leaves nothing to compare

Sample = Callable[[int, int], Tensor]
"""(number of samples, solver steps) -> latents (samples, C, H, W)"""


@dataclass(frozen=True)
class Case:
    """A batch of samples: how many, solver steps, rounds of timing, whether compiled too (a minute more)."""

    batch: int
    steps: int
    rounds: int
    compiled: bool = False


# 128 samples in fewer steps: at 50 they would take the time of the whole suite.
SIZES = {
    "gpu": (Case(1, 50, 5), Case(4, 50, 5), Case(16, 50, 3), Case(64, 50, 2, True), Case(128, 10, 2)),
    "cpu": (Case(1, 20, 10), Case(8, 20, 5), Case(32, 20, 5), Case(64, 20, 5)),
    "quick": (Case(1, 4, 3), Case(8, 4, 3)),
}


class Samplers:
    """The same samples by the pipeline and by ours.

    Args:
        place: the model.
        samples: the most that will be asked for.

    Attributes:
        place: the model, and how large its samples are.
    """

    def __init__(self, place: Workplace, samples: int) -> None:
        device = place.machine.device
        model = place.config(model={"precision": "fp32"})
        self.dtype = DTYPES[place.machine.precision]
        family = load_family(model, device)
        prompts = [caption(scene(5, index)) for index in range(samples)]
        self.embeds = family.encode_prompts(prompts).to(device, self.dtype)
        self.uncond_embeds = family.encode_prompts([""]).to(device, self.dtype)
        family.park_encoders()
        self._family = family
        self.pipe = load_pipeline(model.model, self.dtype, device)
        self.exact = load_pipeline(model.model, torch.float32, device)
        self.unet = copy.deepcopy(self.pipe.unet).to(memory_format=torch.channels_last)  # as the trainer keeps it
        self._clip = {} if place.frames is None else {"num_frames": place.frames}
        self._make(place)

    def at(self, resolution: int) -> Samplers:
        """The same models, for samples of another size."""
        other = copy.copy(self)
        other._make(replace(self.place, resolution=resolution))
        return other

    def _make(self, place: Workplace) -> None:
        """Sets what depends on the size of a sample."""
        self.place = place
        shape = (len(self.embeds), *self._family.latent_shape(place.resolution))
        self.noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(place.machine.device)

    def pipeline(self, count: int, steps: int) -> Tensor:
        """The pipeline's samples, in one call of that batch."""
        return self._call(self.pipe, count, steps)

    def ours(self, count: int, steps: int, unet: nn.Module | None = None) -> Tensor:
        """Our samples, in one batch."""
        return self._ours(count, steps, self.unet if unet is None else unet, self.dtype)

    def compiled(self) -> Sample:
        """Our samples with the repeated blocks of the UNet compiled for the shapes that come next."""
        torch._dynamo.reset()
        unet = copy.deepcopy(self.unet)
        compile_blocks(unet, "sdpa")
        return lambda count, steps: self.ours(count, steps, unet)

    def agree_exactly(self) -> bool:
        """Whether two of our samples are the pipeline's in float32, in few steps."""
        exact = self._ours(2, _EXACT_STEPS, self.exact.unet, torch.float32)
        return agrees("ours, float32", [exact], [self._call(self.exact, 2, _EXACT_STEPS)], _TOLERANCE)

    def tolerance(self, steps: int) -> float:
        """Twice what rounding does to the pipeline's own samples, at least 1e-3 and at most 0.25."""
        if self.dtype == torch.float32:
            return _TOLERANCE
        rounding = distance([self.pipeline(2, steps)], [self._call(self.exact, 2, steps)])
        return min(_LARGEST_TOLERANCE, max(_TOLERANCE, 2 * rounding))

    def _ours(self, count: int, steps: int, unet: nn.Module, dtype: torch.dtype) -> Tensor:
        config = SamplerConfig(name="ddim", steps=steps, guidance=GUIDANCE, batch=count)
        sampler = Sampler(self._family.scheduler_config, config)
        forward = Forward(self._family, NoiseSchedule(self._family.scheduler_config), dtype)
        inputs = self.noise[:count], self.embeds[:count].to(dtype), self.uncond_embeds.to(dtype)
        return sample_latents(forward, unet, sampler, *inputs)

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


def rows(machine: Machine) -> list[Row]:
    """All rows of the suite."""
    bench = Bench(machine, "sampling")
    cases = SIZES[machine.size]
    with workplace(machine) as place:
        samplers = Samplers(place, max(case.batch for case in cases))
        compare(bench, samplers, cases, samplers.agree_exactly())
    return bench.rows


def compare(bench: Bench, samplers: Samplers, cases: Sequence[Case], exact: bool) -> None:
    """Adds the rows of the cases; `exact`: whether ours was found right in float32."""
    tolerances = {steps: samplers.tolerance(steps) for steps in {case.steps for case in cases}}
    for case in cases:
        _run(bench, samplers, case, exact, tolerances[case.steps])


def _run(bench: Bench, samplers: Samplers, case: Case, exact: bool, tolerance: float) -> None:
    """One case: values first, then counts, then time."""
    flops = samplers.place.flops()
    held = sum(weight.nbytes for weight in samplers.pipe.unet.parameters())

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

    known: list[Tensor] = []  # each provider must agree with all before it, on the samples that both made
    providers = [provider(PIPELINE_ALONE, samplers.pipeline, 1, known)]
    if case.batch > 1:
        providers.append(provider(PIPELINE, samplers.pipeline, case.batch, known))
    providers.append(provider(OURS, samplers.ours, case.batch, known))
    if case.compiled:
        providers.append(provider(COMPILED, samplers.compiled(), case.batch, known))
    name = f"{case.batch} sample{'s' * (case.batch > 1)}, {case.steps} DDIM steps"
    bench.case(samplers.place.titled("sampling", name), providers, case.rounds)


def _per_step(count: Callable[[int], int | None]) -> float | None:
    """Counts of one solver step: what two more steps add, so that what happens once a call is left out."""
    few, more = count(2), count(4)
    return None if few is None or more is None else (more - few) / 2
