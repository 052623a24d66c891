"""Tests of the census: counts without data against counts by hand, and the shares that follow from them."""

import json
import sys

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import census
from benchmarks.census import Count, count
from benchmarks.harness.counters import SD15, count_flops

META = torch.device("meta")
TOY = {
    "sample_size": 8, "cross_attention_dim": 16, "block_out_channels": (8, 16), "norm_num_groups": 4,
    "attention_head_dim": 4, "layers_per_block": 1, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip


def test_operations_bytes_and_flop_by_hand():
    x, y = torch.empty(3, 5, device=META), torch.empty(5, 7, device=META, dtype=torch.float32)
    assert count(lambda: x @ y, META) == Count(1, 4 * (15 + 35 + 21), 2 * 3 * 5 * 7)
    # Views and empty memory launch nothing.
    assert count(lambda: x.t().reshape(5, 3)[1:].unsqueeze(0).detach(), META) == Count(0, 0, 0)
    assert count(lambda: torch.empty_like(x), META) == Count(0, 0, 0)
    # An expanded tensor is read once; a Python number is not a tensor.
    assert count(lambda: x[:1].expand(3, 5) * 2, META) == Count(1, 4 * (5 + 15), 0)
    # In place: read and written; a copy and a fill do not read what they overwrite.
    assert count(lambda: x.add_(x), META) == Count(1, 4 * 3 * 15, 0)
    assert count(lambda: x.copy_(x.half()), META) == Count(2, 15 * (4 + 2) + 15 * (2 + 4), 0)
    assert count(lambda: x.zero_(), META) == Count(1, 4 * 15, 0)
    # Lists of tensors count; operations on the host do not.
    assert count(lambda: torch._foreach_mul([x, y], 2.0), META) == Count(1, 2 * 4 * (15 + 35), 0)
    assert count(lambda: torch.ones(3) + 1, META) == Count(0, 0, 0)


def test_the_floor_is_the_slower_of_both():
    assert Count(1, 4.8e12, 989e12 / 2).seconds == pytest.approx(1)
    assert Count(1, 4.8e12, 2 * 989e12).seconds == pytest.approx(2)


def test_fused_attention_has_the_flop_of_its_products():
    with FakeTensorMode():
        q, k = (torch.empty(2, 4, tokens, 8, requires_grad=True) for tokens in (9, 5))
        forward = 2 * 2 * (2 * 4 * 9 * 5 * 8)
        attention = nn.functional.scaled_dot_product_attention
        assert count(lambda: attention(q, k, k), torch.device("cpu")).flops == forward
        whole = count(lambda: attention(q, k, k).sum().backward(), torch.device("cpu"))
    assert whole.flops == forward * (1 + 5 / 2)  # backward: the scores again, then two products for each forward one


def test_the_unet_has_the_flop_of_one_whose_attention_is_plain_products():
    with META:
        unet = census.UNet2DConditionModel(**TOY)
        inputs = torch.empty(1, 4, 8, 8), torch.empty(1, dtype=torch.int64), torch.empty(1, 77, 16)
    with torch.no_grad():
        a_row = count_flops(lambda: unet(*inputs))
    assert census.Phases("full", TOY).sampling().flops == 2 * census.SAMPLES * a_row


def test_a_round_trip_has_the_published_flop():
    counted, rows = census.Phases("full", TOY | {"sample_size": 64}).round_trip()
    assert counted.flops / rows / 1e12 == pytest.approx(2.52 + 1.12, abs=0.02)


@pytest.fixture(scope="module")
def phases():
    return {train: census.census(train, TOY) for train in ("lora", "full")}


@pytest.mark.parametrize("train", ["lora", "full"])
def test_the_shares_of_a_pair_add_up(phases, train):
    rows = {row["phase"]: row for row in phases[train]}
    for mode in census.MODES:
        for share in ("share_of_time", "share_of_launches"):
            whole = [row[share][mode] for name, row in rows.items() if name not in census.BESIDE]
            assert sum(whole) == pytest.approx(1)
    unet, ddim = rows[census.UNET], rows[census.SOLVERS["exact"]]
    # 50 guided steps, each of which has both.
    assert ddim["share_of_launches"]["exact"] / unet["share_of_launches"]["exact"] == pytest.approx(
        ddim["operations"] / unet["operations"]
    )
    # A round trip occurs once per sample, of which the fast mode makes a quarter as many; it is not part of the whole.
    trip = [rows[census.ROUND_TRIP]["share_of_time"][mode] / unet["share_of_time"][mode] for mode in census.MODES]
    assert trip[0] * 50 == pytest.approx(trip[1] * 20)
    assert ddim["share_of_time"]["fast"] == 0 < rows[census.SOLVERS["fast"]]["share_of_time"]["fast"]
    # In the fast mode, five UNet steps per pair, and one forward of the reference.
    fast = [rows[name]["share_of_time"]["fast"] / rows[name]["floor_us"] for name in (census.UNET, census.REFERENCE)]
    assert fast[0] / fast[1] == pytest.approx(5)


def test_the_phases_are_what_the_package_does(phases):
    lora, full = ({row["phase"]: row for row in phases[train]} for train in ("lora", "full"))
    # What guidance adds to a step: a cat of the latents, a subtraction, a product and a sum.
    assert lora[census.GUIDANCE]["operations"] == pytest.approx(4, abs=0.1)
    assert lora[census.LOSS]["operations"] == 1 and lora[census.LOSS]["moved_bytes"] == 5 * 2 * 4 * 64 * 64 * 16
    assert lora[census.LOSS_AUTOGRAD]["moved_bytes"] == 8 * 2 * 4 * 64 * 64 * 16
    assert full[census.POLICY]["flops"] > lora[census.POLICY]["flops"] > 2 * lora[census.REFERENCE]["flops"]
    # Clip and AdamW read and write weight, gradient and two moments of all weights.
    with META:
        unet = census.UNet2DConditionModel(**TOY)
    weights = 4 * sum(weight.numel() for weight in unet.parameters())
    assert 10 * weights <= full[census.UPDATE]["moved_bytes"] <= 14 * weights


def test_the_table_and_its_answer(phases, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(census, "census", lambda train: phases[train])
    monkeypatch.setattr(sys, "argv", ["census", "--json", str(tmp_path / "census.json")])
    census.main()
    result = json.loads((tmp_path / "census.json").read_text())
    table = census.census_table(result)
    assert table == capsys.readouterr().out.rstrip("\n")
    lines = table.splitlines()
    assert len({line.count("|") for line in lines[:-2]}) == 1 and len(lines) == 2 + len(phases["lora"]) + 2
    shares = [
        [row["share_of_launches"][mode] for row in rows if row["phase"] in census.SMALL]
        for rows in phases.values()
        for mode in census.MODES
    ]
    most, together = max(map(max, shares)), max(map(sum, shares))
    assert f"{100 * most:.2g} % of its launches each and {100 * together:.2g} % together" in lines[-1]


def test_sd15_is_the_published_size():
    with META:
        unet = census.UNet2DConditionModel(**SD15)
    assert sum(weight.numel() for weight in unet.parameters()) == 859_520_964
