"""SPO's sampling: what is compared, which candidates are kept, and how often the network runs."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from seppo_fast.methods.reverse.spo import best_and_worst
from seppo_fast.train.trainer import Trainer
from seppo_fast.utils.random import keyed_noise
from tests.helpers.rewarded import rewarded_config
from tests.helpers.runs import collected

ONE = {"updates": 1, "updates_per_iteration": 1, "pairs_per_update": 1, "micro_batch": 16}


def started(tiny, folder, **sections):
    trainer = Trainer(rewarded_config(tiny, folder, "spo", **sections))
    trainer.add_checkpoint()
    return trainer


def counted(trainer):
    """Counts what a trainer runs from now on: rows of the network, decoded and scored pictures."""
    counts = dict.fromkeys(("forwards", "rows", "decoded", "scored"), 0)

    def forward(module, inputs, output):
        counts["forwards"] += 1
        counts["rows"] += len(inputs[0])

    trainer.policy.register_forward_hook(forward)
    score, decode = trainer.method._score._scored, trainer.family.decode

    def scoring(prompts, pictures):
        counts["scored"] += len(prompts)
        return score(prompts, pictures)

    def decoding(latents):
        counts["decoded"] += len(latents)
        return decode(latents)

    trainer.method._score._scored, trainer.family.decode = scoring, decoding
    return counts


def test_the_published_counts(tiny, tmp_path):
    """20 steps, the first 4 without candidates, then 4 each, with guidance: 65 guided forwards a prompt."""
    trainer = started(tiny, tmp_path, rl={"candidates": 4, "plain_steps": 4}, sampler={"steps": 20}, train=ONE)
    counts, initial = counted(trainer), trainer.method._initial
    trainer.method._initial = lambda model, batch: None
    batch = collected(trainer, 0)
    assert counts == {"forwards": 65, "rows": 130, "decoded": 64, "scored": 64}
    assert len(batch) == batch.total == 16 and batch.store.shape == (48, 4, 8, 8)

    initial(trainer.policy, batch)
    trainer.learner._accumulate(batch)
    assert counts["rows"] == 130 + 16 * (2 + 2)  # one guided forward per pair and policy, the initial and the present


def test_candidates_are_judged_by_what_they_would_become(tiny, tmp_path):
    """Repeats a rollout with diffusers' scheduler."""
    trainer = started(tiny, tmp_path, rl={"candidates": 3, "plain_steps": 1}, sampler={"steps": 4}, train=ONE)
    batch, family = collected(trainer, 0), trainer.family
    (number, *_) = trainer.method._maker.sample_ids(0)
    rows = trainer.cache.conditioning([None, number % len(trainer.cache)])
    scheduler = DDIMScheduler.from_config(family.scheduler_config)
    scheduler.set_timesteps(4)
    times = [int(time) for time in scheduler.timesteps]

    def predict(latents, time):
        empty, own = (
            family.denoise(trainer.policy, latents, torch.tensor([time]), rows.take(slice(row, row + 1)))
            for row in (0, 1)
        )
        return empty + 3.0 * (own - empty)

    def following(latents, prediction, index, candidate):
        noise = keyed_noise(0, "sde", [(0, number, candidate, index)], (4, 8, 8))
        return scheduler.step(prediction, times[index], latents, eta=1.0, variance_noise=noise).prev_sample

    def score(latents):
        return family.decode(latents).mean() / 255

    latents = keyed_noise(0, "sample", [(0, number)], (4, 8, 8))
    kept = batch.store.view(3, 3, 4, 8, 8)
    with torch.no_grad():
        latents = following(latents, predict(latents, times[0]), 0, 0)
        for index in (1, 2, 3):
            made = [following(latents, predict(latents, times[index]), index, candidate) for candidate in range(3)]
            clean = made
            if index < 3:
                clean = [
                    scheduler.step(predict(one, times[index + 1]), times[index + 1], one).pred_original_sample
                    for one in made
                ]
            scores = [score(one) for one in clean]
            expected = [latents, made[int(np.argmax(scores))], made[int(np.argmin(scores))]]
            torch.testing.assert_close(kept[index - 1], torch.cat(expected), rtol=1e-4, atol=1e-4)
            if index < 3:  # the trajectory continues from one of them, drawn at random
                near = [(one[0] - kept[index, 0]).abs().max() < 1e-3 for one in made]
                assert sum(near) == 1
                latents = made[near.index(True)]


def test_a_trajectory_continues_from_any_candidate(tiny, tmp_path):
    """Best, worst and the third, about equally often; which one depends on the sample's key alone."""
    method = started(tiny, tmp_path).method
    drawn = [method._branch((0, sample), 1) for sample in range(300)]
    assert min(np.bincount(drawn, minlength=3)) > 70
    assert drawn == [method._branch((0, sample), 1) for sample in range(300)] and drawn[0:50] != [
        method._branch((0, sample), 2) for sample in range(50)
    ]


def test_best_and_worst_of_several():
    scores = np.array([[1.0, 2.0, 5.0, np.nan], [3.0, 2.0, -1.0, 0.0], [2.0, 2.0, 5.0, 1.0]])
    best, worst, gap = best_and_worst(scores)
    assert best.tolist()[:3] == [1, 0, 0] and worst.tolist()[:3] == [0, 0, 1]
    assert gap[:3].tolist() == [2.0, 0.0, 6.0] and np.isnan(gap[3])


def test_a_gap_must_be_exceeded(tiny, tmp_path):
    """A pair whose scores differ by exactly `rl.gap` is left out, and so are missing scores."""
    trainer = started(tiny, tmp_path, rl={"gap": 0.5})
    gaps = np.array([0.5, np.nextafter(0.5, 1), np.nan, 0.0])
    kept = trainer.method._advantages(0, {(0, 0): gaps})[(0, 0)]
    assert kept[1] == 1 and np.isnan(kept[[0, 2, 3]]).all()


def test_pairs_of_a_run_exceed_the_gap(tiny, tmp_path):
    """With scores that are whole numbers, all pairs have a gap of 0, of 1, or of more."""
    logs, kept = [], []
    for gap in (0.0, 1.0):
        sections = {"rl": {"reward": "tests.helpers.rewarded:levels", "gap": gap, "candidates": 2}}
        trainer = started(tiny, tmp_path, **sections)
        seen = []
        score = trainer.method._scores
        trainer.method._scores = lambda *inputs, score=score, seen=seen: seen.append(score(*inputs)) or seen[-1]
        batches = [collected(trainer, update) for update in (0, 1)]
        gaps = np.concatenate([np.ptp(scores, axis=0) for scores in seen])
        assert len(gaps) == 12 * 2 and {0.0, 1.0} < set(gaps)
        assert sum(map(len, batches)) == (gaps > gap).sum()
        logs.append(trainer.method.averages({}, 1))
        kept.append((gaps > gap).mean())
        for batch in batches:
            best, worst = batch.store[batch.following[:, 0]].unbind(1)
            assert not any(torch.equal(*both) for both in zip(best, worst, strict=True))
    assert [log["kept"] for log in logs] == pytest.approx(kept) and kept[0] > kept[1] > 0
    assert logs[0]["gap"] == logs[1]["gap"] == pytest.approx(gaps.mean()) and logs[0]["reward_mean"] > 1


def test_encoders_are_parked_once_an_iteration(tiny, tmp_path):
    """Not after each of the sampler's steps, since parking moves them to the host."""
    trainer, parked = started(tiny, tmp_path), []
    trainer.family.park_encoders = lambda: parked.append(1)
    collected(trainer, 0)
    collected(trainer, 1)
    assert len(parked) == 1
