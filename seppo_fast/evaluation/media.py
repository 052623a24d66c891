"""Generated pictures and clips as files: their names, their formats, and how processes share the work of making them.

    FOLDER/items.json                                    which file of which model belongs to which prompt
    FOLDER/media/<model digest>/<prompt digest>-<prompt index>-<seed>-<sample>.png      or .webp for clips

The digest covers everything that determines a model's pictures, so a file whose name exists never has to be remade
unless it is damaged. Processes exchange nothing but these files.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import itertools
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, ImageSequence

from seppo_fast.evaluation.generate import PromptBatches
from seppo_fast.evaluation.prompts import PromptList
from seppo_fast.utils.errors import CheckpointError, ConfigError, DataError
from seppo_fast.utils.fault_injection import fault
from seppo_fast.utils.files import NO_LOCKS, disk_message, read_json, remove_temporary, write_atomically
from seppo_fast.utils.progress import progress

BASE = "base"
ITEMS = "items.json"
SCHEMA = 1
_FRAME_MILLISECONDS = 125
_FRAMES = b"seppo_fast frames="  # before the number of frames, in a clip's metadata
_PNG_SHARE = 0.75  # of the raw pixels: a cautious estimate; photographs take 0.6


@dataclass(frozen=True)
class Item:
    """One sample of one prompt, with the file of each model.

    Attributes:
        id: the prompt's id in its file, which is made unique by appending numbers.
        prompt: the prompt.
        prompt_index: the prompt's place in its file, from 0.
        sample: the sample's number, from 0.
        seed: the seed of the starting noise.
        files: the paths of the media relative to the folder, by the model's name; "base" is first.
    """

    id: str
    prompt: str
    prompt_index: int
    sample: int
    seed: int
    files: Mapping[str, str]


@dataclass(frozen=True)
class Media:
    """What `items.json` lists.

    Attributes:
        models: the digest of each model, by name; "base" is first.
        items: all samples of all prompts, sample by sample.
    """

    models: Mapping[str, str]
    items: Sequence[Item]

    def write(self, folder: Path) -> None:
        """Writes `items.json`."""
        rows = [vars(item) | {"files": dict(item.files)} for item in self.items]
        tree = {"schema": SCHEMA, "models": dict(self.models), "items": rows}
        content = json.dumps(tree, indent=1, ensure_ascii=False) + "\n"
        write_atomically(folder / ITEMS, content.encode(), CheckpointError)


def media_of(prompts: PromptList, models: Mapping[str, str], samples: int, seed: int, *, clips: bool) -> Media:
    """Returns all items of a prompt list for models given by digest, whether or not their files exist."""
    items, taken = [], set[str]()
    for sample in range(samples):
        for place, prompt in enumerate(prompts.prompts):
            own = prompt.id if sample == 0 else f"{prompt.id}-{sample}"
            unique = next(one for one in itertools.chain([own], _numbered(own)) if one not in taken)
            taken.add(unique)
            name = file_name(prompt.text, place, seed, sample, clips=clips)
            files = {model: f"media/{digest}/{name}" for model, digest in models.items()}
            items.append(Item(unique, prompt.text, place, sample, seed, files))
    return Media(dict(models), items)


def _numbered(name: str) -> Iterator[str]:
    return (f"{name}.{number}" for number in itertools.count(2))


def read_media(folder: Path) -> Media:
    """Reads `items.json`.

    Raises:
        ConfigError: it does not exist, is malformed, or has a newer schema.
    """
    file = folder / ITEMS
    try:
        tree = read_json(file, most=1 << 30)
        if tree["schema"] != SCHEMA:
            raise ConfigError(f"{file}: has schema {tree['schema']!r}; this version reads {SCHEMA}")
        media = Media(dict(tree["models"]), [Item(**row) for row in tree["items"]])
        if not media.items or any(set(item.files) != set(media.models) for item in media.items):
            raise ValueError("an item lacks the file of a model, or there is no item")
        if any(not _is_inside(path) for item in media.items for path in item.files.values()):
            raise ValueError("a file is outside the folder")
    except FileNotFoundError:
        raise ConfigError(f"{file}: does not exist; generate first: run the command without --only") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise ConfigError(f"{file}: malformed ({problem}); remove it and generate again") from problem
    return media


def _is_inside(path: str) -> bool:
    return not os.path.isabs(path) and ".." not in Path(path).parts


def file_name(prompt: str, place: int, seed: int, sample: int, *, clips: bool) -> str:
    """Returns the name of a picture's or a clip's file."""
    digest = hashlib.sha256(prompt.encode()).hexdigest()[:12]
    return f"{digest}-{place}-{seed}-{sample}.{'webp' if clips else 'png'}"


def model_digest(settings: Mapping[str, Any]) -> str:
    """Returns the name of a model's media folder.

    Args:
        settings: everything that determines a model's pictures for given prompts and seeds, serializable as JSON.
    """
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def encode_media(picture: np.ndarray) -> bytes:
    """Returns a picture `(H, W, 3)` uint8 as PNG, or a clip `(F, H, W, 3)` as lossless animated WebP."""
    content = io.BytesIO()
    if picture.ndim == 3:
        Image.fromarray(picture).save(content, "PNG")
        return content.getvalue()
    first, *others = (Image.fromarray(frame) for frame in picture)
    # The encoder merges equal frames into one that is shown for longer; if all are equal, it writes a still picture.
    first.save(
        content,
        "WEBP",
        save_all=True,
        append_images=others,
        duration=_FRAME_MILLISECONDS,
        loop=0,
        lossless=True,
        xmp=b"%s%d" % (_FRAMES, len(picture)),
    )
    return content.getvalue()


def decode_media(content: bytes, name: str) -> np.ndarray:
    """Returns the pixels that `encode_media` was given.

    Args:
        content: the file's content.
        name: its name in error messages.

    Raises:
        DataError: it is truncated, damaged, or another kind of file.
    """
    try:
        with Image.open(io.BytesIO(content), formats=("PNG", "WEBP")) as opened:
            if opened.format == "PNG":
                _check_png(content)
                return np.array(opened.convert("RGB"))
            total = int(opened.info["xmp"].removeprefix(_FRAMES))
            frames: list[np.ndarray] = []
            for frame in ImageSequence.Iterator(opened):
                pixels = np.array(frame.convert("RGB"))
                ends = (opened.info["timestamp"] + opened.info["duration"]) / _FRAME_MILLISECONDS
                frames += [pixels] * ((total if getattr(opened, "n_frames", 1) == 1 else round(ends)) - len(frames))
            if len(frames) != total:
                raise ValueError(f"it has {len(frames)} frames instead of {total}")
            return np.stack(frames)
    except (OSError, ValueError, KeyError, SyntaxError, EOFError) as problem:
        raise DataError(f"{name}: not an intact picture or clip ({problem}); remove it and generate again") from problem


def is_intact(file: Path) -> bool:
    """Returns whether a file exists and is undamaged: a PNG by its checksums, a clip by decoding it."""
    try:
        content = file.read_bytes()
        if file.suffix == ".png":
            _check_png(content)
        else:
            decode_media(content, file.name)
    except (OSError, SyntaxError, ValueError, DataError):
        return False
    return True


def _check_png(content: bytes) -> None:
    """Raises OSError or SyntaxError unless the checksums of a PNG are right; cheaper than decoding it."""
    with Image.open(io.BytesIO(content), formats=("PNG",)) as opened:
        opened.verify()


def unfinished(lock: Path, pieces: int, done: Callable[[int], bool], rank: int = 0, world: int = 1) -> Iterator[int]:
    """Yields the numbers of the pieces of work that this process has to do; at the end all pieces are done.

    Each piece is locked while its number is yielded. A piece that another process is working on is waited for, and is
    yielded after all if that process ends without finishing it. Locks end with the process that holds them.

    Args:
        lock: the lock file; piece number n locks its byte n.
        pieces: the number of pieces.
        done: returns whether a piece is done, judging by files.
        rank: this process's rank: the first pieces that it takes are those of its share.
        world: the number of processes.

    Raises:
        CheckpointError: the lock file cannot be written.
    """
    with _opened(lock) as opened:
        order = sorted(range(pieces), key=lambda number: ((number - rank) % world, number))
        left, waits = [number for number in order if not done(number)], False
        while left:
            later = []
            for number in left:
                if not _lock(opened, number, waits):
                    later.append(number)
                    continue
                waits = False
                try:
                    if not done(number):  # another process may have done it meanwhile
                        yield number
                finally:
                    fcntl.lockf(opened, fcntl.LOCK_UN, 1, number)
            left, waits = later, True


@contextmanager
def alone(folder: Path, names: Collection[str] = ()) -> Iterator[None]:
    """Lets one process at a time run the block for a folder, and removes what killed ones left of files named `names`.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    with _opened(folder / ".lock") as opened:
        _lock(opened, 0, waits=True)
        remove_temporary(folder, names)
        yield


