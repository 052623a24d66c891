"""DITTO: the comparisons of an update, the samples that a run keeps, whole runs, and what is refused."""

import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from seppo_fast.cli import main
from seppo_fast.config.load import parse_config, to_yaml
from seppo_fast.distributed.processes import Processes
from seppo_fast.methods.pairs import noised
from seppo_fast.methods.replay.buffer import Key, SampleBuffer
from seppo_fast.methods.replay.comparisons import Comparisons, shares
from seppo_fast.runs.checkpoint import newest_state, saved_states
from seppo_fast.train import train as run
from seppo_fast.train.preflight import preflight
from seppo_fast.train.trainer import Trainer
from seppo_fast.utils.errors import CheckpointError, ConfigError
from tests.helpers.runs import collected, log_of, tiny_config
from tests.helpers.same_run import assert_same_run


class Ended(Exception):
    """Ends a run from outside."""


def ditto_config(tiny, tmp_path, **sections):
    """Ten examples, all of which an iteration of two updates samples; 7, 2 and 1 of ten pairs compare what they do."""
    train = {"beta": 500.0, "learning_rate": 1e-4, "pairs_per_update": 10, "updates": 5}
    sections["train"] = train | sections.get("train", {})
    sections["data"] = {"source": "shapes:10:3"} | sections.get("data", {})
    return tiny_config(tiny, tmp_path, objective="ditto", **sections)


class Maker:
    """Gives the ids of three updates per pass over 90 examples, 30 each, in order."""

    def sample_ids(self, update):
        return list(range(30 * update, 30 * update + 30))

    def examples(self, ids):
        return [sample % 90 for sample in ids]


