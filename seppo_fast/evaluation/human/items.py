"""Chooses the two models of a human comparison, and the media that are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from seppo_fast.evaluation.media.items import ITEMS, Media, read_media
from seppo_fast.utils.errors import ConfigError, DataError


@dataclass(frozen=True)
class Material:
    """Generated media that people can compare.

    Attributes:
        folder: the output folder of `seppo-fast score`.
        media: what its `items.json` lists.
    """

    folder: Path
    media: Media

    def pair(self, models: Sequence[str] | None) -> tuple[str, str]:
        """Returns the two models to compare; None: those of the folder, if it has exactly two.

        Raises:
            ConfigError: not exactly two different models are given, or one is not in the folder.
        """
        have = list(self.media.models)
        known = ", ".join(have)
        if models is None and len(have) != 2:
            raise ConfigError(f"--models: choose two of {known}, such as --models {','.join(have[:2])}")
        chosen = have if models is None else list(models)
        if len(chosen) != 2 or chosen[0] == chosen[1]:
            raise ConfigError(f"--models: expected two different models, got {','.join(chosen) or 'none'}; has {known}")
        for name in chosen:
            if name not in have:
                raise ConfigError(f"--models: {name!r} is not in {ITEMS}; it has {known}")
        return chosen[0], chosen[1]

    def files_of(self, models: Sequence[str]) -> dict[tuple[str, str], Path]:
        """Returns the file of each item and model, by (item id, model).

        Raises:
            DataError: a file is missing, or pictures and clips are mixed.
        """
        files = {(item.id, model): self.folder / item.files[model] for item in self.media.items for model in models}
        if len({file.suffix for file in files.values()}) > 1:
            raise DataError(f"{self.folder / ITEMS}: pictures and clips are mixed for {' and '.join(models)}")
        for file in files.values():
            if not file.is_file():
                raise DataError(f"{file}: is missing; rerun seppo-fast score to generate it again")
        return files


def read_items(folder: Path) -> Material:
    """Reads `items.json` in the output folder of `seppo-fast score`; raises what `read_media` raises."""
    return Material(folder, read_media(folder))
