"""Pairs: order, keys, prompts and halves."""

from collections import Counter

import pytest
import torch

from seppo_fast.diffusion.schedule import NoiseSchedule
from seppo_fast.methods.pairs import PairMaker, Pairs
from tests.helpers.calls import embeds
from tests.helpers.runs import tiny_config


class FakeCache:
    """Eight examples whose latents and embeddings hold their index."""

    latent_shape = (4, 2, 2)

    def __len__(self):
        return 8

    def winners(self, rows):
        return torch.tensor([float(row) for row in rows]).view(-1, 1, 1, 1).expand(-1, 4, 2, 2).half()

    def losers(self, rows):
        return self.winners(rows) + 100

    def conditioning(self, rows):
        numbers = torch.tensor([-1.0 if row is None else float(row) for row in rows])
        return embeds(numbers.view(-1, 1, 1).expand(-1, 2, 3))


def maker(tmp_path, rank=0, world=1, **sections):
    sections["train"] = {"pairs_per_update": 3} | sections.get("train", {})
    config = tiny_config(tmp_path, tmp_path, **sections)
    return PairMaker(config, FakeCache(), NoiseSchedule({}), rank=rank, world=world)


def test_each_example_once_before_any_twice(tmp_path):
    make = maker(tmp_path)
    ids = [sample for update in range(8) for sample in make.sample_ids(update)]
    assert len(set(ids)) == 24
    for visit in range(3):
        taken = ids[8 * visit : 8 * visit + 8]
        assert sorted(make.examples(taken)) == list(range(8))
    assert make.examples(ids[:8]) != make.examples(ids[8:16])
    again = maker(tmp_path)
    assert [again.sample_ids(update) for update in (5, 2)] == [ids[15:18], ids[6:9]]  # no state: any update, any order


def test_a_pair_depends_on_its_sample_id_not_on_its_neighbours(tmp_path):
    make = maker(tmp_path)
    together, alone = make.pairs(4, [3, 17, 9]), make.pairs(4, [17])
    assert together.times[1] == alone.times[0]
    assert torch.equal(together.noise[1], alone.noise[0])
    assert torch.equal(together.conditioning["prompt_embeds"][1], alone.conditioning["prompt_embeds"][0])
    assert not torch.equal(together.noise[1], make.pairs(5, [17]).noise[0])
    assert together.winners.dtype == torch.float32
    assert together.winners[:, 0, 0, 0].tolist() == [3, 1, 1]  # the visits 0, 2, 1 of examples 3, 1, 1


def test_ranks_deal_out_the_same_pairs(tmp_path):
    whole = maker(tmp_path, train={"pairs_per_update": 7})
    ids, ranks = whole.sample_ids(3), []
    for rank in range(3):
        make = maker(tmp_path, rank, 3, train={"pairs_per_update": 7})
        ranks.append(make.pairs(3, make.sample_ids(3)))
    assert [len(rank) for rank in ranks] == [3, 2, 2]
    assert sorted(sample for rank in ranks for sample in rank.sample_ids) == sorted(ids)
    one = whole.pairs(3, ids)
    for rank in ranks:
        for row, sample in enumerate(rank.sample_ids):
            assert torch.equal(rank.noise[row], one.noise[ids.index(sample)])
            assert rank.times[row] == one.times[ids.index(sample)]


def test_what_a_reference_samples_from(tmp_path):
    """Each sample has its own noise, and the pair's own prompt even if the pair drops it."""
    make = maker(tmp_path, data={"prompt_dropout": 1.0})
    noise, own, uncond = make.generation([(0, 3), (1, 12), (0, 5)])
    assert own["prompt_embeds"][:, 0, 0].tolist() == [3, 4, 5] and uncond["prompt_embeds"][:, 0, 0].tolist() == [-1]
    assert torch.equal(noise[1:2], make.generation([(1, 12)])[0])
    assert not torch.equal(noise[0], make.pairs(0, [3]).noise[0])


