"""Detects the kind of a data set and opens it: a folder, tables, tar shards, a hub id, or an embedded world."""

from __future__ import annotations

import difflib
import hashlib
import re
import shlex
from functools import partial
from pathlib import Path

from seppo_fast.data.examples import Example, Problem, Source
from seppo_fast.data.media.images import ImageRef, load_image
from seppo_fast.data.names import walk_files
from seppo_fast.data.prompts import PromptSource
from seppo_fast.data.readers.folders import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from seppo_fast.data.readers.listings import find_listing, is_listing, open_listing
from seppo_fast.data.readers.rows import open_hub, open_parquet
from seppo_fast.data.readers.shards import expand_braces, open_shards
from seppo_fast.data.readers.sidecars import open_sidecars, other_kinds
from seppo_fast.data.readers.videos import open_clip_csv, open_clip_folder
from seppo_fast.utils.errors import DataError
from seppo_fast.utils.files import home_expanded

__all__ = ["Example", "Problem", "ShapesSource", "Source", "open_source"]

CHOICES = """A data set is one of:
  a folder of images x.png (jpg, jpeg, webp), each beside its caption x.txt
  a folder with metadata.jsonl, lines such as {"file_name": "x.png", "text": "a red fox"}, or with metadata.csv, whose
    columns are file_name and text; the caption's key or column may also be caption, prompt or txt
  a parquet file or a folder of them, with columns jpg_0, jpg_1, label_0, label_1, caption (Pick-a-Pic), or image, text
  webdataset shards: a tar file (not compressed), a folder of them, or a pattern such as shards/{000..003}.tar, with
    x.jpg (jpeg, png, webp) and x.txt, or x.json that has the caption under text, caption, prompt or txt
  a hub id such as yuvalkirstain/pickapic_v2
  shapes:N or shapes:N:SEED, the first N scenes of the embedded world
  shapes-made:N, N prompts of that world, each with the best of four pictures that the embedded pipeline made and a
    loser among them; or shapes-made:N:random, one of the four at random
For an objective that learns from a reward (ddpo, grpo, nft, d3po, spo), also:
  a text file x.txt with one prompt per line
For a model with a motion adapter, one of:
  a folder of clips x.mp4 (mov, m4v, webm, mkv, avi), each beside its caption x.txt, or with metadata.jsonl or .csv
  a csv with columns videoid and name (the caption), or its folder, with the clips beside the csv or below it; if it
    also has is_transmit, it is treated as one of MagicTime's: frames are chosen by number, not by time
  shapes-motion:N or shapes-motion:N:SEED, the first N clips of the embedded world in motion"""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_MADE = re.compile(r"shapes-made:(?P<count>\d+)(?P<random>:random)?")
_SHAPES = re.compile(r"(?P<world>shapes|shapes-motion):(?P<count>\d+)(?::(?P<seed>\d+))?")


def open_source(spec: str, split: str = "train") -> Source:
    """Opens a data set without decoding any image or clip.

    Args:
        spec: A path, a pattern of tar files, a hub id, `shapes:N[:SEED]`, `shapes-motion:N[:SEED]` or
            `shapes-made:N[:random]`. An existing path is never interpreted as a pattern or hub id.
        split: The split of a hub data set, or of parquet files named `<split>-00000-of-00007.parquet`.

    Returns:
        The examples in a fixed order: sorted by path, or in the order of the listing, csv, table or tar file.

    Raises:
        DataError: `spec` names no readable data; the message says what can be read.
    """
    if spec.startswith(("shapes:", "shapes-motion:")):
        return _open_shapes(spec)
    if spec.startswith("shapes-made:"):
        return _open_made(spec)
    if not spec:  # Path("") would mean the working folder
        raise DataError(f"{CHOICES}\nThe name of the data set is empty; name one of these.")
    path = home_expanded(spec, DataError)
    if path.is_dir():
        return _open_folder(spec, path, split)
    if path.is_file():
        if path.suffix.lower() == ".parquet":
            return open_parquet(spec, [path], path.parent)
        if path.suffix.lower() == ".tar":
            return open_shards(spec, [path])
        if path.suffix.lower() == ".txt":
            return PromptSource(spec, path)
        if is_listing(path):
            return open_listing(spec, path)
        if path.suffix.lower() == ".csv":
            return open_clip_csv(spec, path, walk_files(path.parent))
        raise DataError(f"{CHOICES}\n{spec}: this kind of file cannot be read as data; name one of the above.")
    if shards := expand_braces(spec):
        return open_shards(spec, shards)
    if _HUB_ID.fullmatch(spec):
        try:
            return open_hub(spec, split)
        except DataError as problem:
            raise DataError(f"{problem}{_similar(path)}") from problem
    raise DataError(
        f"{spec}: no such file or folder. A data set is a path, a hub id such as yuvalkirstain/pickapic_v2, or N "
        f"examples of an embedded world, such as shapes:2048.{_similar(path)}"
    )


