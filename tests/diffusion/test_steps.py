"""The reverse process in affine form against diffusers' DDIM with noise, and its log-probability against torch's."""

import math

import pytest
import torch
from diffusers import DDIMScheduler

from seppo_fast.config.schema import SamplerConfig
from seppo_fast.diffusion.steps import remarks_on_end, reverse_steps
from seppo_fast.loss import denoising_errors
from seppo_fast.utils.errors import ConfigError

SD15 = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False, "prediction_type": "epsilon",
}  # fmt: skip


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ddim(config, steps, **settings):
    """Returns diffusers' scheduler with float64 coefficients."""
    scheduler = DDIMScheduler.from_config(config | settings)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    scheduler.set_timesteps(steps)
    return scheduler


def sampler(steps, **settings):
    return SamplerConfig(steps=steps, guidance=1.0, **settings)


@pytest.mark.parametrize("set_alpha_to_one", [False, True])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("eta", [1.0, 0.3])
def test_each_step_is_that_of_diffusers(prediction_type, spacing, offset, set_alpha_to_one, eta):
    config = SD15 | {
        "prediction_type": prediction_type, "timestep_spacing": spacing, "steps_offset": offset,
        "set_alpha_to_one": set_alpha_to_one,
    }  # fmt: skip
    steps = reverse_steps(config, sampler(12), eta)
    theirs = ddim(config, 12, set_alpha_to_one=False)  # the end that is documented, whatever the pipeline's setting
    times = [int(time) for time in theirs.timesteps]
    assert [step.timestep for step in steps] == [time for time in times if time]
    assert len(steps) == (11 if 0 in times else 12)
    assert (0 in times) == (spacing == "linspace" or (spacing, offset) == ("leading", 0))
    latents, prediction, noise = drawn(3, 2, 4, 3, 5)
    for step in steps:
        expected = theirs.step(prediction, step.timestep, latents, eta=eta, variance_noise=noise).prev_sample
        got = step.mean(latents, prediction) + step.sigma * noise
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
        now, following = (theirs.alphas_cumprod[max(time, 0)].item() for time in (step.timestep, step.timestep - 83))
        variance = eta**2 * (1 - following) / (1 - now) * (1 - now / following)
        assert step.sigma == pytest.approx(math.sqrt(variance), rel=1e-12)


def test_a_step_from_timestep_0_would_change_nothing():
    latents, prediction, noise = drawn(3, 2, 4, 3, 5)
    theirs = ddim(SD15, 12, timestep_spacing="linspace")
    assert int(theirs.timesteps[-1]) == 0
    after = theirs.step(prediction, 0, latents, eta=1.0, variance_noise=noise).prev_sample
    torch.testing.assert_close(after, latents, rtol=1e-12, atol=1e-12)


def test_the_pipelines_own_last_step_would_have_no_noise():
    """Why `set_alpha_to_one` does not count: with it diffusers' last step ignores the noise."""
    theirs = ddim(SD15, 12, set_alpha_to_one=True)
    latents, prediction, noise = drawn(3, 2, 4, 3, 5)
    last = int(theirs.timesteps[-1])
    ends = [theirs.step(prediction, last, latents, eta=1.0, variance_noise=z).prev_sample for z in (noise, 0 * noise)]
    assert torch.equal(*ends)
    assert reverse_steps(SD15 | {"set_alpha_to_one": True}, sampler(12))[-1].sigma == pytest.approx(0.0206, abs=5e-5)


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({}, []),
        ({"set_alpha_to_one": True}, ["the last step, from timestep 1, ends at alphas_cumprod[0], not at 1"]),
        ({"timestep_spacing": "linspace"}, ["the step from timestep 0 is left out"]),
        ({"set_alpha_to_one": True, "timestep_spacing": "trailing"}, ["the last step, from timestep 82, ends at"]),
    ],
)
def test_a_remark_says_where_the_end_is_not_the_pipelines_own(settings, found):
    said = remarks_on_end(SD15 | settings, sampler(12), reverse_steps(SD15 | settings, sampler(12)))
    assert len(said) == len(found) and all(line.startswith(begin) for line, begin in zip(said, found, strict=True))


