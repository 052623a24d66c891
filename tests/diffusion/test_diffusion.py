"""Keyed randomness, noising, targets, and samples equal to diffusers' own pipeline."""

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
)

from seppo_fast.config.schema import SamplerConfig
from seppo_fast.diffusion.sampler import DiffusionSolver
from seppo_fast.diffusion.schedule import NoiseSchedule
from seppo_fast.models.families.sd15 import StableDiffusion
from seppo_fast.utils.errors import ConfigError
from seppo_fast.utils.random import keyed_noise, keyed_rng
from tests.helpers.calls import embeds, encoded, sampler_of

CPU = torch.device("cpu")
SD15 = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False, "prediction_type": "epsilon",
}  # fmt: skip


def alphas_cumprod():
    """Returns SD-1.5's alphas_cumprod in float64, from their definition."""
    return np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


def test_noise_depends_on_its_key_alone():
    shape = (4, 3, 5)
    noise = keyed_noise(7, "noise", [(3, 10), (3, 11), (3, 12)], shape)
    assert noise.shape == (3, *shape) and noise.dtype == torch.float32
    assert torch.equal(noise[1:2], keyed_noise(7, "noise", [(3, 11)], shape))
    others = [
        keyed_noise(8, "noise", [(3, 11)], shape),
        keyed_noise(7, "sample", [(3, 11)], shape),
        keyed_noise(7, "noise", [(4, 11)], shape),
        keyed_noise(7, "noise", [(3, 13)], shape),
    ]
    assert all((other - noise[1:2]).abs().min() > 0 for other in others)


def test_noise_is_standard_normal_and_streams_are_independent():
    noise = keyed_noise(0, "noise", [(0, row) for row in range(200)], (1000,)).double()
    assert abs(noise.mean()) < 4 / 200_000**0.5
    assert abs(noise.var() - 1) < 4 * (2 / 200_000) ** 0.5
    correlations = torch.corrcoef(noise)[~torch.eye(200, dtype=torch.bool)]
    assert correlations.abs().max() < 6 / 1000**0.5


def test_seeds_beyond_32_bits_are_told_apart():
    assert keyed_rng(1, "x").random() != keyed_rng(1 + 2**32, "x").random()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_noising_and_target(prediction_type):
    schedule = NoiseSchedule(SD15 | {"prediction_type": prediction_type})
    x, noise = torch.randn(2, 5, 4, 3, 3, generator=torch.Generator().manual_seed(0)).unbind()
    t = torch.tensor([0, 1, 500, 998, 999])
    alpha = torch.from_numpy(alphas_cumprod()[t.numpy()]).view(5, 1, 1, 1)
    expected = alpha.sqrt() * x.double() + (1 - alpha).sqrt() * noise.double()
    torch.testing.assert_close(schedule.add_noise(x, noise, t).double(), expected, atol=1e-5, rtol=0)
    velocity = alpha.sqrt() * noise.double() - (1 - alpha).sqrt() * x.double()
    target = noise.double() if prediction_type == "epsilon" else velocity
    torch.testing.assert_close(schedule.target(x, noise, t).double(), target, atol=1e-5, rtol=0)


def test_other_prediction_types_are_refused():
    with pytest.raises(ConfigError, match="'sample'"):
        NoiseSchedule(SD15 | {"prediction_type": "sample"})


