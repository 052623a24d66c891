"""What methods that learn from rewards have in common: equal weights, groups, missing and equal rewards, memory."""

import math
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from seppo_fast.methods.rewards.method import compared_in_groups
from seppo_fast.references.layout import PackedLayout
from seppo_fast.runs.signals import Interrupted
from seppo_fast.train import train as run
from seppo_fast.train.trainer import Trainer
from seppo_fast.utils.errors import ConfigError
from tests.helpers.rewarded import REWARDED, nudge, rewarded_config, rewards_of
from tests.helpers.runs import collected, weights_of

OWN = "tests.helpers.rewarded:"


def started(tiny, folder, objective, **sections):
    trainer = Trainer(rewarded_config(tiny, folder, objective, **sections))
    trainer.add_checkpoint()
    return trainer


def prompts_of(trainer, update):
    return [trainer.cache.prompts[number % len(trainer.cache)] for number in trainer.method._maker.sample_ids(update)]


def assert_unchanged(trainer, weights):
    assert all(torch.equal(weights[name], weight) for name, weight in weights_of(trainer).items())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("objective", REWARDED)
def test_at_equal_weights(tiny, tmp_path, objective, precision):
    """In the first update of an iteration, and in the second by what was computed ahead: ratios are exactly 1."""
    trainer = started(tiny, tmp_path, objective, model={"precision": precision}, sampler={"steps": 2})
    for update in (0, 1):
        batch = collected(trainer, update)
        parts = list(batch.micro_batches(4))
        assert len(parts) > 1
        for part in parts:
            if objective == "nft":
                assert (part.old is None) == (update == 0)
                part = replace(part, optimality=torch.full_like(part.optimality, 0.5))
                sure = replace(part, optimality=torch.ones_like(part.optimality))
                small, large = (
                    trainer.method.loss(trainer.policy, one, torch.tensor(1.0)).grad for one in (part, sure)
                )
                assert small.abs().max() <= 1e-6 * large.abs().max()
                continue
            step = trainer.method.loss(trainer.policy, part, torch.tensor(1.0))
            assert step.sums["clipped"] == 0 and step.grad.abs().max() > 0
            if objective in ("ddpo", "grpo"):
                assert (part.old_error is None) == (update == 0)
                assert step.sums["log_ratio_square"] == 0 and step.sums["loss"] == (-part.advantage).sum()
            else:
                assert part.old_error is not None
                assert step.sums["loss"] == F.softplus(torch.zeros(len(part))).sum()  # ln 2 each


def test_advantages_of_ddpo_by_the_prompts_own_rewards(tiny, tmp_path):
    """Two iterations over 10 prompts; by the second, all have at least two rewards, of which the last three count."""
    sections = {"rl": {"prompt_buffer": 3, "prompt_count": 2}, "train": {"pairs_per_update": 10}}
    trainer = started(tiny, tmp_path, "ddpo", **sections)
    seen = {}
    for begin in (0, 2):
        trainer.finished = begin
        trainer.add_checkpoint()
        batches = [collected(trainer, update) for update in (begin, begin + 1)]
        rewards = rewards_of(trainer, batches[0].store.view(20, 4, 4, 8, 8)[:, -1])
        prompts = [prompt for update in (begin, begin + 1) for prompt in prompts_of(trainer, update)]
        for prompt, reward in zip(prompts, rewards, strict=True):
            seen.setdefault(prompt, []).append(reward)
        known = [np.array(seen[prompt][-3:]) if len(seen[prompt]) > 1 else rewards for prompt in prompts]
        expected = [(r - own.mean()) / (own.std() + 1e-6) for r, own in zip(rewards, known, strict=True)]
        found = torch.cat([batch.advantage for batch in batches]).double()
        torch.testing.assert_close(found, torch.tensor(expected).repeat_interleave(3), rtol=1e-4, atol=1e-5)
    assert max(map(len, seen.values())) > 3
    assert trainer.method.state(3) != trainer.method.state(4)  # in the middle of the iteration: as it was before it
    assert trainer.method.state(4)["rewards"] == {prompt: own[-3:] for prompt, own in seen.items()}


@pytest.mark.parametrize("objective", REWARDED)
def test_equal_rewards_change_nothing(tiny, tmp_path, objective):
    rl = {"reward": OWN + "constant"} | ({"prompt_count": 5} if objective == "ddpo" else {})
    trainer = started(tiny, tmp_path, objective, rl=rl)
    weights = weights_of(trainer)
    for update in (0, 1):
        batch = collected(trainer, update)
        assert len(batch) == batch.total == 0 and len(list(batch.micro_batches(4))) == 1  # the spare row
        stats = trainer.learner.step(batch, update)
        assert stats["skipped"] == 1 and stats["kept"] == stats["rows"] == stats["unscored"] == 0
        assert stats["reward_mean"] == pytest.approx(0.1) and stats["reward_std"] < 1e-15
        assert math.isnan(stats["loss"]) and math.isnan(stats["grad_norm"])
    assert_unchanged(trainer, weights)
    assert trainer.learner.applied == 0 and trainer.learner.without_rows == 2 and not trainer.learner.optimizer.state
    trainer.learner._accumulate(replace(batch, total=7))  # as if another process had rows
    assert all(weight.grad.abs().max() == 0 for weight in trainer.policy.parameters())  # the spare row weighs nothing