def test_v_prediction_without_terminal_signal():
    """At abar = 0 the mean is all x_0, and the formulas hold no division by zero."""
    config = SD15 | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    first = reverse_steps(config, sampler(10))[0]
    following = float(DDIMScheduler.from_config(config).alphas_cumprod[899])
    assert first.timestep == 999
    assert (first.a, first.b) == pytest.approx((0.0, -math.sqrt(following)), abs=1e-7)
    assert first.sigma == pytest.approx(math.sqrt(1 - following), rel=1e-9)


@pytest.mark.parametrize(
    ("steps", "first", "middle", "third_to_last", "second_to_last", "last"),
    [(12, 0.659, 0.366, 0.794, 27.2, 0.503), (20, 0.364, 0.194, 0.651, 14.7, 0.503),
     (50, 0.131, 0.071, 0.517, 5.36, 0.503)],
)  # fmt: skip
def test_kappa_of_stable_diffusion(steps, first, middle, third_to_last, second_to_last, last):
    kappa = [step.kappa for step in reverse_steps(SD15, sampler(steps))]
    assert [kappa[place] for place in (0, len(kappa) // 2, -3, -2, -1)] == pytest.approx(
        [first, middle, third_to_last, second_to_last, last], rel=2e-2
    )
    assert kappa.index(max(kappa)) == steps - 2


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_log_probability_is_a_denoising_error(prediction_type):
    """The float32 error against the pseudo-target gives torch.distributions' log-probability."""
    latents, prediction, noise = drawn(3, 5, 4, 8, 8)
    for step in reverse_steps(SD15 | {"prediction_type": prediction_type}, sampler(12)):
        mean = step.mean(latents, prediction)
        following = mean + step.sigma * noise
        expected = torch.distributions.Normal(mean, step.sigma).log_prob(following).flatten(1).mean(1)
        target = step.pseudo_target(latents, following)
        exact = -step.kappa * (prediction - target).square().flatten(1).mean(1) + step.offset
        torch.testing.assert_close(exact, expected, rtol=1e-9, atol=1e-11)
        # As in training: latents, prediction and their differences in float32.
        latents32, prediction32, following32 = latents.float(), prediction.float(), following.float()
        error = denoising_errors(prediction32, step.pseudo_target(latents32, following32), backend="torch")
        quadratic = expected - step.offset
        torch.testing.assert_close((-step.kappa * error).double(), quadratic, rtol=2e-6, atol=0)


def test_log_probability_over_many_draws():
    """Its expectation is -1/2 - log sigma - log(2 pi)/2; 1e5 draws of one element, within three standard errors."""
    step = reverse_steps(SD15, sampler(12))[4]
    latents, prediction = torch.full((100_000, 1), 0.7, dtype=torch.float64), drawn(1, 1, seed=1)
    following = step.mean(latents, prediction) + step.sigma * drawn(100_000, 1, seed=3)
    error = (prediction - step.pseudo_target(latents, following)).square().mean(1)
    probability = -step.kappa * error + step.offset
    expected = -0.5 - math.log(step.sigma) - 0.5 * math.log(2 * math.pi)
    assert abs(probability.mean() - expected) < 3 * probability.std() / len(probability) ** 0.5


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (SD15, {"name": "dpmsolver++"}, "needs sampler.name = ddim"),
        (SD15 | {"clip_sample": True}, {}, r"\(clip_sample\).*set clip_sample to false"),
        (SD15 | {"thresholding": True}, {}, r"\(thresholding\)"),
        ({k: v for k, v in SD15.items() if k != "clip_sample"}, {}, "clip_sample"),  # DDIM's default clips
        (SD15 | {"prediction_type": "sample"}, {}, "'sample'"),
        (SD15 | {"trained_betas": [0.01] * 80 + [0.0] * 20, "num_train_timesteps": 100}, {}, "adds no noise in the"),
        (SD15, {"steps": 1000}, "would sample timestep 1000 of 1000"),
        (SD15, {"steps": 1001}, "only 1000 timesteps"),
    ],
)  # fmt: skip
def test_schedules_without_random_steps_are_refused(config, settings, message):
    with pytest.raises(ConfigError, match=message):
        reverse_steps(config, sampler(**{"steps": 10} | settings))


@pytest.mark.parametrize("eta", [0.0, -1.0, 1.5, math.nan])
def test_eta_out_of_range_is_refused(eta):
    with pytest.raises(ValueError, match="eta: expected a number above 0"):
        reverse_steps(SD15, sampler(10), eta)
