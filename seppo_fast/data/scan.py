"""Decodes every image or clip of a source, in order with threads that work ahead, and lists those that fail."""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import numpy as np

from seppo_fast.data.examples import Example, Problem, Source, require_kind
from seppo_fast.data.media.clips import load_clip
from seppo_fast.data.media.images import ImageError, ImageRef, Opened, decode_image, open_image
from seppo_fast.data.remarks import Remarks

_MOST_BYTES = 1 << 29
"""Limit on opened images that wait in memory; a single image of a shard may have 256 MiB."""

T = TypeVar("T")
Decode = Callable[[Example, str, Opened], T]
"""Maps (example, name of the image or clip, its opened stream or pixels) to a result; raises ImageError."""


def scan(
    source: Source, losers: bool = True, frames: int | None = None, remarks: Remarks | None = None
) -> list[Problem]:
    """Returns every example of `source` that cannot be used, with the reason; each image is decoded once.

    Args:
        source: The data set.
        losers: Whether the losers of labelled pairs are checked too.
        frames: The number of frames that a cache would take from each clip; those are checked. None for images.
        remarks: Collects remarks on the images and clips that can be used.

    Returns:
        The problems already found in names, captions and labels (`source.problems`), then the bad images in order. Ties
        are not problems.

    Raises:
        DataError: the source holds images but `frames` is given, or clips but it is not; or PyAV is not installed.
    """
    require_kind(source, frames)
    remarks = remarks or Remarks(resolution=1)
    decode = partial(_try_image, remarks) if frames is None else partial(_try_clip, frames, remarks)
    bad = (outcome for _, outcome in decode_all(source, decode, losers) if isinstance(outcome, Problem))
    return [*source.problems, *bad]


def _try_image(remarks: Remarks, example: Example, name: str, opened: Opened) -> None:
    remarks.see(example, name, decode_image(name, opened).size)


def _try_clip(frames: int, remarks: Remarks, example: Example, name: str, opened: Opened) -> None:
    remarks.see_clip(example, name, load_clip(example, name, opened, resolution=1, frames=frames))


def decode_all(source: Source, decode: Decode[T], losers: bool = True) -> Iterator[tuple[Example, list[T] | Problem]]:
    """Yields each example with the decoded winner (and loser, if it has one and `losers` is set), or with a problem.

    Files are opened in order in the calling thread, because tables are fast to read only in order. Decoding, which
    releases the GIL, runs in threads. The number and the bytes of images opened ahead are bounded.
    """
    workers = min(8, os.cpu_count() or 1)
    waiting: deque[tuple[Example, list[tuple[Future[T], int]]]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for example in source:
            refs = [example.image]
            if losers and example.loser is not None:
                refs.append(example.loser)
            waiting.append((example, [_submit(pool, example, ref, decode) for ref in refs]))
            while len(waiting) > 2 * workers or (len(waiting) > 1 and _held(waiting) > _MOST_BYTES):
                yield _collect(*waiting.popleft())
        while waiting:
            yield _collect(*waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _held(waiting: Iterable[tuple[Example, list[tuple[Future[T], int]]]]) -> int:
    return sum(size for _, images in waiting for _, size in images)


def _submit(pool: ThreadPoolExecutor, example: Example, ref: ImageRef, decode: Decode[T]) -> tuple[Future[T], int]:
    """Returns the future of the decoded image, and the bytes of memory that its input occupies."""
    try:
        opened = open_image(ref)
    except ImageError as error:
        failed: Future[T] = Future()
        failed.set_exception(error)
        return failed, 0
    if isinstance(opened, np.ndarray):
        return pool.submit(decode, example, ref.name, opened), opened.nbytes
    stream, size = opened, opened.getbuffer().nbytes if isinstance(opened, io.BytesIO) else 0
    future = pool.submit(decode, example, ref.name, stream)
    future.add_done_callback(lambda _: stream.close())  # also if it is cancelled before it starts
    return future, size


def _collect(example: Example, images: list[tuple[Future[T], int]]) -> tuple[Example, list[T] | Problem]:
    results: list[T] = []
    for (image, _), role in zip(images, ("winner", "loser"), strict=False):
        try:
            results.append(image.result())
        except ImageError as error:
            prefix = f"{role}: " if len(images) > 1 else ""
            return example, Problem(example.id, prefix + error.reason)
    return example, results
