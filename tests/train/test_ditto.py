"""DITTO: the comparisons of an update, the samples that a run keeps, whole runs, and what is refused."""

import shutil
import signal
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
from seppo_fast.references.storage import map_checkpoint
from seppo_fast.runs.checkpoint import saved_states
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

    def all_sample_ids(self, update):
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
        assert kinds == (
            {(False, False): 21} if update < 3 else {(False, False): 21, (True, False): 6, (True, True): 3}
        )
        ids = [one.sample_id for one in made]
        assert ids == sorted(set(ids)) and set(ids) <= set(Maker().all_sample_ids(update))
        for one in made:
            own = Key(update, one.sample_id - 30 * update)
            winner = own if one.winner is None else one.winner
            # The same example, since each pass over the data is an iteration.
            assert (
                one.loser.place == winner.place == own.place and winner.update % 3 == one.loser.update % 3 == update % 3
            )
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
    ids = trainer.method.rollout.maker.all_sample_ids(2)
    for row, one in enumerate(made):
        sample = rolled_out[one.loser.update][one.loser.place]
        expert = trainer.cache.winners([one.sample_id % 10])[0].float()
        won = expert if one.winner is None else rolled_out[one.winner.update][one.winner.place]
        assert torch.equal(pairs.losers[row], sample) and torch.equal(pairs.winners[row], won)
        if one.replayed:
            update, place = one.loser
            assert trainer.method.rollout.maker.all_sample_ids(update)[place] % 10 == one.sample_id % 10 and update < 2
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
    assert trainer.method.rows(pairs) == 7  # of 10 pairs per update
    factors = [float(scale) for _, scale in trainer.learner._parts(pairs)]
    assert sum(factors) == pytest.approx(1.0)
    step = trainer.method.loss(trainer.policy, pairs, torch.tensor(1.0))
    means = trainer.method.averages({name: value.item() for name, value in step.sums.items()}, 7)
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
    assert main(["check", str(tmp_path / "ditto.yaml"), *start]) == 0
    assert (
        f"disk: {3 * 10 * 4 * 8 * 8 * 4 / 2**20:.1f} MiB for the samples of all iterations" in capsys.readouterr().out
    )
    assert main(["train", str(tmp_path / "ditto.yaml"), *start]) == 0
    log = log_of(config)
    assert [entry["compared"] for entry in log] == [7, 7, 10]
    assert [(entry["replayed"], entry["newer_over_older"]) for entry in log] == [(0, 0), (0, 0), (0.2, 0.1)]
    assert log[0]["loss"] == pytest.approx(0.693147, abs=1e-6) and log[0]["winner_error"] == log[0]["ref_winner_error"]
    assert log[2]["winner_error"] != log[2]["ref_winner_error"] and all(entry["grad_norm"] > 0 for entry in log)
    state = saved_states(tmp_path / "ditto")[0]
    tuned = load_file(next((tmp_path / "sft" / "weights" / "unet").glob("*.safetensors")))
    slab, layout = map_checkpoint(state / "references" / "checkpoint-000000.safetensors")
    assert all(torch.equal(layout.views(slab)[name], tensor) for name, tensor in tuned.items())
    assert len(list(state.glob("samples-*.safetensors"))) == 2


def test_a_run_that_stops_after_every_update_is_the_run_that_does_not(tiny, tmp_path):
    """Stops within iterations and between them. What a killed run left in the folder of samples is not used."""
    straight = ditto_config(tiny, tmp_path, output=str(tmp_path / "straight"), save={"minutes": 0})
    run(straight)
    stopped = ditto_config(tiny, tmp_path, output=str(tmp_path / "stopped"), save={"minutes": 0})
    for update in range(1, 5):

        def end(trainer, updates, update=update):
            if updates == update:
                trainer.saver.wait()
                raise Ended

        with pytest.raises(Ended):
            run(stopped, end)
        for file in (Path(stopped.output) / "state" / ".buffer").iterdir():
            shutil.copyfile(file, file.with_name("copy"))
            file.unlink()
            file.with_name("copy").rename(file)  # no longer the state's file
            file.write_bytes(b"damaged")
    run(stopped)
    assert_same_run(straight, stopped)


