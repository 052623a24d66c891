"""Methods that train on the sampler's steps: their gradient in the weights against the textbook form in float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler

from seppo_fast.methods.reverse.method import clip_for
from tests.helpers.rewarded import gradients, predicted, rewarded_config, rewards_of, staged
from tests.helpers.tiny import tiny_pipeline

STEPS = 3


@pytest.fixture(scope="module")
def velocity(tmp_path_factory):
    """A folder with a tiny v-prediction pipeline."""
    return tiny_pipeline(tmp_path_factory.mktemp("velocity") / "pipeline", prediction_type="v_prediction")


def textbook_step(stages, latents, prediction, timestep):
    """Returns the distribution of the next latents: DDIM, eq. 12 and 16, with eta = 1."""
    scheduler = DDPMScheduler.from_config(stages.trainer.family.scheduler_config)
    kept = scheduler.alphas_cumprod.double()
    now, following = kept[timestep].view(-1, 1, 1, 1), kept[(timestep - 1000 // STEPS).clamp(min=0)].view(-1, 1, 1, 1)
    latents = latents.double()
    if scheduler.config.prediction_type == "v_prediction":
        prediction = now.sqrt() * prediction + (1 - now).sqrt() * latents
    clean = (latents - (1 - now).sqrt() * prediction) / now.sqrt()
    variance = (1 - following) / (1 - now) * (1 - now / following)
    mean = following.sqrt() * clean + (1 - following - variance).sqrt() * prediction
    return torch.distributions.Normal(mean, variance.sqrt())


def timesteps(stages):
    """Returns the timesteps of leading spacing with an offset of 1, from noise to data."""
    assert [step.timestep for step in stages.batch.steps] == [667, 334, 1]
    return torch.tensor([667, 334, 1])


class Rows:
    """What one step of a number of samples looks like: latents before and after, times, prompts."""

    def __init__(self, stages, trajectories, examples):
        count = len(trajectories)
        self.stages = stages
        self.before, self.after = (trajectories[:, part].flatten(0, 1) for part in (slice(0, -1), slice(1, None)))
        self.times = timesteps(stages).repeat(count)
        self.examples = [example for example in examples for _ in range(STEPS)]

    def step(self, model, **options):
        prediction = predicted(self.stages, model, self.before, self.times, self.examples, **options)
        return textbook_step(self.stages, self.before, prediction, self.times)

    def log_probability(self, model, **options):
        return self.step(model, **options).log_prob(self.after.double()).flatten(1).mean(1)


def own_examples(stages):
    """Returns the examples of the update's 6 samples."""
    trainer = stages.trainer
    group = trainer.config.samples_per_prompt
    ids = trainer.method._maker.sample_ids(3)
    return [sample % len(trainer.cache) for sample in ids for _ in range(group)]


def iteration(stages):
    """Returns the trajectories of the iteration's 12 samples, of which the last 6 belong to update 3."""
    return stages.batch.store.view(12, STEPS + 1, 4, 8, 8)


def assert_same_gradient(stages, textbook):
    """Compares what the learner accumulates, in micro-batches of 4 rows, with autograd through the textbook's loss.

    Returns:
        The logged sums.
    """
    sums = stages.trainer.learner._accumulate(stages.batch)
    found = gradients(stages.trainer.policy)
    loss = textbook()
    loss.backward()
    expected = gradients(stages.policy)
    assert sums["loss"] / stages.batch.total == pytest.approx(loss.item(), rel=2e-4, abs=1e-6)
    assert (found - expected).norm() < 2e-4 * expected.norm()
    if stages.trainer.config.sampler.guidance > 1:
        stages.policy.zero_grad()
        textbook(detach=True).backward()
        assert (gradients(stages.policy) - expected).norm() > 0.1 * expected.norm()  # both parts count
    return sums


