"""DiffusionNFT on real micro-batches: samples, noising and gradient against the textbook form in float64."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from seppo_fast.utils.random import keyed_noise
from tests.helpers.rewarded import gradients, predicted, rewarded_config, rewards_of, staged
from tests.helpers.tiny import tiny_pipeline

SECTIONS = {"rl": {"spread": "group"}, "reference": {"uses": 2}, "train": {"pairs_per_update": 12}}


@pytest.fixture(scope="module")
def velocity(tmp_path_factory):
    """A folder with a tiny v-prediction pipeline."""
    return tiny_pipeline(tmp_path_factory.mktemp("velocity") / "pipeline", prediction_type="v_prediction")


def whole(stages):
    """Returns all rows of update 3."""
    return next(stages.batch.micro_batches(12))


def samples_of(stages):
    """Returns the 6 samples that update 3 learns from, each of which is in two rows."""
    winners = whole(stages).pairs.winners
    assert winners.shape == (12, 4, 8, 8) and torch.equal(winners[::2], winners[1::2])
    return winners[::2]


def sampled(stages, model, key):
    """Returns the sample of a float64 network by diffusers' own loop, with guidance and without noise in the steps."""
    scheduler = DDIMScheduler.from_config(stages.trainer.family.scheduler_config)
    scheduler.set_timesteps(3)
    latents, example = keyed_noise(0, "sample", [key], (4, 8, 8)).double(), key[1] % len(stages.trainer.cache)
    for time in scheduler.timesteps:
        with torch.no_grad():
            prediction = predicted(stages, model, latents, time.view(1), [example])
        latents = scheduler.step(prediction, time, latents, eta=0.0).prev_sample
    return latents[0]


def test_samples_are_those_of_the_newest_policy(tiny, tmp_path):
    """Three of each prompt."""
    stages = staged(rewarded_config(tiny, tmp_path, "nft", **SECTIONS))
    (first, second) = stages.trainer.method._maker.sample_ids(3)
    samples = samples_of(stages).double()
    for place, key in ((0, (3, first)), (5, (3, second, 2))):
        torch.testing.assert_close(samples[place], sampled(stages, stages.newest, key), rtol=1e-4, atol=1e-4)
        assert (samples[place] - sampled(stages, stages.initial, key)).abs().max() > 1e-3


def test_rows_of_a_sample_have_noise_of_their_own(tiny, tmp_path):
    stages = staged(rewarded_config(tiny, tmp_path, "nft", **SECTIONS))
    pairs = whole(stages).pairs
    assert len({tuple(row.flatten()[:4].tolist()) for row in pairs.noise}) == 12
    assert len(set(pairs.times.tolist())) > 8 and pairs.times.min() >= 0 and pairs.times.max() < 1000
    assert pairs.sample_ids == tuple(i for i in stages.trainer.method._maker.sample_ids(3) for _ in range(6))
    parts = list(stages.batch.micro_batches(5))
    assert [len(part) for part in parts] == [5, 5, 2]
    assert torch.equal(torch.cat([part.pairs.noise for part in parts]), pairs.noise)


def textbook(stages, optimality, mix, kl):
    """Returns the mean loss of an update in float64: DiffusionNFT with implicit policies, as published, and its KL."""
    trainer, pairs = stages.trainer, whole(stages).pairs
    kept = DDIMScheduler.from_config(trainer.family.scheduler_config).alphas_cumprod.double()[pairs.times]
    signal, spread = (part.sqrt().view(-1, 1, 1, 1) for part in (kept, 1 - kept))
    clean, noise = pairs.winners.double(), pairs.noise.double()
    noisy = signal * clean + spread * noise
    velocity = trainer.family.schedule.prediction_type == "v_prediction"
    target = signal * noise - spread * clean if velocity else noise
    examples = [number % len(trainer.cache) for number in pairs.sample_ids]
    conditioning = trainer.cache.conditioning(examples).map(torch.Tensor.double)

    def predict(model):
        return trainer.family.denoise(model, noisy, pairs.times, conditioning)  # without guidance

    with torch.no_grad():
        old, initial = predict(stages.newest), predict(stages.initial)
    prediction = predict(stages.policy)

    def loss(implicit):
        difference = implicit - target
        divisor = difference.detach().abs().flatten(1).mean(1).clamp(min=1e-5)
        return difference.square().flatten(1).mean(1) / divisor

    plus, minus = (1 - mix) * old + mix * prediction, (1 + mix) * old - mix * prediction
    both = 5 * (optimality * loss(plus) + (1 - optimality) * loss(minus)) / mix
    return (both + kl * (prediction - initial).square().flatten(1).mean(1)).mean()


@pytest.mark.parametrize(("kind", "mix", "kl"), [("epsilon", 1.0, 0.0), ("epsilon", 0.5, 50.0), ("v", 0.3, 0.0)])
def test_the_gradient(tiny, velocity, tmp_path, kind, mix, kl):
    sections = SECTIONS | {"rl": {"spread": "group", "mix": mix, "kl": kl}}
    stages = staged(rewarded_config(velocity if kind == "v" else tiny, tmp_path, "nft", **sections))
    rewards = rewards_of(stages.trainer, samples_of(stages)).reshape(2, 3)
    advantage = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, keepdims=True) + 1e-4)
    optimality = torch.from_numpy(np.repeat(advantage.ravel() / 10 + 0.5, 2))
    torch.testing.assert_close(whole(stages).optimality.double(), optimality, rtol=1e-4, atol=1e-6)

    sums = stages.trainer.learner._accumulate(stages.batch)
    found = gradients(stages.trainer.policy)
    loss = textbook(stages, optimality, mix, kl)
    loss.backward()
    expected = gradients(stages.policy)
    assert sums["loss"] / 12 == pytest.approx(loss.item(), rel=1e-5)
    assert (found - expected).norm() < 2e-4 * expected.norm()
    if kl:
        assert sums["kl"] > 0 and sums["loss"] == pytest.approx(
            sums["positive_loss"] + sums["negative_loss"] + sums["kl"], rel=1e-5
        )
        stages.policy.zero_grad()
        textbook(stages, optimality, mix, 0.0).backward()
        assert (gradients(stages.policy) - expected).norm() > 0.01 * expected.norm()