def _opened(lock: Path) -> IO[bytes]:
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        return lock.open("ab")
    except OSError as problem:
        raise CheckpointError(disk_message(lock, problem)) from problem


def _lock(opened: IO[bytes], number: int, waits: bool) -> bool:
    """Locks a byte of a file; returns whether it is locked now, which it always is if `waits`."""
    try:
        fcntl.lockf(opened, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB), 1, number)
    except OSError as problem:
        if problem.errno in (errno.EAGAIN, errno.EACCES):
            return False
        if problem.errno not in NO_LOCKS:
            raise
        # Without locks two processes may do the same work, and write the same bytes.
    return True


def make_media(folder: Path, name: str, items: Sequence[Item], made: PromptBatches, rank: int, world: int) -> None:
    """Generates the files of one model that are missing or damaged.

    A batch with one such file is generated as a whole, since rounding depends on the batch.

    Args:
        folder: the folder with `media/`.
        name: the model's name in the items.
        items: all items of `media_of`.
        made: generates the model's pictures or clips.
        rank: this process's rank.
        world: the number of processes.

    Raises:
        CheckpointError: a file cannot be written.
    """
    by_sample: dict[int, list[Item]] = {}
    for item in items:
        by_sample.setdefault(item.sample, []).append(item)
    batches = [[rows[place] for place in places] for rows in by_sample.values() for places in made.batches()]

    def missing(number: int) -> list[int]:
        files = [folder / item.files[name] for item in batches[number]]
        return [row for row, file in enumerate(files) if not is_intact(file)]

    place = (folder / items[0].files[name]).parent
    with progress(len(items), "generated", f"files of {name}") as advance:
        counted: set[int] = set()

        def done(number: int) -> bool:
            finished = not missing(number)
            if finished and number not in counted:
                counted.add(number)
                advance(len(batches[number]))
            return finished

        for number in unfinished(place / ".lock", len(batches), done, rank, world):
            batch = batches[number]
            remove_temporary(place, {Path(item.files[name]).name for item in batch})
            pictures = made.generate([item.prompt_index for item in batch], batch[0].sample)
            for row in missing(number):
                fault("media-write")
                write_atomically(folder / batch[row].files[name], encode_media(pictures[row]), CheckpointError)
            counted.add(number)
            advance(len(batch))


def disk_need(items: int, models: int, frames: int, resolution: int) -> int:
    """Returns an estimate of the bytes that media take."""
    return int(items * models * frames * resolution * resolution * 3 * _PNG_SHARE)