@pytest.mark.parametrize(
    ("kind", "guidance", "kl"),
    [("epsilon", 1.0, 0.0), ("epsilon", 3.0, 0.0), ("v_prediction", 3.0, 0.0), ("epsilon", 1.0, 30.0),
     ("epsilon", 3.0, 30.0)],
)  # fmt: skip
def test_the_clipped_policy_gradient(tiny, velocity, tmp_path, kind, guidance, kl):
    """DDPO with two samples of a prompt, or with `kl` GRPO with three; ratios on both sides of the clip."""
    objective, clip = ("grpo" if kl else "ddpo"), 4e-4
    rl = {"clip": clip} | ({"kl": kl} if kl else {"samples_per_prompt": 2})
    path = tiny if kind == "epsilon" else velocity
    stages = staged(rewarded_config(path, tmp_path, objective, rl=rl, sampler={"guidance": guidance}))
    rewards = rewards_of(stages.trainer, iteration(stages)[:, -1])
    groups = rewards.reshape(-1, stages.trainer.config.samples_per_prompt)
    mean = groups.mean(1, keepdims=True) if kl else groups.mean()
    advantage = torch.from_numpy(((groups - mean) / (rewards.std() + (1e-4 if kl else 1e-6))).ravel()[6:])
    assert advantage.abs().max() < 5 and len(stages.batch) == stages.batch.total == 6 * STEPS
    advantage = advantage.repeat_interleave(STEPS)
    torch.testing.assert_close(stages.batch.advantage.double(), advantage, rtol=1e-5, atol=1e-6)

    rows = Rows(stages, iteration(stages)[6:], own_examples(stages))
    with torch.no_grad():
        old = rows.log_probability(stages.newest)
        initial = rows.step(stages.initial)
    ratios, divergences = [], []

    def textbook(**options):
        ratio = (rows.log_probability(stages.policy, **options) - old).exp()
        ratios.append(ratio.detach())
        loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip)).mean()
        if kl:
            divergence = torch.distributions.kl_divergence(rows.step(stages.policy, **options), initial).mean()
            divergences.append(divergence)
            loss = loss + kl * divergence
        return loss

    sums = assert_same_gradient(stages, textbook)
    excess = ratios[0] - 1
    assert (excess > clip).any() and (excess < -clip).any() and (excess.abs() < clip).any()
    clipped = (excess.abs() > clip).view(6, STEPS).sum(0).tolist()
    assert [sums[f"clipped_step{step}"] for step in (1, 2, 3)] == clipped and sums["clipped"] == sum(clipped)
    means = stages.trainer.method.averages(dict(sums), len(stages.batch))
    assert [means[f"clipped_step{step}"] for step in (1, 2, 3)] == [count / 6 for count in clipped]
    assert not any(name.startswith("rows_step") for name in means)
    if kl:
        assert means["kl"] == pytest.approx(kl * divergences[0].item(), rel=1e-4) and means["kl"] > 0.01
    assert means["log_ratio_square"] == pytest.approx(ratios[0].log().square().mean().item(), rel=1e-3)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_preference_between_two_samples(tiny, tmp_path, guidance):
    """D3PO, relative to the initial policy, with some ratios clamped."""
    clamp, beta = 2e-3, 3.0
    sections = {"rl": {"clip": clamp}, "train": {"beta": beta}, "sampler": {"guidance": guidance}}
    stages = staged(rewarded_config(tiny, tmp_path, "d3po", **sections))
    trajectories = iteration(stages)
    assert torch.equal(trajectories[::2, 0], trajectories[1::2, 0])  # one initial noise for both
    assert not torch.equal(trajectories[::2, 1], trajectories[1::2, 1])
    rewards = rewards_of(stages.trainer, trajectories[:, -1])[6:].reshape(3, 2)
    sign = torch.from_numpy(np.sign(rewards[:, 0] - rewards[:, 1])).repeat_interleave(STEPS)
    assert set(sign.tolist()) == {1.0, -1.0} and torch.equal(stages.batch.advantage.double(), sign)
    assert len(stages.batch) == stages.batch.total == 3 * STEPS

    examples = own_examples(stages)
    both = [Rows(stages, trajectories[6 + half :: 2], examples[half::2]) for half in (0, 1)]
    with torch.no_grad():
        initial = [rows.log_probability(stages.initial) for rows in both]
    seen = []

    def textbook(**options):
        ratios = [
            (rows.log_probability(stages.policy, **options) - old).exp()
            for rows, old in zip(both, initial, strict=True)
        ]
        seen.append(torch.stack(ratios).detach())
        first, second = (ratio.clamp(1 - clamp, 1 + clamp).log() for ratio in ratios)
        return F.softplus(-beta * sign * (first - second)).mean()

    sums = assert_same_gradient(stages, textbook)
    outside = (seen[0] - 1).abs() > clamp
    assert outside.any() and not outside.all() and sums["clipped"] == outside.any(0).sum()


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_preference_between_two_candidates(tiny, tmp_path, guidance):
    """SPO: both candidates follow one latent, so one prediction serves both, and the losses' squares cancel."""
    clamp, beta = 2e-3, 3.0
    sections = {"rl": {"clip": clamp}, "train": {"beta": beta}, "sampler": {"guidance": guidance}}
    stages = staged(rewarded_config(tiny, tmp_path, "spo", **sections))
    compared = STEPS - 1
    assert len(stages.batch) == stages.batch.total == 6 * compared
    now, best, worst = (part.flatten(0, 1) for part in stages.batch.store.view(12, compared, 3, 4, 8, 8)[6:].unbind(2))
    times = timesteps(stages)[1:].repeat(6)
    examples = [example for example in own_examples(stages) for _ in range(compared)]

    def log_probabilities(model, **options):
        prediction = predicted(stages, model, now, times, examples, **options)
        step = textbook_step(stages, now, prediction, times)
        return torch.stack([step.log_prob(after.double()).flatten(1).mean(1) for after in (best, worst)]), prediction

    with torch.no_grad():
        initial, reference = log_probabilities(stages.initial)
    seen = []

    def textbook(**options):
        made, prediction = log_probabilities(stages.policy, **options)
        seen.append((made.detach() - initial, prediction.detach()))
        first, second = (made - initial).exp().clamp(1 - clamp, 1 + clamp).log()
        return F.softplus(-beta * (first - second)).mean()

    sums = assert_same_gradient(stages, textbook)
    log_ratios, prediction = seen[0]
    assert sums["clipped"] == ((log_ratios.exp() - 1).abs() > clamp).any(0).sum()
    # log rho_w - log rho_l = -kappa (D_w - D_l) = 2 kappa mean (p - q)(T_w - T_l), and T_w - T_l = (x'_w - x'_l) / b
    steps = [stages.batch.steps[index] for index in (1, 2)] * 6
    kappa = torch.tensor([step.kappa for step in steps], dtype=torch.float64)
    between = (best - worst).double() / torch.tensor([step.b for step in steps]).double().view(-1, 1, 1, 1)
    linear = 2 * kappa * ((prediction - reference) * between).flatten(1).mean(1)
    torch.testing.assert_close(linear, log_ratios[0] - log_ratios[1], rtol=1e-6, atol=1e-9)


def test_the_clip_range_follows_the_size_of_a_latent():
    assert [clip_for(numbers) for numbers in (256, 16384, 65536)] == pytest.approx([8e-4, 1e-4, 5e-5], rel=1e-12)
