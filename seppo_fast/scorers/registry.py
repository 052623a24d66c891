"""The registry of scorers by name. Their modules are imported and their weights are read only when one is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from seppo_fast.config.schema import did_you_mean
from seppo_fast.scorers.scorer import Scorer
from seppo_fast.scorers.sources import Source
from seppo_fast.utils.errors import ConfigError

if TYPE_CHECKING:
    import torch

Files = list[dict[str, Path]]  # by name, for each source of a scorer
Build = Callable[[Files, "torch.device", "torch.dtype"], Scorer]


@dataclass(frozen=True)
class ScorerEntry:
    """A scorer that can be selected by name.

    Attributes:
        label: its name in tables, with the unit of its scores.
        build: builds it from the files of its sources, a device and a dtype.
        sources: where its files come from; empty if it has none.
    """

    label: str
    build: Build
    sources: tuple[Source, ...] = ()


def _shapes(files: Files, device: torch.device, dtype: torch.dtype) -> Scorer:
    from seppo_fast.scorers.shapes import ShapesScorer

    return ShapesScorer()


def _brightness(files: Files, device: torch.device, dtype: torch.dtype) -> Scorer:
    from seppo_fast.scorers.functions import FunctionScorer, brightness

    return FunctionScorer("brightness", brightness)


def _pickscore(files: Files, device: torch.device, dtype: torch.dtype) -> Scorer:
    from seppo_fast.scorers.clip import pickscore

    return pickscore(files[0] | files[1], device, dtype)


def _clip(files: Files, device: torch.device, dtype: torch.dtype) -> Scorer:
    from seppo_fast.scorers.clip import clip_score

    return clip_score(files[0], device, dtype)


def _hps(name: str, file: str) -> Build:
    def build(files: Files, device: torch.device, dtype: torch.dtype) -> Scorer:
        from seppo_fast.scorers.clip import hps

        return hps(name, files[0][file], files[1]["vocab.json"].parent, device, dtype)

    return build


def _aesthetic(files: Files, device: torch.device, dtype: torch.dtype) -> Scorer:
    from seppo_fast.scorers.clip import aesthetic

    return aesthetic(files[1], files[0][_HEAD], device, dtype)


def _imagereward(files: Files, device: torch.device, dtype: torch.dtype) -> Scorer:
    from seppo_fast.scorers.imagereward import imagereward

    return imagereward(files[0]["ImageReward.safetensors"], files[1]["vocab.txt"].parent, device, dtype)


_MODEL = ("config.json", "model.safetensors")
_WORDS = ("vocab.json", "merges.txt")
_HEAD = "sac+logos+ava1-l14-linearMSE.safetensors"
_CLIP = Source("clip", "openai/clip-vit-large-patch14", _MODEL + _WORDS, "428 M parameters")


def _clip_words(place: str) -> Source:
    return Source(place, "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", _WORDS, "2 MB")


def _hps_entry(version: str, stem: str) -> ScorerEntry:
    name = f"hpsv{version}"
    weights = Source(name, "xswu/HPSv2", (f"{stem}.safetensors",), "986 M parameters, 2.0 GB", f"{stem}.pt")
    return ScorerEntry(f"HPSv{version} (100 x cos)", _hps(name, f"{stem}.safetensors"), (weights, _clip_words(name)))


SCORERS: dict[str, ScorerEntry] = {
    "shapes": ScorerEntry("shapes (share of attributes)", _shapes),
    "brightness": ScorerEntry("brightness", _brightness),
    "pickscore": ScorerEntry(
        "PickScore (logit scale x cos)",
        _pickscore,
        (
            Source("pickscore", "yuvalkirstain/PickScore_v1", _MODEL, "986 M parameters"),
            _clip_words("pickscore"),
        ),
    ),
    "hpsv2.0": _hps_entry("2.0", "HPS_v2_compressed"),
    "hpsv2.1": _hps_entry("2.1", "HPS_v2.1_compressed"),
    "imagereward": ScorerEntry(
        "ImageReward",
        _imagereward,
        (
            Source("imagereward", "THUDM/ImageReward", ("ImageReward.safetensors",), "1.79 GB", "ImageReward.pt"),
            Source("imagereward", "google-bert/bert-base-uncased", ("vocab.txt",), "0.2 MB"),
        ),
    ),
    "aesthetic": ScorerEntry(
        "LAION aesthetic v2",
        _aesthetic,
        (
            Source(
                "aesthetic",
                "christophschuhmann/improved-aesthetic-predictor",
                (_HEAD,),
                "3.7 MB",
                "sac+logos+ava1-l14-linearMSE.pth",
                "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
                "sac%2Blogos%2Bava1-l14-linearMSE.pth",
            ),
            _CLIP,
        ),
    ),
    "clip": ScorerEntry("CLIP score (100 x cos)", _clip, (_CLIP,)),
}


def missing_weights(name: str, folder: Path | None) -> str | None:
    """Returns a message about a scorer's missing files, with source, size and command; None if nothing is missing.

    Nothing is loaded or downloaded, and the files' content is not read.

    Args:
        name: a key of `SCORERS` or `module:function`, which has no files.
        folder: the folder with a subfolder of files per scorer, named like the scorer; None: only the hub cache.

    Raises:
        ConfigError: the name is unknown.
    """
    lacking = [source.advice(folder) for source in _sources(name) if source.locate(folder) is None]
    return f"scorer {name}: missing {'; also '.join(lacking)}" if lacking else None


def weight_count(name: str, folder: Path | None) -> int:
    """Returns how many weights the files of a scorer hold, without loading them; 0 for a scorer without files.

    Args:
        name: see `missing_weights`.
        folder: see `missing_weights`.

    Raises:
        ConfigError: the name is unknown, or a file cannot be read.
    """
    from seppo_fast.scorers.convert import count_weights

    located = [source.locate(folder) or {} for source in _sources(name)]
    return sum(count_weights(file) for files in located for file in files.values() if file.suffix == ".safetensors")


def load_scorer(name: str, device: torch.device, dtype: torch.dtype, folder: Path | None) -> Scorer:
    """Loads a scorer.

    Args:
        name: a key of `SCORERS` or `module:function`, a function of prompts and pictures.
        device: where its networks run.
        dtype: their dtype; embeddings are normalized and heads are applied in float32 in any case.
        folder: see `missing_weights`.

    Raises:
        ConfigError: the name is unknown, files are missing or damaged, or the module cannot be imported.
    """
    message = missing_weights(name, folder)
    if message is not None:
        raise ConfigError(message)
    if ":" in name:
        from seppo_fast.scorers.functions import own_scorer

        return own_scorer(name)
    files = [source.locate(folder) for source in _sources(name)]
    return SCORERS[name].build([found for found in files if found is not None], device, dtype)


def _sources(name: str) -> tuple[Source, ...]:
    if ":" in name:
        return ()
    if name not in SCORERS:
        hint = did_you_mean(name, SCORERS)
        raise ConfigError(f"scorer {name!r} is unknown{hint}, or module:function for a function of your own")
    return SCORERS[name].sources