@pytest.mark.parametrize("objective", REWARDED)
def test_samples_without_a_reward_are_left_out_and_counted(tiny, tmp_path, objective):
    trainer = started(tiny, tmp_path, objective, rl={"reward": OWN + "known_small_only"})
    prompts = [prompts_of(trainer, update) for update in (0, 1)]
    known = [["small" in prompt for prompt in update] for update in prompts]
    share = np.concatenate(known).mean()
    assert 0 < share < 1
    for update in (0, 1):
        batch = collected(trainer, update)
        kept = {trainer.cache.prompts[number % len(trainer.cache)] for number in batch.sample_ids if len(batch)}
        assert kept == {prompt for prompt, small in zip(prompts[update], known[update], strict=True) if small}
        rows = {"ddpo": 3, "grpo": 9, "nft": 3, "d3po": 3, "spo": 2}[objective]
        assert len(batch) == batch.total == sum(known[update]) * rows
    stats = trainer.method.averages({"loss": 0.0}, 1)
    assert stats["unscored"] == pytest.approx(1 - share) and stats["kept"] == pytest.approx(share)
    assert all(map(math.isfinite, stats.values())) and stats.get("zero_spread", 0) == 0  # of the groups with rewards


def test_groups_are_kept_or_left_out_whole():
    """A sample whose reward is exactly its group's mean has an advantage of 0, and is kept with its group."""
    rewards = {(0, 0): [0.0, 0.5, 1.0], (0, 1): [0.1, 0.1, 0.1], (1, 0): [0.0, np.nan, 1.0]}
    found = compared_in_groups({place: np.array(values) for place, values in rewards.items()}, "group")
    assert found[0, 0][1] == 0 and found[0, 0][2] == -found[0, 0][0] > 1.2
    assert np.isnan(found[0, 1]).all() and np.isnan(found[1, 0]).all() and list(found) == list(rewards)


def test_latents_that_are_not_finite_have_no_score(tiny, tmp_path):
    trainer = started(tiny, tmp_path, "nft")
    latents = torch.zeros(3, 4, 8, 8)
    latents[1, 0, 0, 0] = torch.nan
    (scores,) = trainer.method._score(["a", "b", "c"], latents)
    assert np.isnan(scores).tolist() == [False, True, False]


def test_an_iterations_samples_are_freed_before_the_next_one(tiny, tmp_path):
    config = rewarded_config(tiny, tmp_path, "grpo", train={"updates": 4})
    seen = []

    def watch(trainer, updates):
        if updates:
            return
        collect = trainer.method.collect

        def collected_with_nothing_kept(update, reference):
            assert update % 2 or all(batch() is None for batch in seen)
            batch = collect(update, reference)
            seen.append(weakref.ref(batch))
            return batch

        trainer.method.collect = collected_with_nothing_kept

    run(config, watch)
    assert len(seen) == 4


def test_a_reward_without_a_single_score_ends_the_run(tiny, tmp_path):
    trainer = started(tiny, tmp_path, "grpo", rl={"reward": OWN + "missing"}, train={"pairs_per_update": 18})
    weights = weights_of(trainer)
    with pytest.raises(ConfigError, match="rl.reward = tests.helpers.rewarded:missing: no score for any of 36 samples"):
        collected(trainer, 0)
    assert_unchanged(trainer, weights)


def test_a_share_of_the_steps_is_chosen_by_the_samples_key(tiny, tmp_path):
    trainer = started(tiny, tmp_path, "grpo", rl={"steps": 0.5, "samples_per_prompt": 3}, sampler={"steps": 4})
    batch = collected(trainer, 0)
    assert len(batch) == batch.total == 6 * 2 and len(trainer.method._steps) == 4
    chosen = [tuple(pair) for pair in batch.step.view(6, 2).tolist()]
    assert all(first < second for first, second in chosen) and len(set(chosen)) > 1
    assert torch.equal(batch.now[:, 0], torch.arange(6).repeat_interleave(2) * 5 + batch.step)
    again = Trainer(rewarded_config(tiny, tmp_path, "grpo", rl={"steps": 0.5}, sampler={"steps": 4}))
    again.add_checkpoint()
    assert torch.equal(collected(again, 0).step, batch.step)
    means = trainer.method.averages({f"rows_step{n}": 1.0 for n in (1, 3)} | {"clipped_step3": 1.0}, 1)
    assert means["clipped_step1"] == 0 and means["clipped_step3"] == 1 and "clipped_step2" not in means


