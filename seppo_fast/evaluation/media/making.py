"""Generates the files of a model that are missing or damaged."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from seppo_fast.evaluation.generate import PromptBatches
from seppo_fast.evaluation.media.batch import SETTINGS, follow_batch
from seppo_fast.evaluation.media.files import encode_media, is_intact
from seppo_fast.evaluation.media.items import Item
from seppo_fast.evaluation.media.work import unfinished
from seppo_fast.utils.errors import CheckpointError
from seppo_fast.utils.fault_injection import fault
from seppo_fast.utils.files import read_json, remove_temporary, write_atomically
from seppo_fast.utils.logging import say
from seppo_fast.utils.progress import progress

_PNG_SHARE = 0.75  # of the raw pixels: a cautious estimate; photographs take 0.6


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
        SmallerBatch: another process has recorded another batch in `settings.json`.
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
            follow_batch(folder, made.batch)
            batch = batches[number]
            fault("generating")
            remove_temporary(place, {Path(item.files[name]).name for item in batch})
            pictures = made.generate([item.prompt_index for item in batch], batch[0].sample)
            for row in missing(number):
                fault("media-write")
                write_atomically(folder / batch[row].files[name], encode_media(pictures[row]), CheckpointError)
            counted.add(number)
            advance(len(batch))


def require_disk(folder: Path, items: int, updates: Mapping[str, int], frames: int, resolution: int) -> None:
    """Says how much space the media will take.

    Media that exist count as long as they may be this command's: a model's digest is not known before it is loaded, but
    `settings.json` lists the models of the last finished command.

    Args:
        folder: the folder with `media/`.
        items: the number of items.
        updates: the update that each model is taken from, by name; 0 for the base.
        frames: the number of frames of a clip; 1 for pictures.
        resolution: the side of a picture in pixels.

    Raises:
        CheckpointError: the disk has less space.
    """
    need = int(items * len(updates) * frames * resolution * resolution * 3 * _PNG_SHARE)
    others = _other_digests(folder, updates)
    have = sum(file.stat().st_size for file in folder.glob("media/*/[!.]*") if file.parent.name not in others)
    free = shutil.disk_usage(next(place for place in (folder, *folder.absolute().parents) if place.exists())).free
    say(f"{items} files for each of {len(updates)} models: about {need / 2**20:.0f} MiB, {have / 2**20:.0f} MiB exist")
    if need - have > free:
        raise CheckpointError(
            f"{folder}: the media need about {(need - have) / 2**20:.0f} MiB, but only {free / 2**20:.0f} MiB are "
            "free; make room, use fewer --samples or prompts, or choose another --output"
        )


def _other_digests(folder: Path, updates: Mapping[str, int]) -> set[str]:
    """Returns the digests of models that `settings.json` lists and that are not among these."""
    try:
        rows = dict(read_json(folder / SETTINGS)["models"])
        return {row["digest"] for name, row in rows.items() if updates.get(name) != row["update"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # no command has finished
        return set()
