"""The metrics that can be requested by name, the files that they need, and what they can be applied to."""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from seppo_fast.config.schema import did_you_mean
from seppo_fast.evaluation.metrics import alexnet, features, i3d, similarity
from seppo_fast.scorers.convert import sha256
from seppo_fast.scorers.sources import Source
from seppo_fast.shapes import judge, world
from seppo_fast.utils.errors import ConfigError

Kind = Literal["frechet", "kernel", "pairs"]
VERSION = "1"  # of the arithmetic; increased if the values of a metric change
_PLACE = "metrics"  # the subfolder of --weights
_INCEPTION = Source(
    _PLACE,
    "mseitzer/pytorch-fid",
    ("pt_inception-2015-12-05-6726825d.safetensors",),
    "91 MB",
    "pt_inception-2015-12-05-6726825d.pth",
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
)
_I3D = Source(
    _PLACE,
    "wilson1yan/VideoGPT",
    ("i3d_pretrained_400.safetensors",),
    "50 MB",
    "i3d_pretrained_400.pt",
    "https://drive.google.com/uc?id=1mQK8KD8G6UWRa5t87SRMm5PVXtlpneJT",
)
_ALEXNET = Source(
    _PLACE,
    "pytorch/vision",
    ("alexnet-owt-7be5be79.safetensors",),
    "233 MB",
    "alexnet-owt-7be5be79.pth",
    "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
)
_HEADS = Source(
    _PLACE,
    "richzhang/PerceptualSimilarity",
    ("alex.safetensors",),
    "6 KB",
    "alex.pth",
    "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/alex.pth",
)


@dataclass(frozen=True)
class Metric:
    """A metric that can be requested by name.

    Attributes:
        label: its name in tables.
        kind: whether it is a Fréchet distance or a kernel distance of features, or compares pairs of pictures.
        features: the features of a distance, see `load_features`; empty: those of `--features`.
        sources: where the files of its network come from; empty if it has none.
        higher_is_better: whether a higher value means more similar.
        least: the smallest side of pictures in pixels.
        frames: the smallest number of frames of clips; 0 if it can be applied to pictures, too.
    """

    label: str
    kind: Kind
    features: str = ""
    sources: tuple[Source, ...] = ()
    higher_is_better: bool = False
    least: int = 1
    frames: int = 0


METRICS = {
    "ssim": Metric("SSIM", "pairs", higher_is_better=True, least=11),
    "psnr": Metric("PSNR (dB)", "pairs", higher_is_better=True),
    "lpips": Metric("LPIPS", "pairs", sources=(_ALEXNET, _HEADS), least=alexnet.SMALLEST),
    "fid": Metric("FID", "frechet", "inception", (_INCEPTION,)),
    "clean-fid": Metric("clean-FID", "frechet", "inception-clean", (_INCEPTION,)),
    "kid": Metric("KID", "kernel", "inception", (_INCEPTION,)),
    "fvd": Metric("FVD", "frechet", "i3d", (_I3D,), frames=i3d.MIN_FRAMES),
    "frechet": Metric("Fréchet distance", "frechet"),
    "kernel": Metric("kernel distance", "kernel"),
}