def test_a_killed_run_is_finished_by_the_same_command(forks, tiny, tmp_path):
    """Killed in the second of the five batches that sample the second iteration, and while writing a state."""
    config = ditto_config(tiny, tmp_path, save={"minutes": 0}, train={"updates": 4})
    for name in ("straight", "killed"):
        (tmp_path / f"{name}.yaml").write_text(to_yaml(config.model_copy(update={"output": str(tmp_path / name)})))
    assert forks.run("train", tmp_path / "straight.yaml").code == 0
    for fault in ("sampling@7", "save-manifest@2"):
        killed = forks.run("train", tmp_path / "killed.yaml", fault=f"{fault}=kill")
        assert killed.code == -signal.SIGKILL, (fault, killed.err)
    ended = forks.run("train", tmp_path / "killed.yaml")
    assert ended.code == 0, ended.err
    assert_same_run(*(config.model_copy(update={"output": str(tmp_path / name)}) for name in ("straight", "killed")))


def test_a_longer_run_generates_what_its_last_iteration_lacks(tiny, tmp_path):
    config = ditto_config(tiny, tmp_path, save={"minutes": 0}, train={"updates": 3})
    run(config)
    run(ditto_config(tiny, tmp_path, save={"minutes": 0}, train={"updates": 4}))
    state = saved_states(Path(config.output))[0]
    names = sorted(file.name[8:21] for file in state.glob("samples-*"))
    assert names == ["000000-000002", "000002-000003", "000003-000004"]
    assert [entry["compared"] for entry in log_of(config)] == [7, 7, 10, 10]


def test_damaged_samples_are_found_and_an_older_state_is_used(tiny, tmp_path, capsys):
    config = ditto_config(tiny, tmp_path, save={"minutes": 0}, train={"updates": 3})
    run(config)
    newest, older = saved_states(Path(config.output))
    assert (newest.name, older.name) == ("update-000003", "update-000002")
    assert len(list(older.glob("samples-*"))) == 1
    file = newest / "samples-000002-000003-0-of-1.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    log = log_of(config)
    run(config)
    assert f"{file.name} is damaged" in capsys.readouterr().out
    assert [entry["loss"] for entry in log_of(config)] == [entry["loss"] for entry in log]


def test_two_processes_learn_as_one(tiny, tmp_path, ranks):
    """The same comparisons of the same samples: seven and ten pairs, of which the processes have 4 and 3, 5 and 5."""
    config = ditto_config(
        tiny, tmp_path, save={"minutes": 0},
        train={"updates": 2, "updates_per_iteration": 1, "learning_rate": 1e-5, "micro_batch": 2},
    )  # fmt: skip
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    logs = []
    for world in (1, 2):
        output = str(tmp_path / f"world{world}")
        ends = ranks.run(world, "train", tmp_path / "run.yaml", "--output", output)
        assert [end.code for end in ends] == [0] * world, ends[0].out
        logs.append(log_of(config.model_copy(update={"output": output})))
    for update, tolerance in enumerate((1e-5, 1e-2)):
        for name in ("compared", "replayed", "newer_over_older", "loss", "winner_error", "loser_error", "grad_norm"):
            assert logs[0][update][name] == pytest.approx(logs[1][update][name], rel=tolerance), (update, name)
    assert logs[0][1]["newer_over_older"] == 0.1
    # Two processes' samples are read by one, which makes another iteration.
    longer = config.train.model_copy(update={"updates": 3})
    run(config.model_copy(update={"output": output, "train": longer}))
    state = saved_states(Path(output))[0]
    assert len(list(state.glob("samples-*-of-2.safetensors"))) == 4
    assert len(list(state.glob("samples-*-of-1.safetensors"))) == 1


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"reference": {"uses": 2}}, "'ditto' needs reference.uses = 1, got 2"),
        ({"reference": {"window": 1}}, "'ditto' needs reference.window = null, got 1"),
        ({"train": {"sft_weight": 1}}, "'ditto' needs train.sft_weight = 0, got 1"),
        ({"reference": {"keep": 2}}, "'ditto' does not draw among past policies"),
    ],
)
def test_settings_that_do_not_fit_are_refused(sections, said):
    with pytest.raises(ConfigError, match=said):
        parse_config({"objective": "ditto"} | sections)


def test_too_few_pairs_for_the_processes_are_refused(tiny, tmp_path):
    config = ditto_config(tiny, tmp_path, train={"pairs_per_update": 3})
    with pytest.raises(ConfigError, match="fewer than one comparison per process \\(3\\) in the first iteration"):
        preflight(config, torch.device("cpu"), 3)