def _open_folder(spec: str, folder: Path, split: str) -> Source:
    if listing := find_listing(folder):
        return open_listing(spec, listing)
    files = walk_files(folder)
    tables = [path for path in files if path.suffix.lower() == ".parquet"]
    images = any(path.suffix.lower() in IMAGE_SUFFIXES for path in files)
    clips = any(path.suffix.lower() in VIDEO_SUFFIXES for path in files)
    shards = [path for path in files if path.suffix.lower() == ".tar"]
    kinds = {"parquet files": bool(tables), "tar files": bool(shards), "images": images, "clips": clips}
    found = [kind for kind, there in kinds.items() if there]
    if len(found) > 1:
        raise DataError(f"{spec}: holds both {' and '.join(found)}; put each kind into a folder of its own.")
    if tables:
        return open_parquet(spec, _of_split(spec, tables, split), folder)
    if shards:
        return open_shards(spec, shards)
    if images:
        return open_sidecars(spec, folder, files)
    if clips:
        return open_clip_folder(spec, folder, files)
    if any(path.suffix == ".arrow" for path in files):
        raise DataError(f"{spec}: Arrow files, as the datasets library saves them, are not read. {_to_parquet(folder)}")
    left_out = next((f" {note}." for clips in (False, True) for note in other_kinds(folder, files, clips)), "")
    raise DataError(f"{CHOICES}\n{spec}: no images, clips, parquet or tar files in this folder.{left_out}")


def _similar(path: Path) -> str:
    """Returns a sentence that suggests the most similar name in a missing path's folder; empty if none is similar."""
    try:
        names = sorted(place.name for place in path.parent.iterdir())
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, names, n=1)
    return f" Did you mean {str(path.with_name(close[0]))!r}?" if close else ""


def _to_parquet(folder: Path) -> str:
    """Returns advice with a shell command that converts a folder written by `save_to_disk` to parquet."""
    split = '["train"]' if (folder / "dataset_dict.json").is_file() else ""
    target = f"{folder.absolute().name}.parquet"
    code = f"import datasets; datasets.load_from_disk({str(folder)!r}){split}.to_parquet({target!r})"
    return f"Convert them, and set data.source to the parquet file: python -c {shlex.quote(code)}"


def _of_split(spec: str, tables: list[Path], split: str) -> list[Path]:
    """Returns the files of one split if names such as train-00000-of-00007.parquet contain splits, else all files."""
    found = [re.fullmatch(r"(.+)-\d+-of-\d+", path.stem) for path in tables]
    splits = sorted({match[1] for match in found if match})
    if not splits:
        return tables
    chosen = [path for path, match in zip(tables, found, strict=True) if match and match[1] == split]
    if not chosen:
        raise DataError(f"{spec}: no parquet files of split {split!r}; set data.split to one of {', '.join(splits)}.")
    return chosen


def _open_shapes(spec: str) -> Source:
    match = _SHAPES.fullmatch(spec)
    if match is None:
        world = spec.partition(":")[0]
        raise DataError(f"{spec}: expected {world}:N or {world}:N:SEED with whole numbers, such as {world}:2048:1.")
    count, seed = int(match["count"]), int(match["seed"] or 0)
    if count == 0:
        raise DataError(f"{spec}: N must be at least 1, as in {match['world']}:2048.")
    if match["world"] == "shapes":
        return ShapesSource(spec, count, seed)
    from seppo_fast.data.readers.moving import MovingShapesSource

    return MovingShapesSource(spec, count, seed)


def _open_made(spec: str) -> Source:
    from seppo_fast.data.readers.made import MadeShapesSource
    from seppo_fast.shapes.made import COUNT

    match = _MADE.fullmatch(spec)
    if match is None:
        raise DataError(
            f"{spec}: expected shapes-made:N or shapes-made:N:random with a whole number, such as shapes-made:{COUNT}."
        )
    count = int(match["count"])
    if not 1 <= count <= COUNT:
        raise DataError(f"{spec}: N must be from 1 to {COUNT}, the number of prompts that ship with the package.")
    return MadeShapesSource(spec, count, at_random=match["random"] is not None)


class ShapesSource(Source):
    """The first `count` scenes of the embedded world for `seed`, rendered on demand."""

    def __init__(self, spec: str, count: int, seed: int) -> None:
        super().__init__(spec)
        self.count = count
        self.seed = seed

    def __len__(self) -> int:
        return self.count

    def _example(self, index: int) -> Example:
        from seppo_fast.shapes.world import caption, render, scene

        drawn = scene(self.seed, index)
        name = f"shapes-{self.seed}-{index}"
        return Example(name, caption(drawn), ImageRef(name, partial(render, drawn)))

    def digest(self) -> str:
        """Digests seed, count, and captions and pixels of the first 64 scenes, so that it changes if the world does."""
        sha = hashlib.sha256(f"shapes {self.seed} {self.count}".encode())
        for index in range(min(self.count, 64)):
            example = self._example(index)
            sha.update(example.prompt.encode())
            sha.update(load_image(example.image, 32).tobytes())
        return sha.hexdigest()
