"""DDPO and DiffusionNFT on a linear policy of two-dimensional latents, where everything expected is known exactly.

The policy predicts `p = W x + w` at every time. Its reverse process is Gaussian, so that the expected reward
`-|x_0 - goal|^2` and its gradient follow from the mean and the covariance.
"""

import math

import numpy as np
import pytest
import torch

from seppo_fast.config.schema import SamplerConfig
from seppo_fast.diffusion.steps import reverse_steps
from seppo_fast.methods.losses.nft import nft, nft_targets
from seppo_fast.methods.losses.policy_gradient import ddpo
from seppo_fast.methods.losses.rows import mean_absolute_errors, weighted_error_gradient
from seppo_fast.methods.rewards.advantages import group_advantages

SCHEDULE = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "steps_offset": 1, "clip_sample": False, "prediction_type": "epsilon",
}  # fmt: skip
STEPS = reverse_steps(SCHEDULE, SamplerConfig(steps=3, guidance=1.0))
GOAL = torch.tensor([1.0, -0.5], dtype=torch.float64)
N = 2  # elements of a latent; log-probabilities are means over them, so their gradients are 1/N of the true ones


class Policy:
    """The parameters: W in the first two columns and w in the last, of a (2, 3) tensor."""

    def __init__(self):
        self.weights = torch.tensor([[0.6, 0.1, 0.05], [-0.1, 0.5, 0.0]], dtype=torch.float64)

    def __call__(self, latents):
        return with_one(latents) @ self.weights.T

    def expected_reward(self, weights=None):
        """Propagates mean and covariance of the latents through the steps."""
        weights = self.weights if weights is None else weights
        mean, covariance = torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
        for step in STEPS:
            factor = step.a * torch.eye(2, dtype=torch.float64) + step.b * weights[:, :2]
            mean = factor @ mean + step.b * weights[:, 2]
            covariance = factor @ covariance @ factor.T + step.sigma**2 * torch.eye(2, dtype=torch.float64)
        return -(mean - GOAL).square().sum() - covariance.trace()


def with_one(latents):
    return torch.cat([latents, torch.ones(len(latents), 1, dtype=latents.dtype)], dim=1)


def errors(prediction, target):
    return (prediction - target).square().mean(1)


def rolled_out(policy, count, rng):
    """Returns all latents of a batch of trajectories, from noise to x_0: (S + 1, count, 2)."""
    latents = [torch.from_numpy(rng.standard_normal((count, 2)))]
    for step in STEPS:
        noise = torch.from_numpy(rng.standard_normal((count, 2)))
        latents.append(step.mean(latents[-1], policy(latents[-1])) + step.sigma * noise)
    return latents


def rewards_of(latents):
    return -(latents - GOAL).square().sum(1)


def ddpo_gradients(policy, latents, advantage):
    """Returns each trajectory's gradient in the weights, (count, 2, 3), by the functions of a training step."""
    total = torch.zeros(len(advantage), 2, 3, dtype=torch.float64)
    for step, before, after in zip(STEPS, latents[:-1], latents[1:], strict=True):
        prediction, target = policy(before), step.pseudo_target(before, after)
        error = errors(prediction, target)
        rows = ddpo(error, error.clone(), torch.full_like(error, step.kappa), advantage, clip=1e-4)
        gradient = weighted_error_gradient(prediction, [target], rows.coefficients) * len(error)
        total += gradient[:, :, None] * with_one(before)[:, None, :]
    return total


def assert_within_errors(each, expected):
    """Compares the mean of each row's gradients with the expected gradient: three standard errors per element."""
    error = each.std(0) / len(each) ** 0.5
    assert ((each.mean(0) - expected).abs() <= 3 * error).all()
    assert (expected.abs() > 10 * error).any()  # it is measured at all


