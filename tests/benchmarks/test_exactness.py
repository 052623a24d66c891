"""Tests how exact the loss and the public recipe are at beta 2000; run it like test_loss.py."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.exactness import (
    APART,
    BETA,
    RECIPES,
    TIE,
    anchor_and_logit,
    exactness_table,
    from_errors,
    measure,
    pairs_apart,
    public_recipe,
    truth,
)
from benchmarks.tables import RESULTS
from seppo_fast.loss import denoising_errors, loss_and_grad, preference_loss
from tests.helpers.preference_reference import INTERPRETED, PLACES, close, predictions, reference

# SD-1.5's latents in one chunk, and a video's in four. The interpreter takes 0.1 s per chunk of a pair.
SHAPES = [(8 if INTERPRETED else 64, 4, 64, 64), (2 if INTERPRETED else 8, 4, 16, 32, 32)]


@pytest.fixture(params=PLACES, ids="-".join)
def place(request):
    return request.param


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("apart", [1e-2, 1e-3])
def test_bars_at_beta_2000(place, shape, apart):
    backend, device = place
    model_pred, target, ref_pred = predictions(shape, apart=apart, device=device)
    expected = reference(model_pred, target, ref_pred)
    pairs = len(expected.reject)
    assert 0.15 < expected.ref_error.min() and expected.ref_error.max() < 0.25
    # Closer to a tie than `TIE`, the anchor's sign (and with it the logit) is not promised.
    clear = expected.difference[:pairs].abs() >= TIE
    assert clear.any()

    ref_error = denoising_errors(ref_pred, target, backend)
    for ref, bar in (
        ({"ref_pred": ref_pred}, {"rtol": 1e-6, "atol": 1e-6}),
        ({"ref_error": ref_error}, {"rtol": 0, "atol": 5e-5}),
    ):
        through = preference_loss(model_pred, target, **ref, backend=backend)
        at_once, _ = loss_and_grad(model_pred, target, **ref, backend=backend)
        for result in (through, at_once):
            assert torch.equal(result.reject.cpu()[clear], expected.reject[clear])
            close(result.logit.cpu()[clear], expected.logit[clear], **bar)
            close(result.loss, expected.loss, **bar)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equal_predictions_give_no_difference_at_all(place, dtype):
    backend, device = place
    model_pred, target, _ = (x.detach() for x in predictions(SHAPES[1], dtype, device=device))
    ref_error = denoising_errors(model_pred, target, backend)
    for ref in ({"ref_pred": model_pred.clone()}, {"ref_error": ref_error}):
        result, _ = loss_and_grad(model_pred, target, **ref, backend=backend)
        assert torch.equal(result.model_error, result.ref_error)
        assert not result.logit.any()
        assert result.reject.all()


def _rates(recipe, apart, dtype):
    """Returns the share of wrong anchor signs and the RMS error of the logit, over 64 pairs."""
    inputs = pairs_apart(64, apart, dtype, seed=1)
    reject, logit, difference = truth(*inputs)
    clear = (difference.abs() >= TIE) | (apart == 0)
    found, found_logit = recipe(*inputs)
    return (found != reject)[clear].float().mean().item(), (found_logit - logit)[clear].square().mean().sqrt().item()


@pytest.mark.parametrize(
    ("dtype", "apart", "wrong", "error"),
    [
        (torch.bfloat16, 1e-2, 0.2, 0.1),
        (torch.bfloat16, 1e-3, 0.3, 0.1),
        (torch.bfloat16, 0.0, 0.3, 0.1),
        (torch.float16, 1e-3, 0.3, 0.02),
        (torch.float16, 0.0, 0.3, 0.02),
    ],
    ids=str,
)
def test_public_recipe_tosses_coins_and_ours_does_not(dtype, apart, wrong, error):
    public = _rates(public_recipe, apart, dtype)
    assert public[0] > wrong
    assert public[1] > error
    ours = _rates(from_errors, apart, dtype)
    assert ours[0] == 0
    assert ours[1] <= (2e-5 if apart else 0)


def test_truth_is_the_reference_of_the_other_tests():
    inputs = pairs_apart(4, 1e-2, torch.bfloat16, seed=0, latent=(3, 5))
    reject, logit, difference = truth(*inputs)
    expected = reference(*inputs, beta=BETA)
    assert torch.equal(reject, expected.reject)
    close(logit, expected.logit, rtol=1e-9, atol=1e-9)
    close(difference, expected.difference[:4], rtol=1e-9, atol=1e-12)
    tie, learn = anchor_and_logit(torch.tensor([0.0, 1.0, 3.0, 4.0]))
    assert tie.tolist() == [True, False]
    assert learn.tolist() == [0.5 * BETA * 3, -0.5 * BETA * 5]


def test_a_row_is_what_it_says():
    row = measure("public recipe, bf16", 1e-2, 32, torch.device("cpu"))
    assert 0.2 < row["wrong_signs"] < 0.8
    assert row["worst_logit_error"] > row["rms_logit_error"] > 0.1
    assert row["promised"] <= 32


def test_table_has_a_line_for_every_recipe():
    result = json.loads((RESULTS / "exactness.json").read_text(encoding="utf-8"))
    assert {(row["recipe"], row["apart"]) for row in result["rows"]} == {
        (name, apart) for name in RECIPES for apart in APART
    }
    lines = exactness_table(result).splitlines()
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines[2 : 2 + len(RECIPES)]] == list(RECIPES)
    assert len({line.count("|") for line in lines[: 2 + len(RECIPES)]}) == 1
    ours = {row["apart"]: row for row in result["rows"] if row["recipe"] == "`ref_pred`, ours"}
    assert all(row["wrong_signs"] == 0 and row["worst_logit_error"] < 1e-6 for row in ours.values())
