"""Scorers by name: what is missing, where files are searched, functions of the user's own."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants

from seppo_fast.scorers import registry, sources
from seppo_fast.scorers.convert import convert
from seppo_fast.scorers.functions import brightness
from seppo_fast.scorers.registry import SCORERS, load_scorer, missing_weights
from seppo_fast.scorers.shapes import ShapesScorer
from seppo_fast.utils.errors import ConfigError
from tests.helpers import toy_scorer
from tests.helpers.tiny_scorers import clip_words, head_state, tiny_clip

CPU = torch.device("cpu")
PUBLISHED = ("pickscore", "hpsv2.0", "hpsv2.1", "imagereward", "aesthetic", "clip")
TOY = "tests.helpers.toy_scorer:named_color"


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    """A hub cache without files."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def in_cache(cache: Path, repository: str) -> Path:
    """Returns the folder of a repository's files in a hub cache."""
    place = cache / f"models--{repository.replace('/', '--')}"
    (place / "refs").mkdir(parents=True, exist_ok=True)
    (place / "refs" / "main").write_text("0" * 40)
    (place / "snapshots" / ("0" * 40)).mkdir(parents=True, exist_ok=True)
    return place / "snapshots" / ("0" * 40)


# Names


def test_the_registry_knows_these_scorers():
    assert set(SCORERS) == {"shapes", "brightness", *PUBLISHED}
    assert len({entry.label for entry in SCORERS.values()}) == len(SCORERS)


def test_an_unknown_name_is_refused_with_the_nearest():
    for call in (lambda: missing_weights("pikscore", None), lambda: load_scorer("pikscore", CPU, torch.float32, None)):
        with pytest.raises(ConfigError, match=r"'pikscore' is unknown, did you mean 'pickscore'\?, or module:function"):
            call()


def test_naming_scorers_loads_neither_transformers_nor_weights():
    code = (
        "import sys; from seppo_fast.scorers.registry import SCORERS, missing_weights; "
        "assert [missing_weights(name, None) for name in SCORERS]; print('transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False", done.stderr


def test_the_scorers_without_weights_need_no_files():
    assert missing_weights("shapes", None) is missing_weights("brightness", None) is None
    assert isinstance(load_scorer("shapes", CPU, torch.float32, None), ShapesScorer)
    pictures = np.random.default_rng(0).integers(0, 256, (3, 5, 7, 3), dtype=np.uint8)
    scorer = load_scorer("brightness", CPU, torch.float32, None)
    assert scorer(["a"] * 3, pictures) == pytest.approx([picture.mean() / 255 for picture in pictures])
    assert scorer(["a"], pictures[None]) == pytest.approx([pictures.mean() / 255])
    assert scorer([], pictures[:0]).shape == (0,)
    assert (scorer.name, scorer.cut, len(scorer.digest)) == ("brightness", 0, 64)


# What is missing


@pytest.mark.parametrize("name", PUBLISHED)
def test_missing_weights_are_named_with_source_size_and_command(name, tmp_path):
    for folder in (None, tmp_path / "weights"):
        message = missing_weights(name, folder)
        assert message.startswith(f"scorer {name}: missing ")
        for source in SCORERS[name].sources:
            assert source.repository in message and source.size in message
        assert "hf download " in message and ("--local-dir" in message or folder is None)
        with pytest.raises(ConfigError) as caught:
            load_scorer(name, CPU, torch.float32, folder)
        assert str(caught.value) == message and caught.value.exit_code == 2


def test_the_messages_in_full(tmp_path):
    assert missing_weights("clip", None) == (
        "scorer clip: missing config.json, model.safetensors, vocab.json, merges.txt of openai/clip-vit-large-patch14 "
        "(428 M parameters); not found in the hub cache; run hf download openai/clip-vit-large-patch14 config.json "
        "model.safetensors vocab.json merges.txt"
    )
    place = clip_words(tmp_path / "a b" / "hpsv2.1")
    assert missing_weights("hpsv2.1", tmp_path / "a b") == (
        "scorer hpsv2.1: missing HPS_v2.1_compressed.pt of xswu/HPSv2 (986 M parameters, 2.0 GB); not found in "
        f"{place} or the hub cache; run hf download xswu/HPSv2 HPS_v2.1_compressed.pt --local-dir '{place}' && "
        f"seppo-fast score --convert '{place}/HPS_v2.1_compressed.pt'"
    )
    (place / "HPS_v2.1_compressed.pt").write_bytes(b"")
    assert missing_weights("hpsv2.1", tmp_path / "a b") == (
        f"scorer hpsv2.1: missing {place}/HPS_v2.1_compressed.safetensors: the published file is a pickle, which is "
        f"not loaded, because it can run code; convert it once: seppo-fast score --convert "
        f"'{place}/HPS_v2.1_compressed.pt'"
    )
    assert "curl -L https://github.com/christophschuhmann/" in missing_weights("aesthetic", None)
    source = sources.Source("metrics", "a/b", ("x.safetensors",), "1 MB", "x.pt", "https://example.org/uc?id=1&b=2")
    assert "curl -L 'https://example.org/uc?id=1&b=2' -o scorers/metrics/x.pt" in source.advice(None)
    assert missing_weights("hpsv2.0", None).count(", and add --weights scorers") == 1


# Where files are found


def test_files_of_one_scorer_may_be_in_the_folder_and_in_the_cache(tmp_path, empty_cache):
    """The folder is searched first; the aesthetic score uses the CLIP of the CLIP score."""
    head = tmp_path / "weights" / "aesthetic"
    head.mkdir(parents=True)
    torch.save(head_state(24), head / "sac+logos+ava1-l14-linearMSE.pth")
    assert "--convert" in missing_weights("aesthetic", tmp_path / "weights")
    sources_of = SCORERS["aesthetic"].sources
    convert(head / "sac+logos+ava1-l14-linearMSE.pth")
    assert missing_weights("aesthetic", tmp_path / "weights").count(" of ") == 1
    cached = tiny_clip(in_cache(empty_cache, "openai/clip-vit-large-patch14"))
    assert missing_weights("aesthetic", tmp_path / "weights") is None
    assert sources_of[1].locate(tmp_path / "weights")["vocab.json"] == cached / "vocab.json"
    pictures = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 3), dtype=np.uint8)
    first = load_scorer("aesthetic", CPU, torch.float32, tmp_path / "weights")(["a", "b"], pictures)
    local = tiny_clip(tmp_path / "weights" / "clip", seed=1)
    assert sources_of[1].locate(tmp_path / "weights")["vocab.json"] == local / "vocab.json"
    assert not np.allclose(
        load_scorer("aesthetic", CPU, torch.float32, tmp_path / "weights")(["a"] * 2, pictures), first
    )


