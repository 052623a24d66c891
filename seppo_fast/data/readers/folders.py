"""The data set of captioned files below one folder, images or clips."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from seppo_fast.data.examples import Example, Problem, Source
from seppo_fast.data.media.contents import clip_file_sha256, picture_file_sha256
from seppo_fast.data.media.images import file_ref
from seppo_fast.data.names import path_of

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".webm", ".mkv", ".avi")


@dataclass(frozen=True)
class Entry:
    """A captioned file; `name` is its path relative to the folder, with slashes, and `label` is as its listing has it.

    See `Example` for the other fields.
    """

    id: str
    name: str
    prompt: str
    time_lapse: bool = False
    by_number: bool = False
    label: object = None


class FolderSource(Source):
    """A data set of captioned files below one folder, images or clips."""

    def __init__(
        self, spec: str, folder: Path, entries: Sequence[Entry], problems: Sequence[Problem], clips: bool = False
    ) -> None:
        super().__init__(spec)
        self.clips = clips
        self.folder = folder
        self.problems = list(problems)
        self._entries = entries

    def __len__(self) -> int:
        return len(self._entries)

    def _example(self, index: int) -> Example:
        entry = self._entries[index]
        ref = file_ref(path_of(self.folder, entry.name))
        return Example(entry.id, entry.prompt, ref, time_lapse=entry.time_lapse, by_number=entry.by_number)

    def labels(self) -> list[tuple[str, object]]:
        """See `Source`."""
        return [(entry.id, entry.label) for entry in self._entries]

    def digest(self) -> str:
        """Digests ids, captions, problems and contents: every image is read in full, of a clip only its two ends."""
        sha = hashlib.sha256()
        with ThreadPoolExecutor() as pool:
            paths = (path_of(self.folder, entry.name) for entry in self._entries)
            contents = pool.map(clip_file_sha256 if self.clips else picture_file_sha256, paths)
            for entry, content in zip(self._entries, contents, strict=True):
                kind = [entry.time_lapse, "by number" if entry.by_number else "by time"] if self.clips else []
                sha.update(json.dumps([entry.id, entry.prompt, content, *kind]).encode())
        for problem in self.problems:
            sha.update(json.dumps([problem.id, problem.reason]).encode())
        return sha.hexdigest()
