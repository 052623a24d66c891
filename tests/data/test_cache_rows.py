"""Shards with rows of different lengths and shapes, and caches with several latent shapes or with numbers."""

from __future__ import annotations

import json

import pytest
import torch

from seppo_fast.data.cache.build import _Writer
from seppo_fast.data.cache.latents import INDEX, LatentCache
from seppo_fast.data.cache.opening import open_or_build
from seppo_fast.data.cache.rows import PackedRows, pack
from seppo_fast.data.remarks import Remarks
from seppo_fast.data.sources import open_source
from seppo_fast.diffusion.conditioning import Conditioning
from seppo_fast.utils.errors import DataError
from tests.helpers.cache import RESOLUTION, FakeEncoder


def test_rows_come_back_as_they_were():
    generator = torch.Generator().manual_seed(0)
    rows = [
        {"a": torch.randn(length, 3, generator=generator).half(), "n": torch.tensor([length]), "s": torch.tensor(2.5)}
        for length in (4, 1, 0, 7)
    ]
    packed = pack(rows)
    for name in ("a", "n", "s"):
        found = PackedRows(packed[name], packed[PackedRows.table(name)])
        assert len(found) == 4
        for row, held in enumerate(rows):
            assert torch.equal(found[row], held[name]) and found[row].dtype == held[name].dtype
    assert PackedRows.names(list(packed)) == ["a", "n", "s"]


@pytest.mark.parametrize(
    ("values", "shapes"),
    [
        (torch.zeros(5), torch.tensor([[2, 3]], dtype=torch.int32)),
        (torch.zeros(6), torch.tensor([[-2, -3]], dtype=torch.int32)),
        (torch.zeros(6), torch.tensor([6], dtype=torch.int32)),
        (torch.zeros(6), torch.tensor([[6]])),
        (torch.zeros(0), torch.zeros(0, 2, dtype=torch.int32)),
        (torch.zeros(2, 3), torch.tensor([[2, 3]], dtype=torch.int32)),
    ],
)
def test_a_table_that_is_not_of_the_values_is_refused(values, shapes):
    with pytest.raises(ValueError, match="table of shapes"):
        PackedRows(values, shapes)


class Numbered(FakeEncoder):
    """An encoder whose latents alternate between two shapes."""

    def encode_images(self, images):
        latents = super().encode_images(images)
        return latents if self.images % 2 else latents[:, :, :2]


def test_latents_of_several_shapes_and_numbers_are_kept(tmp_path):
    source = open_source("shapes:5:3")
    writer = _Writer(source, Numbered(), tmp_path, losers=False, clips=False)
    images = [source[row].image.open() for row in range(5)]
    for row, image in enumerate(images):
        example = source[row].__class__(**vars(source[row]) | {"number": row / 4 if row else None})
        writer.add([(example, [image[:RESOLUTION, :RESOLUTION]])])
    writer.finish("key", [], Remarks(RESOLUTION))
    cache = LatentCache(tmp_path, "key")
    assert cache.latent_shapes == [(4, 4, 4), (4, 2, 4)] and cache.numbers == [None, 0.25, 0.5, 0.75, 1.0]
    with pytest.raises(DataError, match="latents of 2 shapes; one shape is required"):
        _ = cache.latent_shape
    assert cache.winners([0, 2, 4]).shape == (3, 4, 4, 4) and cache.winners([3, 1]).shape == (2, 4, 2, 4)
    index = json.loads((tmp_path / INDEX).read_text())
    (tmp_path / INDEX).write_text(json.dumps(index | {"numbers": [1.0]}))
    with pytest.raises(DataError, match="1 number for 5 examples"):
        LatentCache(tmp_path, "key")


def test_a_cache_without_numbers_says_so_and_empty_rows_have_a_shape(tmp_path):
    cache = open_or_build(open_source("shapes:3:1"), FakeEncoder(), resolution=RESOLUTION, folder=tmp_path)
    assert cache.numbers is None and cache.latent_shapes == [(4, 4, 4)]
    assert cache.winners([]).shape == (0, 4, 4, 4) and cache.conditioning([]).rows == 0


def test_conditioning_is_a_mapping_of_rows():
    made = Conditioning({"a": torch.arange(6.0).view(3, 2), "b": torch.arange(3)})
    assert (made.rows, len(made), list(made)) == (3, 2, ["a", "b"])
    assert made.take([2, 0])["b"].tolist() == [2, 0] and made.take(slice(1, None)).rows == 2
    assert made.repeat(2)["b"].tolist() == [0, 1, 2, 0, 1, 2] and made.repeat(2)["a"].shape == (6, 2)
    assert made.take([1]).expand(4)["a"].tolist() == [[2.0, 3.0]] * 4
    assert [part["b"].tolist() for part in made.split(2)] == [[0, 1], [2]]
    assert Conditioning.cat([made, made.take([1])])["b"].tolist() == [0, 1, 2, 1]
    assert made.to(torch.device("meta"))["a"].device.type == "meta"
    assert repr(made) == "Conditioning(a (3, 2), b (3,))"
    for wrong in ({}, {"a": torch.zeros(2), "b": torch.zeros(3)}):
        with pytest.raises(ValueError, match="the same number of rows"):
            Conditioning(wrong)
    with pytest.raises(ValueError, match="cannot be concatenated"):
        Conditioning.cat([made, Conditioning({"a": torch.zeros(1, 3), "b": torch.zeros(1)})])
    with pytest.raises(ValueError, match="cannot be concatenated"):
        Conditioning.cat([made, Conditioning({"a": torch.zeros(1, 2)})])