def test_uses_repeat_a_sample_under_new_timesteps_and_noises(tmp_path):
    make = maker(tmp_path, reference={"uses": 3}, train={"pairs_per_update": 6})
    once = maker(tmp_path, train={"pairs_per_update": 2})
    ids = make.sample_ids(1)
    assert ids == once.sample_ids(1) and len(ids) == 2
    losers = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 4, 2, 2)
    pairs = make.pairs(1, ids, losers)
    assert pairs.sample_ids == (ids[0],) * 3 + (ids[1],) * 3
    assert pairs.losers[:, 0, 0, 0].tolist() == [0, 0, 0, 1, 1, 1]
    assert pairs.winners[:, 0, 0, 0].tolist() == [ids[0] % 8] * 3 + [ids[1] % 8] * 3
    assert len({noise.double().sum().item() for noise in pairs.noise}) == 6
    assert len(set(pairs.times.tolist())) > 3
    first = once.pairs(1, ids, losers)
    assert torch.equal(pairs.noise[[0, 3]], first.noise) and torch.equal(pairs.times[[0, 3]], first.times)


def test_timesteps_are_uniform_over_the_schedule(tmp_path):
    timesteps = maker(tmp_path).pairs(0, range(4000)).times
    assert timesteps.min() >= 0 and timesteps.max() <= 999
    counts = Counter((timesteps // 100).tolist())
    chi_square = sum((counts[bin_] - 400) ** 2 / 400 for bin_ in range(10))
    assert chi_square < 27.9  # p = 0.001 with 9 degrees of freedom


@pytest.mark.parametrize(("rate", "low", "high"), [(0.0, 0, 0), (0.2, 0.17, 0.23), (1.0, 1, 1)])
def test_prompt_dropout(tmp_path, rate, low, high):
    conditioning = maker(tmp_path, data={"prompt_dropout": rate}).pairs(0, range(2000)).conditioning
    dropped = (conditioning["prompt_embeds"] == -1).all(dim=(1, 2)).double().mean()
    assert low <= dropped <= high


def test_independent_noise_differs_between_the_halves_and_shares_the_timestep(tmp_path):
    shared = maker(tmp_path).pairs(0, [1, 2])
    independent = maker(tmp_path, train={"share_noise": False}).pairs(0, [1, 2])
    assert shared.noise.shape[0] == 2 and independent.noise.shape[0] == 4
    assert torch.equal(independent.noise[:2], shared.noise)
    assert not torch.equal(independent.noise[2:], shared.noise)
    assert torch.equal(independent.times, shared.times)


def test_labelled_losers_and_random_anchors(tmp_path):
    labelled = maker(tmp_path, objective="diffusion-dpo").pairs(0, range(8))
    assert (labelled.losers == labelled.winners + 100).all()
    anchors = maker(tmp_path, objective="seppo-r").pairs(0, range(2000))
    assert anchors.losers is None
    swapped = (anchors.winners[:, 0, 0, 0] >= 100).double().mean()
    assert 0.45 < swapped < 0.55
    assert maker(tmp_path, objective="seppo").pairs(0, [1]).losers is None


def test_pairs_are_sent_to_a_gpu_once():
    """Sending them again leaves them alone, since only host memory can be pinned. This needs no GPU to test."""
    latents = torch.empty(2, 4, 2, 2, device="meta")
    prompts = embeds(torch.empty(2, 2, 3, device="meta"))
    pairs = Pairs((0, 1), latents, latents, torch.empty(2, device="meta"), latents, prompts)
    again = pairs.to(torch.device("cuda"))
    assert again.winners is pairs.winners and again.times is pairs.times and again.ref_error is None


def test_micro_batches_keep_halves_together():
    pairs = Pairs(
        (0, 1, 2), torch.arange(3.0)[:, None], torch.arange(3.0)[:, None] + 10, torch.arange(3),
        torch.arange(6.0)[:, None], embeds(torch.arange(3.0)[:, None, None]), torch.arange(6.0),
    )  # fmt: skip
    first, second = pairs.micro_batches(2)
    assert first.ref_error.tolist() == [0, 1, 3, 4] and second.ref_error.tolist() == [2, 5]
    assert first.noise.flatten().tolist() == [0, 1, 3, 4]
    assert second.losers.flatten().tolist() == [12] and second.sample_ids == (2,)