@dataclass(frozen=True)
class Choice:
    """The metrics of a command.

    Attributes:
        names: keys of `METRICS`, each once.
        features: the features of `frechet` and `kernel`: `judge` or `module:function`; empty if neither is chosen.
        weights: the folder with the networks' files in its subfolder `metrics`.
    """

    names: tuple[str, ...]
    features: str = ""
    weights: Path | None = None

    def features_of(self, name: str) -> str:
        """Returns the features of a metric; empty for a comparison of pairs."""
        metric = METRICS[name]
        return "" if metric.kind == "pairs" else metric.features or self.features

    def files(self, name: str) -> tuple[Path, ...]:
        """Returns the files of a metric's network, in the order of its sources, all of which exist."""
        found = [source.locate(self.weights) for source in METRICS[name].sources]
        return tuple(path for files in found if files is not None for path in files.values())

    def digest(self, name: str) -> str:
        """Returns a digest of everything but the pictures that the features or values of a metric depend on.

        The code of a user's own module is included, but not the modules and weights that it loads.
        """
        features_name = self.features_of(name)
        parts = [VERSION, features_name or name, *(sha256(file) for file in self.files(name))]
        if features_name == features.JUDGE:
            parts += [inspect.getsource(module) for module in (features, judge, world)]
        elif ":" in features_name:
            parts.append(_source_of(features_name))
        elif not METRICS[name].sources:
            parts.append(inspect.getsource(similarity))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def chosen(names: Sequence[str], features_name: str | None, weights: Path | None) -> Choice:
    """Checks the metrics of a command line.

    Args:
        names: the metrics' names.
        features_name: the features of `frechet` and `kernel`; None if none were given.
        weights: the folder of networks' files.

    Raises:
        ConfigError: a name is unknown or repeated, features are missing, superfluous or cannot be imported, or have no
            source, or files of networks are missing; the message lists all of these.
    """
    require_known(names)
    own = [name for name in names if METRICS[name].kind != "pairs" and not METRICS[name].features]
    if own and not features_name:
        raise ConfigError(f"--metrics {','.join(own)}: add --features judge, or module:function for your own features")
    if features_name and not own:
        raise ConfigError(
            f"--features {features_name}: only the metrics frechet and kernel use it; add one of them to --metrics"
        )
    if features_name:
        if features_name != features.JUDGE and ":" not in features_name:
            hint = did_you_mean(features_name, (features.JUDGE,))
            raise ConfigError(f"--features {features_name!r}: not judge or module:function{hint}")
        features.load_features(features_name, None, torch.device("cpu"))
        if ":" in features_name:
            _source_of(features_name)
    absent = {
        source: f"metric {name}: missing {source.advice(weights)}"
        for name in names
        for source in METRICS[name].sources
        if source.locate(weights) is None
    }
    if absent:
        raise ConfigError("--metrics: files are missing\n" + "\n".join(f"  {line}" for line in absent.values()))
    return Choice(tuple(names), features_name or "", weights)


def _source_of(features_name: str) -> str:
    """Returns the source of the module with a user's own features; raises ConfigError without one."""
    module = features_name.partition(":")[0]
    try:
        return inspect.getsource(sys.modules[module])
    except (OSError, TypeError, KeyError) as problem:
        raise ConfigError(
            f"--features {features_name}: the module {module} has no source in Python, by which changed features are "
            "noticed; call the function from a module of your own"
        ) from problem


def require_known(names: Sequence[str]) -> None:
    """Raises ConfigError if a metric is unknown or named twice."""
    for name in names:
        if name not in METRICS:
            raise ConfigError(f"--metrics: {name!r} is unknown{did_you_mean(name, METRICS)}")
    if len(set(names)) < len(names):
        raise ConfigError(f"--metrics {','.join(names)}: name each metric only once")


def require_applicable(choice: Choice, resolution: int, frames: int | None) -> None:
    """Checks that the metrics can be applied to what the models generate.

    Args:
        choice: the metrics.
        resolution: the side of the generated pictures or clips in pixels.
        frames: the number of frames of the generated clips; None for pictures.

    Raises:
        ConfigError: a metric needs clips, more frames, larger pictures, or pictures of the embedded worlds' size.
    """
    for name in choice.names:
        metric = METRICS[name]
        if metric.frames and frames is None:
            raise ConfigError(f"--metrics {name}: compares clips, but these models make pictures; leave it out")
        if frames is not None and frames < metric.frames:
            raise ConfigError(
                f"--metrics {name}: needs clips of at least {metric.frames} frames, but these models make {frames}; "
                "leave it out"
            )
        if resolution < metric.least:
            raise ConfigError(
                f"--metrics {name}: needs pictures of at least {metric.least} x {metric.least} pixels, but these "
                f"models make {resolution} x {resolution}; leave it out"
            )
    if choice.features == features.JUDGE and resolution != world.SIZE:
        raise ConfigError(
            f"--features judge: measures pictures of {world.SIZE} x {world.SIZE} pixels, but these models make "
            f"{resolution} x {resolution}; name features of your own with module:function"
        )
    if choice.features == features.JUDGE and frames == 1:
        raise ConfigError("--features judge: needs clips of at least 2 frames")