def test_an_update_has_dittos_shares_and_the_first_iteration_only_new_samples():
    assert shares(30) == (21, 6, 3)
    assert [shares(pairs) for pairs in (1, 2, 5, 8, 10)] == [(1, 0, 0), (2, 0, 0), (3, 1, 1), (5, 2, 1), (7, 2, 1)]
    config = parse_config({"objective": "ditto", "train": {"updates_per_iteration": 3, "pairs_per_update": 30}})
    comparisons, other = Comparisons(config, Maker()), Comparisons(config, Maker())
    later, losers = Counter(), Counter()
    for update in range(30):
        made = comparisons.of(update)
        kinds = Counter((one.replayed, one.winner is not None) for one in made)
        assert kinds == ({(False, False): 21} if update < 3 else {(False, False): 21, (True, False): 6, (True, True): 3})
        ids = [one.sample_id for one in made]
        assert ids == sorted(set(ids)) and set(ids) <= set(Maker().sample_ids(update))
        for one in made:
            own = Key(update, one.sample_id - 30 * update)
            winner = own if one.winner is None else one.winner
            # The same example, since each pass over the data is an iteration.
            assert one.loser.place == winner.place == own.place and winner.update % 3 == one.loser.update % 3 == update % 3
            if one.replayed:
                assert one.loser.update // 3 < update // 3
                losers[update // 3 - one.loser.update // 3] += 1
            else:
                assert one.loser == own
            if one.winner is not None:
                assert one.loser.update // 3 < winner.update // 3 <= update // 3
                later[winner == own] += 1
    assert later[True] and later[False] and set(losers) == set(range(1, 10))
    assert other.of(29) == comparisons.of(29) and other.of(4) == comparisons.of(4)  # in any order of the updates


def test_an_example_without_earlier_samples_is_compared_with_new_ones_alone():
    """A pass over the data takes two iterations: only in the second pass do earlier samples exist."""
    config = parse_config({"objective": "ditto", "train": {"updates_per_iteration": 2, "pairs_per_update": 30}})
    comparisons = Comparisons(config, Maker())
    assert [len(comparisons.of(update)) for update in range(5)] == [21, 21, 21, 30, 30]


def test_samples_are_read_as_they_were_written(tmp_path):
    processes = Processes()
    (tmp_path / "buffer").mkdir()
    (tmp_path / "buffer" / "samples-of-another-run").write_text("")
    buffer = SampleBuffer(tmp_path / "buffer", 3, (2, 4), processes)
    first, second = torch.randn(6, 2, 4), torch.randn(3, 2, 4)
    assert 0 not in buffer and buffer.files() == {}
    assert buffer.share(range(2)) == [Key(update, place) for update in (0, 1) for place in (0, 1, 2)]
    buffer.write(range(2), first)
    buffer.write(range(2, 3), second)
    keys = [Key(1, 2), Key(2, 0), Key(0, 1), Key(1, 2)]
    expected = torch.stack([first[5], second[0], first[1], first[5]])
    assert torch.equal(buffer.read(keys), expected) and buffer.read([]).shape == (0, 2, 4)
    assert 2 in buffer and 3 not in buffer
    names = ["samples-000000-000002-0-of-1.safetensors", "samples-000002-000003-0-of-1.safetensors"]
    assert list(buffer.files()) == names
    assert sorted(path.name for path in (tmp_path / "buffer").iterdir()) == names
    with pytest.raises(KeyError, match="no samples of update 3"):
        buffer.read([Key(3, 0)])

    state = tmp_path / "state"
    shutil.copytree(tmp_path / "buffer", state)
    other = SampleBuffer(tmp_path / "elsewhere", 3, (2, 4), processes)
    other.restore(state)
    assert torch.equal(other.read(keys), expected)
    (state / names[0]).rename(state / names[0].replace("0-of-1", "0-of-2"))
    with pytest.raises(CheckpointError, match="samples of updates 1 to 2 are missing"):
        other.restore(state)
    save_file({"latents": torch.zeros(3, 4)}, state / names[1])
    (state / names[0].replace("0-of-1", "0-of-2")).unlink()
    other.restore(state)
    with pytest.raises(CheckpointError, match="not this run's samples"):
        other.read([Key(2, 0)])


def test_samples_of_several_processes_are_found(tmp_path):
    """Written by three processes, 8 samples of two updates: ranks 0 and 1 have three of them, rank 2 has two."""
    latents = torch.randn(8, 2)
    state = tmp_path / "state"
    state.mkdir()
    for rank in range(3):
        save_file({"latents": latents[rank::3].contiguous()}, state / f"samples-000004-000006-{rank}-of-3.safetensors")
    buffer = SampleBuffer(tmp_path / "buffer", 4, (2,), Processes())
    buffer.restore(state)
    assert torch.equal(buffer.read([Key(4 + n // 4, n % 4) for n in range(8)]), latents)


@pytest.mark.parametrize("errors", ["ahead", "apart"])
def test_an_update_by_autograd(tiny, tmp_path, errors):
    """The pairs' latents by kind, the initial policy as reference, and a mean over the comparisons made."""
    trainer = Trainer(ditto_config(tiny, tmp_path, reference={"errors": errors}))
    trainer.add_checkpoint()
    initial = {name: weight.clone() for name, weight in trainer.policy.state_dict().items()}
    rolled_out = []
    for update in range(3):
        if update == 2:  # a new iteration, with another policy
            with torch.no_grad():
                for weight in trainer.policy.parameters():
                    weight.mul_(1.001)
            trainer.finished = 2
            trainer.add_checkpoint()
        pairs = collected(trainer, update)
        rolled_out.append(trainer.method._buffer.read([Key(update, place) for place in range(10)]))
        if update < 2:
            assert len(pairs) == 7
    made = trainer.method._comparisons.of(2)
    assert [one.sample_id for one in made] == list(pairs.sample_ids) and len(made) == 10
    ids = trainer.method._everyones.sample_ids(2)
    for row, one in enumerate(made):
        sample = rolled_out[one.loser.update][one.loser.place]
        expert = trainer.cache.winners([one.sample_id % 10])[0].float()
        won = expert if one.winner is None else rolled_out[one.winner.update][one.winner.place]
        assert torch.equal(pairs.losers[row], sample) and torch.equal(pairs.winners[row], won)
        if one.replayed:
            update, place = one.loser
            assert trainer.method._everyones.sample_ids(update)[place] % 10 == one.sample_id % 10 and update < 2
        else:
            assert ids[one.loser.place] == one.sample_id and one.loser.update == 2

    parts = list(pairs.micro_batches(4))
    steps = [trainer.method.loss(trainer.policy, part, torch.tensor(0.3)) for part in parts]
    sums = {name: sum(step.sums[name].item() for step in steps) for name in steps[0].sums}
    means = trainer.method.averages(dict(sums), 10)
    assert (means["compared"], means["replayed"], means["newer_over_older"]) == (10, 0.2, 0.1)

    policy = {name: weight.clone() for name, weight in trainer.policy.state_dict().items()}
    trainer.policy.load_state_dict(initial)
    losses = []
    for part, step in zip(parts, steps, strict=True):
        shown = noised(part, trainer.family.schedule, trainer.denoiser.device)
        with torch.no_grad():
            reference = trainer.denoiser.denoise(trainer.policy, *shown[:3]).double()
        target = shown.target.double().repeat(2, 1, 1, 1)
        prediction = step.output.detach().double().requires_grad_()
        difference = ((prediction - target).square() - (reference - target).square()).flatten(1).mean(1)
        winner, loser = difference.chunk(2)
        loss = F.softplus(250 * (winner - loser))
        (expected,) = torch.autograd.grad(loss.mean(), prediction)
        torch.testing.assert_close(step.grad.double(), 0.3 * expected, rtol=1e-2, atol=1e-4 * expected.abs().max())
        losses.append(loss.detach())
    assert means["loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-3)
    trainer.policy.load_state_dict(policy)


def test_the_first_iteration_takes_the_mean_over_fewer_pairs(tiny, tmp_path):
    trainer = Trainer(ditto_config(tiny, tmp_path))
    trainer.add_checkpoint()
    pairs = collected(trainer, 0)
    whole = trainer.method.loss(trainer.policy, pairs, torch.tensor(7 / 10))  # the learner's factor of 7 of 10 pairs
    alone = super(type(trainer.method), trainer.method).loss(trainer.policy, pairs, torch.tensor(1.0))
    torch.testing.assert_close(whole.grad, alone.grad, rtol=1e-6, atol=0)
    means = trainer.method.averages({name: value.item() for name, value in whole.sums.items()}, 10)
    assert means["compared"] == 7 and means["loss"] == pytest.approx(0.693147, abs=1e-6)


def test_two_stages_on_the_command_line(tiny, tmp_path, capsys):
    """Fine-tuning first; its weights are the policy and the reference that the second stage starts from."""
    first = ditto_config(tiny, tmp_path, output=str(tmp_path / "sft"), train={"updates": 1}).model_dump(mode="json")
    first["objective"] = "sft"
    (tmp_path / "sft.yaml").write_text(to_yaml(parse_config(first)))
    config = ditto_config(tiny, tmp_path, output=str(tmp_path / "ditto"), train={"updates": 3})
    (tmp_path / "ditto.yaml").write_text(to_yaml(config))
    assert main(["train", str(tmp_path / "sft.yaml")]) == 0
    start = ["--model.path", str(tmp_path / "sft" / "weights")]
    assert main(["train", str(tmp_path / "ditto.yaml"), *start]) == 0
    log = log_of(config)
    assert [entry["compared"] for entry in log] == [7, 7, 10]
    assert [(entry["replayed"], entry["newer_over_older"]) for entry in log] == [(0, 0), (0, 0), (0.2, 0.1)]
    assert log[0]["loss"] == pytest.approx(0.693147, abs=1e-6) and log[0]["winner_error"] == log[0]["ref_winner_error"]
    assert log[2]["winner_error"] != log[2]["ref_winner_error"] and all(entry["grad_norm"] > 0 for entry in log)
    state = saved_states(tmp_path / "ditto")[0]
    tuned = load_file(next((tmp_path / "sft" / "weights" / "unet").glob("*.safetensors")))
    from seppo_fast.references.storage import map_checkpoint

    slab, layout = map_checkpoint(state / "references" / "checkpoint-000000.safetensors")
    assert all(torch.equal(layout.views(slab)[name], tensor) for name, tensor in tuned.items())
    assert len(list(state.glob("samples-*.safetensors"))) == 2