def test_ddim_against_its_equation_in_float64():
    """Compares with DDIM eq. 12 at eta 0 on a linear model; leading spacing with offset 1, as in SD-1.5."""
    steps, x = 7, torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    config = SamplerConfig(name="ddim", steps=steps, guidance=1.0)
    got = sampler_of(SD15, config)(
        lambda x, t, e: 0.3 * x, x, embeds(torch.zeros(2, 1, 1)), embeds(torch.zeros(1, 1, 1))
    )
    alpha, stride, expected = alphas_cumprod(), 1000 // steps, x.double()
    for t in [step * stride + 1 for step in reversed(range(steps))]:
        now, before = alpha[t], alpha[t - stride] if t >= stride else alpha[0]
        epsilon = 0.3 * expected
        x0 = (expected - (1 - now) ** 0.5 * epsilon) / now**0.5
        expected = before**0.5 * x0 + (1 - before) ** 0.5 * epsilon
    torch.testing.assert_close(got.double(), expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", ["ddim", "dpmsolver++", "pndm", "euler"])
@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_samples_equal_the_pipelines(tiny, name, guidance):
    pipe = StableDiffusionPipeline.from_pretrained(tiny, safety_checker=None)
    pipe.unet.to(memory_format=torch.channels_last)  # like ours: a convolution's order of summation depends on it
    family = StableDiffusion.load(str(tiny), CPU)
    prompts = ["a fox", "two foxes on a hill"]
    noise = keyed_noise(0, "sample", [(0, 1), (0, 2)], (4, 8, 8))
    config = SamplerConfig(steps=5, guidance=guidance).model_copy(update={"name": name})
    sampler = family.sampler(config, (4, 8, 8))
    got = sampler(
        lambda x, t, e: family.denoise(family.model, x, t, e),
        noise, encoded(family, prompts), encoded(family, [""]),
    )  # fmt: skip
    solvers = {
        "dpmsolver++": lambda config: DPMSolverMultistepScheduler.from_config(config, algorithm_type="dpmsolver++"),
        "pndm": lambda config: PNDMScheduler.from_config(config, skip_prk_steps=True),
        "euler": EulerDiscreteScheduler.from_config,
    }
    if name in solvers:
        pipe.scheduler = solvers[name](pipe.scheduler.config)
    with torch.no_grad():
        expected = pipe(
            prompts, latents=noise, num_inference_steps=5, guidance_scale=guidance, output_type="latent"
        ).images
    assert torch.equal(got, expected)


def test_pndm_evaluates_the_model_once_more_than_it_has_steps():
    config = SamplerConfig().model_copy(update={"name": "pndm", "steps": 50})
    assert len(DiffusionSolver(SD15, config).times) == 51


def test_guidance_one_never_reads_the_empty_prompt():
    rows = []

    def denoise(latents, timesteps, embeds):
        rows.append(len(latents))
        return latents

    noise = torch.ones(3, 4, 2, 2)
    for guidance in (1.0, 2.0):
        sampler_of(SD15, SamplerConfig(steps=2, guidance=guidance))(
            denoise, noise, embeds(torch.zeros(3, 1, 1)), embeds(torch.zeros(1, 1, 1))
        )
    assert rows == [3, 3, 6, 6]


@pytest.mark.parametrize("solver", ["ddim", "dpmsolver++"])
def test_no_step_waits_for_the_device(solver):
    """Samples meta tensors, which have no values: whatever reads one, as a host sync does, fails."""
    config = SamplerConfig(name=solver, steps=7, guidance=3.0)
    sampler = sampler_of(SD15, config)
    with pytest.raises(RuntimeError):
        torch.zeros(1, device="meta").item()
    noise, prompts = torch.empty(3, 4, 5, 6, device="meta"), embeds(torch.empty(3, 2, 8, device="meta"))
    rows = []

    def denoise(latents, times, conditioning):
        shape = conditioning["prompt_embeds"].shape
        rows.append((latents.shape, times.shape, times.device.type, shape))
        return torch.empty_like(latents)

    assert sampler(denoise, noise, prompts, prompts.take(slice(0, 1))).shape == noise.shape
    assert rows == [((6, 4, 5, 6), (6,), "meta", (6, 2, 8))] * 7


@pytest.mark.parametrize("solver", ["ddim", "dpmsolver++"])
def test_more_steps_than_timesteps_are_refused(solver):
    sampler_of(SD15, SamplerConfig(name=solver, steps=1000))
    with pytest.raises(ConfigError, match="sampler.steps = 1001.*1000 timesteps"):
        sampler_of(SD15, SamplerConfig(name=solver, steps=1001))
