"""Rolling out ahead: samples in sampling batches, errors in the learner's micro-batches, and pairs that wait."""

import pytest
import torch

from seppo_fast.methods.pairs import noised
from seppo_fast.train.trainer import Trainer
from seppo_fast.utils.errors import CheckpointError
from tests.helpers.calls import embeds
from tests.helpers.runs import collected, tiny_config


def started(tiny, tmp_path, **sections):
    made = Trainer(tiny_config(tiny, tmp_path, **sections))
    made.add_checkpoint()
    return made


@pytest.fixture
def trainer(tiny, tmp_path):
    return started(tiny, tmp_path)


def guided_inputs(rows):
    generator = torch.Generator().manual_seed(0)
    noise, prompts = torch.randn(rows, 4, 8, 8, generator=generator), torch.randn(rows, 16, 16, generator=generator)
    return noise, embeds(prompts), embeds(torch.randn(1, 16, 16, generator=generator))


def test_reference_errors_are_those_of_a_plain_float64_mean(trainer):
    pairs = collected(trainer, 0)
    errors = []
    with torch.no_grad():
        for batch in pairs.micro_batches(4):
            shown = noised(batch, trainer.family.schedule, trainer.denoiser.device)
            prediction = trainer.denoiser.denoise(trainer.policy, *shown[:3])
            difference = prediction.double() - shown.target.double().repeat(2, 1, 1, 1)
            errors.append(difference.square().mean(dim=(1, 2, 3)).chunk(2))
    expected = torch.cat([winner for winner, _ in errors] + [loser for _, loser in errors])
    assert pairs.ref_error.dtype == torch.float32
    torch.testing.assert_close(pairs.ref_error.double(), expected, rtol=1e-6, atol=0)


def test_samples_do_not_depend_on_the_batch(trainer):
    noise, prompts, uncond = guided_inputs(16)
    whole = trainer.denoiser.sample(trainer.policy, trainer.sampler, noise, prompts, uncond)
    assert whole.shape == noise.shape
    for row in (0, 5, 15):
        one = slice(row, row + 1)
        alone = trainer.denoiser.sample(trainer.policy, trainer.sampler, noise[one], prompts.take(one), uncond)
        torch.testing.assert_close(whole[row : row + 1], alone, rtol=1e-4, atol=1e-5)


def test_the_references_samples_come_from_the_drawn_weights_and_the_pairs_own_prompt(trainer, tiny, tmp_path):
    """Neither from the policy nor from the empty prompt that replaces a dropped one."""
    before = collected(trainer, 1).losers
    with torch.no_grad():
        for parameter in trainer.policy.parameters():
            parameter.add_(0.05)
    trainer.method.rollout.waiting.clear()
    assert torch.equal(collected(trainer, 1).losers, before)
    dropping = collected(started(tiny, tmp_path, data={"prompt_dropout": 1.0}), 1)
    assert torch.equal(dropping.losers, before)
    assert (dropping.conditioning["prompt_embeds"] == trainer.cache.conditioning([None])["prompt_embeds"]).all()


@pytest.mark.parametrize(
    ("sections", "windows"),
    [
        ({"train": {"updates": 10, "updates_per_iteration": 4}, "reference": {"window": 3}}, [3, 1, 3, 1, 2]),
        ({"train": {"updates": 5, "updates_per_iteration": 4}, "reference": {"redraw": "update"}}, [1, 1, 1, 1, 1]),
        # 8 batches of 4 samples fill 6 updates of 6 pairs
        ({"train": {"updates": 12, "updates_per_iteration": 10}}, [6, 4, 2]),
        ({"train": {"updates": 3, "updates_per_iteration": 3}, "sampler": {"batch": 1}}, [2, 1]),
    ],
    ids=["configured", "drawn each update", "filling batches", "small batches"],
)
def test_windows_follow_each_other_and_end_at_the_next_draw(tiny, tmp_path, sections, windows):
    rollout = started(tiny, tmp_path, **sections).method.rollout
    lengths, update = [], 0
    while update < sections["train"]["updates"]:
        window = rollout.window(update)
        assert window[0] == update
        assert all(rollout.window(later) == window for later in window)  # also if a run resumes in its middle
        lengths.append(len(window))
        update = window[-1] + 1
    assert lengths == windows