def test_only_the_steps_of_a_window_are_trained(tiny, tmp_path):
    """With the pull to the initial policy, and one random step, of three, from which all samples of a prompt differ."""
    trainer = started(tiny, tmp_path, "grpo", rl={"window": [2, 2], "kl": 0.1})
    batch = collected(trainer, 0)
    assert batch.step.tolist() == [1] * 6 and batch.reference.shape == (6, 1, 4, 8, 8)
    part = next(batch.micro_batches(6))
    assert part.times.tolist() == [334] * 6 and part.kappa.min() > 0
    before = weights_of(trainer)
    stats = trainer.learner.step(batch, 0)
    assert stats["rows"] == 6 and stats["kl"] == 0 and stats["grad_norm"] > 0
    assert not all(torch.equal(before[name], weight) for name, weight in weights_of(trainer).items())


def test_latents_of_an_iteration_are_kept_once(tiny, tmp_path):
    trainer = started(tiny, tmp_path, "ddpo")
    first, second = collected(trainer, 0), collected(trainer, 1)
    assert first.store.data_ptr() == second.store.data_ptr()
    assert first.store.untyped_storage().nbytes() == 12 * 4 * 256 * 4  # samples, latents of each, numbers, bytes
    assert all(step.latents.device == trainer.denoiser.device for step in first.micro_batches(4))


def test_a_policy_that_was_not_kept_has_ratios_to_the_one_that_sampled(tiny, tmp_path, capsys):
    """Where the pool has room for the initial policy only, that one samples, and no update is the policy's own."""
    probe = started(tiny, tmp_path, "ddpo")
    room = 1.5 * PackedLayout.of(probe.policy, torch.float32).size / 2**30
    pool = {"host_gib": room, "disk_gib": 0}
    for objective in ("ddpo", "nft"):
        trainer = started(tiny, tmp_path, objective, reference=pool)
        nudge(trainer.policy, 0)
        trainer.finished = 2
        trainer.add_checkpoint()
        assert "this policy is not kept" in capsys.readouterr().out and trainer.draws.reference(2) == 0
        part = next(collected(trainer, 2).micro_batches(4))
        assert (part.old if objective == "nft" else part.old_error) is not None
        if objective == "ddpo":
            assert trainer.method.loss(trainer.policy, part, torch.tensor(1.0)).sums["log_ratio_square"] > 0


def test_parking_changes_nothing(tiny, tmp_path):
    """A LoRA whose weights and optimizer state leave the device while the past policies are resident."""
    found = []
    for park in (False, True):
        sections = {"model": {"train": "lora", "lora_rank": 2}, "reference": {"park": park}, "sampler": {"steps": 2}}
        trainer = started(tiny, tmp_path, "grpo", rl={"kl": 0.1}, **sections)
        moves, move = [], trainer.learner._move_state
        trainer.learner._move_state = lambda device, moves=moves, move=move: moves.append(device.type) or move(device)
        for update in (0, 1):
            trainer.learner.step(collected(trainer, update), update)
        assert len(moves) == (4 if park else 0)  # there and back, for the newest and for the initial policy
        found.append(weights_of(trainer))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("objective", ["ddpo", "spo"])
def test_an_interrupted_rollout_leaves_the_policy_as_it_was(tiny, tmp_path, objective):
    trainer = started(tiny, tmp_path, objective)
    weights, decode = weights_of(trainer), trainer.family.decode

    def interrupted(latents):
        trainer.interruption.asked = True
        return decode(latents)

    trainer.family.decode = interrupted
    with pytest.raises(Interrupted):
        collected(trainer, 0)
    assert_unchanged(trainer, weights)
    if objective == "ddpo":
        assert trainer.method.state(0)["rewards"] == {}
    trainer.interruption.asked, trainer.family.decode = False, decode
    plain = started(tiny, tmp_path, objective)
    assert torch.equal(collected(trainer, 0).store, collected(plain, 0).store)


def test_running_out_of_memory_halves_the_batch(tiny, tmp_path, capsys):
    """The halved batch is what later iterations use and what the state records."""
    plain = collected(started(tiny, tmp_path, "grpo"), 0)
    trainer = started(tiny, tmp_path, "grpo", sampler={"batch": 64})
    trajectories = trainer.denoiser.trajectories

    def small(model, sampler, noise, *others):
        if len(noise) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return trajectories(model, sampler, noise, *others)

    trainer.denoiser.trajectories = small
    capsys.readouterr()
    batch = collected(trainer, 0)
    assert "sampler.batch = 3" in capsys.readouterr().out and trainer.method.sampling_batch == 3
    torch.testing.assert_close(batch.store, plain.store, rtol=1e-3, atol=1e-4)


def test_the_lower_score_is_better_where_a_scorer_says_so(tiny, tmp_path, monkeypatch):
    """Advantages turn round, and the log keeps the scorer's own direction."""
    up = started(tiny, tmp_path, "grpo")
    first = collected(up, 0)
    monkeypatch.setattr("seppo_fast.scorers.functions.FunctionScorer.higher_is_better", False)
    down = started(tiny, tmp_path, "grpo")
    second = collected(down, 0)
    torch.testing.assert_close(first.advantage, -second.advantage, rtol=1e-6, atol=1e-7)
    assert up.method.averages({}, 1) == down.method.averages({}, 1)
