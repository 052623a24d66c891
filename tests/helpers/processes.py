"""Compares runs with different numbers of processes."""

from __future__ import annotations

import json
import re

import pytest
import torch

from tests.helpers.runs import log_of
from tests.helpers.same_run import content

NUMBERS = ("loss", "winner_error", "ref_winner_error", "loser_error", "grad_norm")


def in_folder(config, name, **keys):
    return config.model_copy(update={"output": str(name), **keys})


def recorded(folder, world):
    """Returns for each update the inputs that all ranks got, by sample id."""
    ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]
    return [{row[0]: row[1:] for one in update for row in one["rows"]} for update in zip(*ranks, strict=True)]


def assert_same_training(one, other, start):
    """Asserts that two runs' logs, weights and averages agree within tolerance; `start`: the initial weights."""
    for ours, theirs in zip(log_of(one), log_of(other), strict=True):
        assert ours["aaf_rate"] == theirs["aaf_rate"] and ours["learning_rate"] == theirs["learning_rate"]
        for name in NUMBERS:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name
    ours, theirs = content(one.output), content(other.output)
    assert {name: (t.shape, t.dtype) for name, t in ours.items() if "references" not in name} == {
        name: (t.shape, t.dtype) for name, t in theirs.items() if "references" not in name
    }
    for file in ("policy", "average"):
        pattern = re.compile(rf".*{file}\.safetensors (.*)")
        pairs = {match[1]: (tensor, theirs[name]) for name, tensor in ours.items() if (match := pattern.match(name))}
        assert pairs.keys() == start.keys()
        moved = torch.cat([(mine - start[name]).flatten() for name, (mine, _) in pairs.items()])
        apart = torch.cat([(mine - its).flatten() for mine, its in pairs.values()])
        assert apart.norm() < 0.001 * moved.norm(), file


@pytest.fixture(scope="module")
def start(tiny):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(tiny, subfolder="unet").state_dict()
