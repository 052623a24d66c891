"""Conversion of published pickles: the same tensors, nothing that runs code, no half-written files."""

from __future__ import annotations

import errno

import pytest
import torch
from safetensors.torch import load_file, save_file

from seppo_fast.scorers import convert as module
from seppo_fast.scorers.convert import convert, count_weights, from_open_clip, sha256
from seppo_fast.utils.errors import ConfigError
from tests.helpers.hostile import payloads
from tests.helpers.tiny_scorers import head_state, open_clip_state, tiny_clip


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_tensors_are_the_published_ones_under_their_names(tmp_path, capsys, wrapped):
    state = head_state(6) | {"half": torch.randn(3, 5).half(), "turned": torch.randn(4, 3).T, "count": torch.tensor(7)}
    state |= {"shared": state["half"], "part": state["half"][:2]}
    file = tmp_path / "head.v2.pth"
    torch.save({"state_dict": state, "epoch": 3} if wrapped else state, file)
    new = convert(file)
    assert new == tmp_path / "head.v2.safetensors"
    loaded = load_file(new)
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], value) and loaded[key].dtype == value.dtype for key, value in state.items())
    said = capsys.readouterr().out
    assert sha256(file) in said and sha256(new) in said and "15 tensors" in said
    with pytest.raises(ConfigError, match="exists; remove it to convert head.v2.pth again"):
        convert(file)


def test_pickles_that_run_code_are_refused(tmp_path, marker):
    for number, payload in enumerate(payloads(marker)):
        file = tmp_path / f"hostile{number}.pt"
        file.write_bytes(payload)
        with pytest.raises(ConfigError, match="cannot be read as a pickle of tensors alone"):
            convert(file)
        assert not file.with_suffix(".safetensors").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], "contains no state dict"),
        ({}, "contains no state dict"),
        ({"state_dict": {}}, "contains no state dict"),
        ({"weight": torch.ones(2), "epoch": 3}, "'epoch' is not a tensor"),
        ({3: torch.ones(2)}, "3 is not a tensor"),
    ],
)
def test_anything_but_a_state_dict_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "file.pt")
    with pytest.raises(ConfigError, match=message):
        convert(tmp_path / "file.pt")


def test_a_missing_or_cut_off_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        convert(tmp_path / "none.pt")
    torch.save(head_state(6), tmp_path / "cut.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:1000])
    with pytest.raises(ConfigError, match="cannot be read"):
        convert(tmp_path / "cut.pt")


def test_a_full_disk_leaves_no_file(tmp_path, monkeypatch):
    def full(tensors, file):
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    torch.save(head_state(6), tmp_path / "head.pt")
    with pytest.raises(ConfigError, match="no space left for .*safetensors"):
        convert(tmp_path / "head.pt")
    assert [file.name for file in tmp_path.iterdir()] == ["head.pt"]


def test_open_clips_names_become_those_of_transformers(tmp_path):
    expected = load_file(tiny_clip(tmp_path / "clip") / "model.safetensors")
    renamed = from_open_clip(open_clip_state(tmp_path / "clip"))
    assert renamed.keys() == expected.keys()
    assert all(torch.equal(renamed[name], tensor) for name, tensor in expected.items())


def test_other_names_are_not_changed():
    others = {
        "transformers.x": torch.ones(1),
        "visual.other": torch.ones(2),
        "text_model.encoder.layers.0.x": torch.ones(3),
    }
    assert from_open_clip(others) == others


def test_weights_are_counted_by_the_header(tmp_path):
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(2, dtype=torch.float16), "c": torch.tensor(1.0)}, file)
    assert count_weights(file) == 15 + 2 + 1
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(ConfigError, match="x.safetensors cannot be read as safetensors"):
        count_weights(file)
