"""Collects remarks on images and clips that are used but noteworthy, such as small ones: counted and named.

`check` prints them, and so does every run when it opens the cache. Caches store the kinds, not the sentences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from seppo_fast.data.examples import Example, counted, printable
from seppo_fast.data.media.colours import can_convert

if TYPE_CHECKING:
    from seppo_fast.data.media.clips import Clip

_SENTENCES = {
    "repeating": "{have} too few frames to choose {frames} different ones and {repeat} some",
    "closer": "{are} too short for {frames} frames at the usual spacing and {use} frames closer together",
    "pq": "{are} HDR (PQ) but decoded without conversion to SDR, so {their} colours are pale; convert {them} to "
    "avoid that",
    "hlg": "{are} HDR (HLG) but decoded without conversion to SDR, so {their} colours are pale; convert {them} to "
    "avoid that",
    "small": "{are} enlarged more than twofold: {their} shorter side is below half of {resolution} pixels",
    "cropped": "{lose} more than half of {their} area to the centre crop",
}
_SINGULAR = {
    "have": "has", "repeat": "repeats", "are": "is", "use": "uses", "lose": "loses", "their": "its", "them": "it",
}  # fmt: skip
_NAMED = 3


class Remarks:
    """Collects remarks on images or clips, by kind; may be called from several threads."""

    def __init__(self, resolution: int) -> None:
        self._resolution = resolution
        self._names: dict[str, set[str]] = {kind: set() for kind in _SENTENCES}

    def see(self, example: Example, name: str, size: tuple[float, float]) -> None:
        """Records the remarks on an example's image or clip of this name, from its display size."""
        if 2 * min(size) < self._resolution:
            self._names["small"].add(_label(example, name))
        if max(size) > 2 * min(size):
            self._names["cropped"].add(_label(example, name))

    def see_clip(self, example: Example, name: str, clip: Clip) -> None:
        """Records what `see` does, and the remarks on the choice of the clip's frames and on their colours."""
        self.see(example, name, clip.size)
        for kind in clip.remarks:
            self._names[kind].add(_label(example, name))

    def of(self, ids: Sequence[str]) -> dict[str, list[str]]:
        """Returns the names by kind, in the order of these examples' ids; kinds without names are left out."""
        labels = [label for id in ids for label in (id, f"{id} (loser)")]
        found = {kind: [label for label in labels if label in names] for kind, names in self._names.items()}
        return {kind: names for kind, names in found.items() if names}


def _label(example: Example, name: str) -> str:
    is_loser = example.loser is not None and name == example.loser.name
    return f"{example.id} (loser)" if is_loser else example.id


def remark_lines(remarks: Mapping[str, Sequence[str]], total: int, resolution: int, frames: int | None) -> list[str]:
    """Returns one line per kind of remark on `total` images or, if `frames` is given, clips."""
    lines = []
    nouns = ("image", "images") if frames is None else ("clip", "clips")
    if frames is None and not can_convert():
        lines.append("this Pillow has no littlecms: embedded colour profiles are not converted to sRGB")
    for kind, sentence in _SENTENCES.items():
        if names := remarks.get(kind):
            count = f"{len(names)} of {counted(total, *nouns)}"
            words = _SINGULAR if len(names) == 1 else dict(zip(_SINGULAR, _SINGULAR, strict=True))
            named = ", ".join(map(printable, names[:_NAMED]))
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            lines.append(f"{count} {sentence.format(resolution=resolution, frames=frames, **words)}: {named}{more}")
    return lines
