"""What `seppo-fast score` does about `--real` and `--metrics`, in the order of its phases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from seppo_fast.evaluation.media.items import BASE, Media, media_of
from seppo_fast.evaluation.media.prompts import PromptList
from seppo_fast.evaluation.real.measuring import measure
from seppo_fast.evaluation.real.metrics import METRICS, Choice, chosen, require_applicable, require_known
from seppo_fast.evaluation.real.results import metrics_section, read_measured
from seppo_fast.evaluation.real.sets import wanted_of
from seppo_fast.evaluation.real.sources import open_real, require_real
from seppo_fast.evaluation.real.text import metrics_text
from seppo_fast.evaluation.scoring.table import Scored
from seppo_fast.utils.errors import ConfigError, DataError

_FEWEST = 4  # real files of a distance: two on each side of its floor
Protocol = Mapping[str, Any]  # of settings.json


@dataclass(frozen=True)
class Comparison:
    """The requested comparison with real pictures or clips.

    Attributes:
        real: the folder, or `shapes`.
        choice: the metrics.
    """

    real: str
    choice: Choice

    @classmethod
    def chosen(
        cls, real: str | None, metrics: Sequence[str], features: str | None, weights: Path | None
    ) -> Comparison | None:
        """Checks the options of the command line; returns None if neither is given.

        Raises:
            ConfigError: one is given without the other, is invalid, or files of networks are missing.
        """
        if real is None and not metrics and features is None:
            return None
        if real is None:
            raise ConfigError("--metrics: name the folder of real pictures or clips to compare with, --real FOLDER")
        if not metrics:
            raise ConfigError(
                f"--real {real}: name the metrics, such as --metrics ssim,psnr; known: {', '.join(METRICS)}"
            )
        choice = chosen(metrics, features, weights)
        require_real(real)
        return cls(real, choice)

    def require(self, prompts: PromptList, samples: int, protocol: Protocol) -> None:
        """Checks, before anything is generated, that the metrics can be computed; decodes every real file once.

        Args:
            prompts: the prompts.
            samples: samples per prompt.
            protocol: how media are generated, as in `settings.json`.

        Raises:
            ConfigError: a metric cannot be applied to what the models generate.
            DataError: real files are missing, too few, damaged, or have the wrong kind.
        """
        require_applicable(self.choice, protocol["resolution"], protocol["frames"])
        clips = protocol["frames"] is not None
        media = media_of(prompts, {BASE: ""}, samples, 0, clips=clips)
        real = open_real(self.real, wanted_of(media, protocol))
        kinds = {METRICS[name].kind for name in self.choice.names}
        if kinds - {"pairs"} and len(real.names) < _FEWEST:
            raise DataError(f"--real {self.real}: a distance needs at least {_FEWEST} files, found {len(real.names)}")
        if "pairs" in kinds:
            real.counterparts()
        real.check()

    def measure(
        self, folder: Path, media: Media, protocol: Protocol, device: torch.device, rank: int, world: int
    ) -> None:
        """Measures all media; see `measuring.measure`.

        Raises:
            DataError: also if every metric failed.
        """
        require_applicable(self.choice, protocol["resolution"], protocol["frames"])
        real = open_real(self.real, wanted_of(media, protocol))
        problems = measure(folder, media, real, self.choice, device, rank, world)
        if len(problems) == len(self.choice.names):
            raise DataError(f"{folder}: every metric failed: {'; '.join(problems)}")


def tables(
    scored: Scored, names: Sequence[str] | None
) -> tuple[dict[str, Any], dict[str, Mapping[str, np.ndarray]], str]:
    """Computes the metrics from files alone.

    Args:
        scored: the media and their scores.
        names: the metrics to include; None: all that were measured.

    Returns:
        The section of `scores.json`, the columns of `scores.csv` and the text of `scores.md`; all empty if no metric
        was requested or measured.

    Raises:
        ConfigError: a name is unknown, or a file is malformed.
    """
    require_known(names or ())
    measured = read_measured(scored, names)
    if measured is None:
        return {}, {}, ""
    section = metrics_section(measured)
    return {"metrics": section}, measured.columns, metrics_text(scored.media, section)
