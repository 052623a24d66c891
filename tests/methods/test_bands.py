"""Statistics by band of timestep, and of pairs that are not exact ties, compared with means in float64."""

import math

import pytest
import torch

from seppo_fast.config.objectives import OBJECTIVES
from seppo_fast.diffusion.schedule import NoiseSchedule
from seppo_fast.methods.losses.bands import BAND_SUMS
from seppo_fast.methods.preference import averages, step_loss
from seppo_fast.train import train
from tests.helpers.runs import log_of, tiny_config

OPTIONS = {"beta": 500.0, "tie_tol": 0.0, "backend": "torch", "grad_scale": 1.0}
PROGRESS = [0.0, 0.2, 0.249, 0.25, 0.6, 0.999, 1.0]  # bands 1, 1, 1, 2, 3, 4, 4
BAND = [1, 1, 1, 2, 3, 4, 4]


def batch(pairs=7):
    generator = torch.Generator().manual_seed(3)
    pred, target = torch.randn(2, 2 * pairs, 4, 3, 5, generator=generator).unbind()
    ref_error = (pred - target).square().flatten(1).mean(1) + 1e-2 * torch.randn(2 * pairs, generator=generator)
    return pred, target, ref_error


def tie(pred, target, ref_error, pair):
    """Makes the winner of a pair an exact tie: sets its reference error to the policy's."""
    plain = step_loss(OBJECTIVES["seppo"], pred[[pair, pair]], target[[pair, pair]], ref_error[[pair, pair]], **OPTIONS)
    ref_error[pair] = plain.sums["winner_error"]


def averaged(rows=slice(None), progress=PROGRESS, **changes):
    """Returns the logged values of a batch with one tie, and D_w and |logit| of its pairs in float64."""
    pred, target, ref_error = batch()
    tie(pred, target, ref_error, 2)
    for name, value in changes.items():
        {"pred": pred, "ref_error": ref_error}[name][value] = math.nan
    step = step_loss(OBJECTIVES["seppo"], pred, target, ref_error, **OPTIONS, progress=torch.tensor(progress))
    difference = (pred.double() - target.double()).square().flatten(1).mean(1) - ref_error.double()
    difference[2] = 0.0
    winner, loser = difference.chunk(2)
    logit = -250 * (winner - torch.where(winner <= 0, 1.0, -1.0) * loser)
    return averages({name: value.item() for name, value in step.sums.items()}, 7), winner, logit.abs()


def test_each_band_is_the_mean_of_its_pairs():
    means, winner, logit = averaged()
    for band in range(1, 5):
        rows = torch.tensor(BAND) == band
        assert means[f"winner_difference_band{band}"] == pytest.approx(winner[rows].mean().item(), abs=5e-7)
        assert means[f"logit_abs_band{band}"] == pytest.approx(logit[rows].mean().item(), abs=5e-4)
        assert means[f"aaf_rate_band{band}"] == pytest.approx((winner <= 0)[rows].double().mean().item())
    assert not BAND_SUMS & set(means) - {"untied_pairs"}


def test_untied_pairs_have_a_mean_and_a_sample_deviation():
    means, winner, _ = averaged()
    untied = winner[winner != 0]
    assert means["untied_pairs"] == len(untied) == 6
    assert means["untied_difference"] == pytest.approx(untied.mean().item(), abs=5e-7)
    assert means["untied_difference_sd"] == pytest.approx(untied.std().item(), rel=1e-4)


def test_a_band_without_pairs_is_left_out():
    means, *_ = averaged(progress=[0.1, 0.1, 0.1, 0.1, 0.1, 0.9, 0.9])
    assert {name[-1] for name in means if "_band" in name} == {"1", "4"}


def test_what_is_not_finite_stays_in_its_band():
    means, *_ = averaged(pred=4)
    whole, *_ = averaged()
    assert math.isnan(means["winner_difference_band3"]) and math.isnan(means["logit_abs_band3"])
    for name in (f"{kind}_band{band}" for kind in ("winner_difference", "logit_abs", "aaf_rate") for band in (1, 2, 4)):
        assert means[name] == whole[name]
    assert math.isnan(means["untied_difference"]) and math.isnan(means["untied_difference_sd"])


def test_all_ties_have_no_difference_and_one_pair_no_deviation():
    sums = {"loss": 1.0, "untied_pairs": 0.0, "untied_sum": 0.0, "untied_squares": 0.0}
    assert averages(sums, 2) == {"loss": 0.5, "untied_pairs": 0.0}
    sums |= {"untied_pairs": 1.0, "untied_sum": 0.25, "untied_squares": 0.0625}
    assert averages(sums, 2) == {"loss": 0.5, "untied_pairs": 1.0, "untied_difference": 0.25}


def test_micro_batches_add_up():
    pred, target, ref_error = batch(8)
    progress = torch.linspace(0, 1, 8)
    sums = {}
    for rows in (slice(None), slice(0, 3), slice(3, 8)):
        both = [
            half for tensor in (pred, target, ref_error) for half in (torch.cat([p[rows] for p in tensor.chunk(2)]),)
        ]
        step = step_loss(OBJECTIVES["seppo"], *both, **OPTIONS, progress=progress[rows])
        sums[str(rows)] = step.sums
    whole, first, second = sums.values()
    for name in BAND_SUMS:
        torch.testing.assert_close(first[name] + second[name], whole[name], rtol=1e-5, atol=1e-8)


def test_progress_of_diffusion_is_its_share_of_the_timesteps():
    schedule = NoiseSchedule({"num_train_timesteps": 1000})
    progress = schedule.progress(torch.tensor([0, 249, 250, 500, 749, 750, 999]))
    assert progress.dtype == torch.float32
    assert (progress * 4).long().tolist() == [0, 0, 1, 2, 2, 3, 3]
    torch.testing.assert_close(progress.double(), torch.tensor([0, 0.249, 0.25, 0.5, 0.749, 0.75, 0.999]).double())


def test_a_run_logs_them(tiny, tmp_path):
    config = tiny_config(tiny, tmp_path, train={"pairs_per_update": 12})
    train(config)
    first, *rest = log_of(config)
    assert first["untied_pairs"] == 0 and "untied_difference" not in first
    for entry in rest[:1]:
        bands = [band for band in range(1, 5) if f"aaf_rate_band{band}" in entry]
        assert len(bands) > 1
        assert min(entry[f"logit_abs_band{band}"] for band in bands) <= entry["logit_abs"]
        assert max(entry[f"logit_abs_band{band}"] for band in bands) >= entry["logit_abs"]
        difference = entry["winner_error"] - entry["ref_winner_error"]
        assert entry["untied_pairs"] * entry["untied_difference"] == pytest.approx(12 * difference, rel=1e-2, abs=1e-5)
