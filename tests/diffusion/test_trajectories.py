"""Random and deterministic steps of trajectories against diffusers, and the clean latents that a prediction implies."""

import pytest
import torch
from diffusers import DDIMScheduler

from seppo_fast.config.schema import SamplerConfig
from seppo_fast.diffusion.sampler import classifier_free
from seppo_fast.diffusion.schedule import NoiseSchedule
from seppo_fast.diffusion.steps import reverse_steps
from seppo_fast.diffusion.trajectories import TrajectorySampler
from tests.helpers.calls import embeds

SD15 = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False, "prediction_type": "epsilon",
}  # fmt: skip


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ddim(config, steps):
    """Returns diffusers' scheduler with float64 coefficients."""
    scheduler = DDIMScheduler.from_config(config)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("window", [(1, 2), (3, 3), (4, 7), (1, 7)])
def test_steps_outside_the_window_are_those_of_plain_ddim(prediction_type, window):
    config = SD15 | {"prediction_type": prediction_type}
    steps = reverse_steps(config, SamplerConfig(steps=7), 0.6, window)
    theirs = ddim(config, 7)
    latents, prediction, noise = drawn(3, 2, 4, 3, 5)
    assert len(steps) == 7
    for number, step in enumerate(steps, 1):
        inside = window[0] <= number <= window[1]
        expected = theirs.step(
            prediction, step.timestep, latents, eta=0.6 if inside else 0.0, variance_noise=noise if inside else None
        ).prev_sample
        assert (step.sigma > 0) == inside
        torch.testing.assert_close(
            step.mean(latents, prediction) + step.sigma * noise, expected, rtol=1e-11, atol=1e-11
        )


def test_a_window_keeps_its_place_if_the_last_step_is_left_out():
    config = SD15 | {"timestep_spacing": "linspace", "steps_offset": 0}
    steps = reverse_steps(config, SamplerConfig(steps=6), 1.0, (5, 6))
    assert [step.sigma > 0 for step in steps] == [False] * 4 + [True]
    assert not any(step.sigma for step in reverse_steps(config, SamplerConfig(steps=6), 1.0, (6, 6)))


def denoise(latents, times, conditioning):
    """Predicts something that depends on all inputs."""
    level = times.double().view(-1, 1, 1, 1) / 1000
    return torch.tanh(latents.double() * level + conditioning["prompt_embeds"].double().mean((1, 2)).view(-1, 1, 1, 1))


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_trajectory_is_diffusers_own_loop(scale):
    """Guided or not; random in the third and fourth step only."""
    steps = reverse_steps(SD15, SamplerConfig(steps=6), 1.0, (3, 4))
    noise, conditioning, uncond = drawn(3, 4, 3, 5), embeds(drawn(3, 2, 2, seed=1)), embeds(drawn(1, 2, 2, seed=2))
    rows, asked = [], []

    def counting(latents, times, conditioning):
        rows.append(len(latents))
        return denoise(latents, times, conditioning)

    def step_noise(index):
        asked.append(index)
        return drawn(3, 4, 3, 5, seed=10 + index).float()

    sampler = TrajectorySampler(steps, classifier_free, scale)
    got = sampler(counting, noise.float(), conditioning, uncond, step_noise)
    assert got.dtype == torch.float32 and got.shape == (3, 7, 4, 3, 5) and torch.equal(got[:, 0], noise.float())
    assert asked == [2, 3] and rows == [3 if scale == 1 else 6] * 6

    theirs, latents = ddim(SD15, 6), noise.float().double()
    for index, time in enumerate(theirs.timesteps):
        times = time.expand(3)
        prediction = denoise(latents, times, conditioning)
        if scale > 1:
            empty = denoise(latents, times, uncond.expand(3))
            prediction = empty + scale * (prediction - empty)
        eta = float(index in (2, 3))
        made = step_noise(index).double() if eta else None
        latents = theirs.step(prediction, time, latents, eta=eta, variance_noise=made).prev_sample
        torch.testing.assert_close(got[:, index + 1].double(), latents, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_clean_latents_are_diffusers_estimate_of_x_0(prediction_type):
    config = SD15 | {"prediction_type": prediction_type}
    theirs, times = ddim(config, 10), torch.tensor([901, 1, 401])
    latents, prediction = drawn(2, 3, 4, 3, 5)
    got = NoiseSchedule(config).clean(latents, prediction, times)
    for row, time in enumerate(times):
        one = slice(row, row + 1)
        expected = theirs.step(prediction[one], time, latents[one]).pred_original_sample
        torch.testing.assert_close(got[one], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_clean_inverts_noising(prediction_type):
    schedule = NoiseSchedule(SD15 | {"prediction_type": prediction_type})
    times = torch.tensor([0, 500, 999])
    latents, noise = drawn(2, 3, 4, 3, 5)
    noised = schedule.add_noise(latents, noise, times)
    got = schedule.clean(noised, schedule.target(latents, noise, times), times)
    torch.testing.assert_close(got, latents, rtol=1e-5, atol=1e-5)


def test_clean_latents_without_signal_at_the_last_timestep():
    config = SD15 | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    latents, prediction = drawn(2, 1, 4, 3, 5)
    got = NoiseSchedule(config).clean(latents, prediction, torch.tensor([999]))
    torch.testing.assert_close(got, -prediction, rtol=1e-6, atol=1e-6)  # v = -x_0 where nothing is left of the signal
