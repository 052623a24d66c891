"""What a user should know of pictures and clips that are used all the same, counted and named.

`check` tells it, and every run does as it opens the cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from seppo_fast.data.examples import Example, printable
from seppo_fast.data.media.colours import can_convert

if TYPE_CHECKING:
    from seppo_fast.data.media.clips import Clip

_SENTENCES = {
    "repeating": "have too few frames for {frames} different ones and repeat some",
    "closer": "are too short for {frames} frames at the usual steps and take them from closer together",
    "pq": "are HDR (PQ) and are decoded as they are, so their colours are pale; convert them to SDR to change that",
    "hlg": "are HDR (HLG) and are decoded as they are, so their colours are pale; convert them to SDR to change that",
    "small": "are enlarged more than twofold: their shorter side is below half of {resolution} pixels",
    "cropped": "lose more than half of their area to the centre crop",
}
_NAMED = 3


class Remarks:
    """Which of the pictures or clips seen are remarkable, by kind; to be told from many threads."""

    def __init__(self, resolution: int) -> None:
        self._resolution = resolution
        self._names: dict[str, set[str]] = {kind: set() for kind in _SENTENCES}

    def see(self, example: Example, name: str, size: tuple[float, float]) -> None:
        """Takes note of an example's picture or clip of this name, shown at this size."""
        if 2 * min(size) < self._resolution:
            self._names["small"].add(_label(example, name))
        if max(size) > 2 * min(size):
            self._names["cropped"].add(_label(example, name))

    def see_clip(self, example: Example, name: str, clip: Clip) -> None:
        """As `see`, and takes note of how the clip's frames were chosen, and of their colours."""
        self.see(example, name, clip.size)
        for kind in clip.remarks:
            self._names[kind].add(_label(example, name))

    def of(self, ids: Sequence[str]) -> dict[str, list[str]]:
        """By kind the names, in the order of these examples' ids; kinds without any are left out."""
        labels = [label for id in ids for label in (id, f"{id} (loser)")]
        found = {kind: [label for label in labels if label in names] for kind, names in self._names.items()}
        return {kind: names for kind, names in found.items() if names}


def _label(example: Example, name: str) -> str:
    is_loser = example.loser is not None and name == example.loser.name
    return f"{example.id} (loser)" if is_loser else example.id


def remark_lines(remarks: Mapping[str, Sequence[str]], total: int, resolution: int, frames: int | None) -> list[str]:
    """A line for each kind of remark on `total` pictures, or clips of which `frames` are taken."""
    lines = []
    if frames is None and not can_convert():
        lines.append("this Pillow has no littlecms: embedded colour profiles are not converted to sRGB")
    for kind, sentence in _SENTENCES.items():
        if names := remarks.get(kind):
            count = f"{len(names)} of {total} {'images' if frames is None else 'clips'}"
            named = ", ".join(map(printable, names[:_NAMED]))
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            lines.append(f"{count} {sentence.format(resolution=resolution, frames=frames)}: {named}{more}")
    return lines