def test_a_pickle_in_the_cache_is_converted_there(empty_cache):
    place = in_cache(empty_cache, "THUDM/ImageReward")
    assert "hf download THUDM/ImageReward ImageReward.pt" in missing_weights("imagereward", None)
    (place / "ImageReward.pt").write_bytes(b"")
    assert f"seppo-fast score --convert {place}/ImageReward.pt" in missing_weights("imagereward", None)
    (place / "ImageReward.safetensors").write_bytes(b"")
    assert "ImageReward.pt" not in missing_weights("imagereward", None)


def test_a_part_of_the_files_is_not_enough(tmp_path, empty_cache):
    clip_words(in_cache(empty_cache, "openai/clip-vit-large-patch14"))
    clip_words(tmp_path / "clip")
    assert "config.json, model.safetensors" in missing_weights("clip", tmp_path)


def test_a_file_that_the_hub_is_known_to_lack_is_missing(monkeypatch):
    monkeypatch.setattr(sources, "try_to_load_from_cache", lambda *arguments: object())
    assert missing_weights("clip", None) is not None


# Functions


def test_a_function_of_the_users_own_is_a_scorer():
    scorer = registry.load_scorer(TOY, CPU, torch.float32, None)
    pictures = np.zeros((3, 4, 5, 3), np.uint8)
    pictures[0, ..., 0] = 255
    pictures[1] = (0, 51, 102)
    assert missing_weights(TOY, None) is None
    scores = scorer(["A red car", "a blue car", "a car"], pictures)
    assert scores.dtype == np.float64 and scores[:2] == pytest.approx([1.0, 0.3]) and np.isnan(scores[2])
    assert scorer(["a red car"], pictures[None]) == pytest.approx([1.5 / 3 - (1 + 0.2 + 0.4) / 6])
    digest = hashlib.sha256(Path(toy_scorer.__file__).read_bytes()).hexdigest()
    assert (scorer.name, scorer.digest, scorer.version) == (TOY, digest, digest[:8])
    assert scorer.higher_is_better and scorer.cut == 0


def test_a_changed_function_is_another_version(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    versions = []
    for number in (1, 22):
        (tmp_path / "changing_scorer.py").write_text(f"def score(prompts, pictures):\n    return [{number}]\n")
        sys.modules.pop("changing_scorer", None)
        versions.append(load_scorer("changing_scorer:score", CPU, torch.float32, None).version)
    assert versions[0] != versions[1]


@pytest.mark.parametrize(
    ("code", "name", "message"),
    [
        ("", "no_such_module:score", "cannot be imported .ModuleNotFoundError.* PYTHONPATH"),
        ("1 / 0", "own_scorer_a:score", "cannot be imported .ZeroDivisionError"),
        ("", "own_scorer_b:score", "has no 'score'"),
        ("score = 3", "own_scorer_c:score", "has no function 'score'"),
        ("", ":score", "cannot be imported"),
        ("", "own_scorer_d:", "has no ''"),
    ],
)
def test_a_module_that_cannot_be_used_is_a_configuration_error(code, name, message, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    if name.startswith("own"):
        (tmp_path / f"{name.partition(':')[0]}.py").write_text(code)
    with pytest.raises(ConfigError, match=message):
        load_scorer(name, CPU, torch.float32, None)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ("[1.0]", r"shape \(2,\), got \(1,\)"),
        ("[[1.0], [2.0]]", r"got \(2, 1\)"),
        ("'ab'", "expected 2 scores, got str"),
    ],
)
def test_a_function_must_return_a_number_per_prompt(result, message, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "returning.py").write_text(f"def score(prompts, pictures):\n    return {result}\n")
    sys.modules.pop("returning", None)
    with pytest.raises(ValueError, match=message):
        load_scorer("returning:score", CPU, torch.float32, None)(["a", "b"], np.zeros((2, 4, 4, 3), np.uint8))
    assert brightness(["a"], np.full((1, 4, 4, 3), 51, np.uint8)) == pytest.approx([0.2])