def test_samples_of_a_window_are_made_in_full_batches(tiny, tmp_path):
    trainer = started(tiny, tmp_path, train={"updates": 4, "updates_per_iteration": 4}, reference={"window": 3})
    rows, denoise = [], trainer.denoiser.denoise

    def recording(model, latents, timesteps, embeds):
        if not torch.is_grad_enabled():  # the errors are computed with grad
            rows.append(len(latents))
        return denoise(model, latents, timesteps, embeds)

    trainer.denoiser.denoise = recording
    windows = [collected(trainer, update) for update in range(3)]
    # 18 samples in batches of 4, doubled by guidance, two steps each; nothing is generated for later updates
    assert rows == [8] * 8 + [4] * 2
    for update, ahead in enumerate(windows):
        alone = collected(started(tiny, tmp_path, reference={"window": 1}), update)
        assert alone.sample_ids == ahead.sample_ids
        assert torch.equal(alone.noise, ahead.noise) and torch.equal(alone.times, ahead.times)
        torch.testing.assert_close(alone.losers, ahead.losers, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(alone.ref_error, ahead.ref_error, rtol=1e-4, atol=1e-5)


def test_a_batch_that_does_not_fit_halves_itself_and_says_so(tiny, tmp_path, capsys):
    plain = collected(started(tiny, tmp_path), 0)
    trainer = started(tiny, tmp_path, sampler={"batch": 64})
    denoise, largest = trainer.denoiser.denoise, 6

    def small_device(model, latents, timesteps, embeds):
        if len(latents) > largest and not torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return denoise(model, latents, timesteps, embeds)

    trainer.denoiser.denoise = small_device
    capsys.readouterr()
    pairs = collected(trainer, 0)
    torch.testing.assert_close(pairs.losers, plain.losers, rtol=1e-4, atol=1e-5)
    said = capsys.readouterr().out
    assert "out of memory" in said and "sampler.batch = 3" in said and "sampler.batch = 1" not in said
    collected(trainer, 2)
    assert "out of memory" not in capsys.readouterr().out  # the smaller batch is kept
    largest = 0
    trainer.method.rollout.waiting.clear()
    with pytest.raises(torch.OutOfMemoryError):
        collected(trainer, 0)


def test_samples_beyond_the_budget_wait_on_disk_and_leave_nothing_there(tiny, tmp_path, monkeypatch):
    in_memory = collected(started(tiny, tmp_path), 0)
    mapped = []
    from_file = torch.from_file
    monkeypatch.setattr("torch.from_file", lambda *a, **k: mapped.append(k["size"]) or from_file(*a, **k))
    trainer = started(tiny, tmp_path, reference={"pairs_gib": 1e-6, "window": 2})
    on_disk = collected(trainer, 0)
    assert mapped == [2 * 6 * 4 * 8 * 8]
    assert torch.equal(on_disk.losers, in_memory.losers) and torch.equal(on_disk.ref_error, in_memory.ref_error)
    assert not list((tmp_path / "cache").glob("seppo-samples*"))


def test_no_room_for_waiting_samples_says_so(tiny, tmp_path, monkeypatch):
    import errno

    def full(handle, start, length):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(CheckpointError, match="no space left"):
        collected(started(tiny, tmp_path, reference={"pairs_gib": 0.0}), 0)


def test_low_memory_parks_the_learner_while_a_reference_is_resident(tiny, tmp_path):
    """On a CPU the test cannot see where the state is moved, only that it is moved and that results stay the same."""
    finals = []
    for memory in ("low", "balanced"):
        trainer = started(tiny, tmp_path, memory=memory, model={"gradient_checkpointing": False})
        assert trainer.config.reference.park is (memory == "low")
        moves = []
        move = trainer.learner._move_state
        trainer.learner._move_state = lambda device, moves=moves, move=move: moves.append(device.type) or move(device)
        for update in range(2):
            trainer.learner.step(collected(trainer, update), update)
        trainer.method.rollout.waiting.clear()
        trainer.learner.step(collected(trainer, 1), 1)
        assert len(moves) == (4 if memory == "low" else 0)
        finals.append(torch.cat([weight.detach().flatten() for weight in trainer.policy.parameters()]))
    assert torch.equal(*finals)
