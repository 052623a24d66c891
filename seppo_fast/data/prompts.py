"""Reads a file with one prompt per line, for objectives that learn from samples alone."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from seppo_fast.data.captions import CaptionError, checked_caption, encoding_hint
from seppo_fast.data.examples import Example, Problem, Source
from seppo_fast.data.media.images import ImageRef, Opened
from seppo_fast.utils.errors import DataError

_SIZE = 1024  # pixels: large enough for no remark on enlarged pictures


class PromptSource(Source):
    """The non-blank lines of a text file, in order, each with a grey picture in place of a winner.

    The cache encodes that picture for every prompt, which is wasted, but keeps all data sets alike. A line that is no
    caption is a problem; a prompt that stands on several lines is an example on each.

    Args:
        spec: `data.source` as the user wrote it.
        file: the file, in UTF-8.

    Raises:
        DataError: the file cannot be read, or is not UTF-8.
    """

    prompts_only = True

    def __init__(self, spec: str, file: Path) -> None:
        super().__init__(spec)
        try:
            content = file.read_bytes()
            lines = content.decode("utf-8-sig").split("\n")
        except UnicodeDecodeError:
            raise DataError(f"{spec}: not UTF-8 text; {encoding_hint(content, file)}") from None
        except OSError as problem:
            raise DataError(f"{spec}: cannot be read: {problem.strerror}") from problem
        self._prompts: list[tuple[str, str]] = []
        for number, line in enumerate(lines, 1):
            place = f"{file.name}:{number}"
            try:
                if line.strip():
                    self._prompts.append((place, checked_caption("the line", line)))
            except CaptionError as error:
                self.problems.append(Problem(place, str(error), error.hint))

    def __len__(self) -> int:
        return len(self._prompts)

    def _example(self, index: int) -> Example:
        place, prompt = self._prompts[index]
        return Example(place, prompt, ImageRef(place, _grey))

    def digest(self) -> str:
        """Digests the prompts, whatever the file's name."""
        prompts = [prompt for _, prompt in self._prompts]
        return hashlib.sha256(json.dumps(["prompts", prompts]).encode()).hexdigest()


def _grey() -> Opened:
    return np.full((_SIZE, _SIZE, 3), 127, np.uint8)