def test_the_gradient_of_ddpo_is_the_policy_gradient():
    policy, rng = Policy(), np.random.default_rng(0)
    latents = rolled_out(policy, 100_000, rng)
    reward = rewards_of(latents[-1])
    measured = policy.expected_reward()
    assert abs(reward.mean() - measured) < 3 * reward.std() / len(reward) ** 0.5
    weights = policy.weights.clone().requires_grad_()
    (expected,) = torch.autograd.grad(-policy.expected_reward(weights), weights)
    assert_within_errors(N * ddpo_gradients(policy, latents, reward - measured), expected)


def nft_gradients(policy, clean, optimality, time, noise):
    """Returns each sample's gradient in the weights, (count, 2, 3), where the old policy is the policy itself."""
    kept = kept_at(time)
    noisy = kept**0.5 * clean + (1 - kept) ** 0.5 * noise
    prediction = policy(noisy)
    targets = nft_targets(noise, prediction, mix=1.0)
    numbers = [errors(prediction, t) for t in targets] + [mean_absolute_errors(prediction, t) for t in targets]
    rows = nft(*numbers, optimality, mix=1.0)
    gradient = weighted_error_gradient(prediction, targets, rows.coefficients) * len(clean)
    return gradient[:, :, None] * with_one(noisy)[:, None, :]


def kept_at(time):
    return float(np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)[time])


def test_the_gradient_of_nft_is_that_of_its_closed_form():
    """With p = omega x, clean x ~ N(0, I) and 2q - 1 = c x / 5, the residual d = p - noise is N(0, s^2 I).

    Then dloss/dw = 10 E[(2q - 1) d / (|d_1| + |d_2|)] = 2 c Cov(x, d) / s * E[z_1^2 / (|z_1| + |z_2|)], and the last
    factor is sqrt(pi/2) (sqrt 2 / pi) ln(1 + sqrt 2) for standard normal z. The gradient in W is odd in all variables,
    so its expectation is 0.
    """
    policy, rng, omega, time = Policy(), np.random.default_rng(1), 0.7, 400
    policy.weights = torch.tensor([[omega, 0, 0], [0, omega, 0]], dtype=torch.float64)
    clean, noise = torch.from_numpy(rng.standard_normal((2, 100_000, 2)))
    direction = torch.tensor([0.5, -0.3], dtype=torch.float64)
    each = nft_gradients(policy, clean, 0.5 + clean @ direction / 10, time, noise)
    signal, spread = kept_at(time) ** 0.5, (1 - kept_at(time)) ** 0.5
    deviation = math.hypot(omega * signal, omega * spread - 1)
    factor = math.sqrt(math.pi / 2) * math.sqrt(2) / math.pi * math.log(1 + math.sqrt(2))
    expected = torch.zeros(2, 3, dtype=torch.float64)
    expected[:, 2] = 2 * direction * omega * signal / deviation * factor
    assert_within_errors(each, expected)


def ddpo_update(policy, latents, rng):
    advantage = torch.from_numpy(group_advantages(rewards_of(latents[-1]).view(1, -1).numpy(), spread="group", clip=5))
    return ddpo_gradients(policy, latents, advantage[0]).mean(0)


def nft_update(policy, latents, rng):
    advantages = group_advantages(rewards_of(latents[-1]).view(1, -1).numpy(), spread="batch", clip=5)
    optimality = torch.from_numpy(advantages[0]) / 10 + 0.5
    noises = torch.from_numpy(rng.standard_normal((len(STEPS), *latents[-1].shape)))
    return sum(
        nft_gradients(policy, latents[-1], optimality, step.timestep, noise).mean(0)
        for step, noise in zip(STEPS, noises, strict=True)
    )


@pytest.mark.parametrize("update", [ddpo_update, nft_update])
def test_the_expected_reward_rises_in_fifty_updates(update):
    policy, rng = Policy(), np.random.default_rng(2)
    before = policy.expected_reward()
    weights = torch.nn.Parameter(policy.weights)
    optimizer = torch.optim.Adam([weights], lr=0.02)
    for _ in range(50):
        policy.weights = weights.detach()
        weights.grad = update(policy, rolled_out(policy, 256, rng), rng)
        optimizer.step()
    policy.weights = weights.detach()
    assert policy.expected_reward() > before / 10  # both are negative
