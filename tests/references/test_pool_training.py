"""Training with a bounded pool: the run is the same wherever past policies are stored; messages if the pool is full."""

from __future__ import annotations

import os

import pytest
import torch

from seppo_fast.models.trainable import trainable
from seppo_fast.references.layout import PackedLayout
from seppo_fast.train import train
from seppo_fast.utils.errors import ConfigError
from tests.helpers.runs import tiny_config

SCHEDULE = {"updates": 6, "updates_per_iteration": 2}


def finished(tiny, folder, **reference):
    """Trains; returns the final tiers of the past policies, the trained weights, and the index of each prefetch."""
    seen, asked = {}, []

    def observe(trainer, updates):
        if updates == 0:
            prefetch = trainer.references.prefetch
            trainer.references.prefetch = lambda index: asked.append(index) or prefetch(index)
        seen.update({name: weight.detach().clone() for name, weight in trainable(trainer.policy).items()})
        seen["tiers"] = trainer.references.tiers

    train(tiny_config(tiny, folder, train=SCHEDULE, reference=reference), observe)
    return seen.pop("tiers"), seen, asked


@pytest.mark.parametrize("redraw", ["iteration", "update"])
def test_a_run_is_the_same_wherever_its_past_policies_lie(tiny, tmp_path, redraw):
    in_memory, expected, _ = finished(tiny, tmp_path / "memory", redraw=redraw)
    on_disk, weights, asked = finished(tiny, tmp_path / "disk", redraw=redraw, host_gib=0)
    assert set(in_memory.values()) == {"host"} and set(on_disk.values()) == {"disk"} and set(in_memory) == {0, 1, 2}
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert len(asked) == (2 if redraw == "iteration" else 5)  # before each draw but the first
    cache = tmp_path / "disk" / "cache"
    assert not [name for name in os.listdir(cache if cache.exists() else tmp_path) if "reference" in name]


@pytest.mark.parametrize("rule", ["newest", "reservoir"])
def test_a_bounded_pool_trains(tiny, tmp_path, rule):
    tiers, weights, _ = finished(tiny, tmp_path, keep=2, keep_rule=rule)
    assert len(tiers) == 2 and 0 in tiers
    assert all(weight.isfinite().all() for weight in weights.values())


def test_a_policy_for_which_there_is_no_room_is_left_out_and_said(tiny, tmp_path, capsys):
    from seppo_fast.train.trainer import Trainer

    size = PackedLayout.of(Trainer(tiny_config(tiny, tmp_path / "size")).policy).size
    room = 1.5 * size / 2**30
    tiers, _, _ = finished(tiny, tmp_path / "run", host_gib=room, disk_gib=0)
    assert tiers == {0: "host"}
    said = [line for line in capsys.readouterr().out.splitlines() if "this policy is not kept" in line]
    assert len(said) == 2 and "references are still drawn from the 1 before it: a checkpoint takes" in said[0]


def test_no_room_for_the_initial_policy_is_a_mistake_in_the_settings(tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"reference.gpu_gib, host_gib, disk_gib: a checkpoint takes"):
        finished(tiny, tmp_path, host_gib=1e-9, disk_gib=0)


def test_no_room_at_all_is_refused_before_anything_is_loaded(tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"no room for past policies \(gpu_gib counts only on a GPU\)"):
        finished(tiny, tmp_path, host_gib=0, disk_gib=0, gpu_gib=1)
    assert not (tmp_path / "cache").exists()
    train(tiny_config(tiny, tmp_path, objective="sft", reference={"host_gib": 0, "disk_gib": 0}))  # it has no reference


def test_a_rule_without_a_bound_is_refused(tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"keep_rule = 'newest' needs reference.keep"):
        finished(tiny, tmp_path, keep_rule="newest")
