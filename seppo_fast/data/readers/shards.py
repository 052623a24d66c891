"""Images in tar files as webdataset has them: `x.jpg` with `x.txt` or `x.json`, read where they lie.

Python's tarfile reads the headers; an image is then a place and a length in its file. So there is random access,
nothing is unpacked to disk, and what is neither image nor caption is never opened. The webdataset package streams
instead: no length, no random access, and it unpickles members whose suffix says so.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path, PurePosixPath

from seppo_fast.data.captions import (
    MAX_CAPTION_BYTES,
    TEXT_COLUMNS,
    CaptionError,
    caption_of,
    checked_caption,
    decoded_caption,
)
from seppo_fast.data.examples import Example, Problem, Source, printable
from seppo_fast.data.media.contents import picture_sha256
from seppo_fast.data.media.images import bytes_ref
from seppo_fast.data.media.parts import parts_of
from seppo_fast.data.names import Names, holds_no_data, relative_name
from seppo_fast.data.readers.tars import headers
from seppo_fast.utils.errors import DataError
from seppo_fast.utils.files import home_expanded

IMAGES = ("jpg", "jpeg", "png", "webp")
_READ = (*IMAGES, "txt", "json")
MAX_IMAGE_BYTES = 1 << 28
"""A member is read whole. 64 megapixels with nothing compressed are as much."""
_MAX_JSON_BYTES = 1 << 20
_MAX_SHARDS = 100_000
_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")


@dataclass(frozen=True)
class Member:
    """Where in a shard the bytes of a member lie; `name` has no leading `./`."""

    shard: Path
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        """Its bytes; raises OSError, and ValueError where the shard ends before they do."""
        with open(self.shard, "rb") as file:
            file.seek(self.offset)
            content = file.read(self.size)
        if len(content) < self.size:
            raise ValueError("truncated: the shard ends in the middle of it")
        return content


class ShardSource(Source):
    """The captioned images of tar files, shard by shard, in the order in which each has them."""

    def __init__(self, spec: str, shards: Sequence[Path], root: Path) -> None:
        super().__init__(spec)
        self._entries: list[tuple[str, str, Member]] = []
        others: Counter[str] = Counter()
        for path in shards:
            shard = _Shard(path, relative_name(path, root))
            self._entries += shard.entries
            self.problems += shard.problems
            others += shard.others
        if others:
            kinds = ", ".join(f".{printable(suffix)} ({count})" for suffix, count in others.most_common(5))
            self.notes.append(f"{others.total()} members that are neither image nor caption are not read: {kinds}")

    def __len__(self) -> int:
        return len(self._entries)

    def _example(self, index: int) -> Example:
        id, prompt, member = self._entries[index]
        return Example(id, prompt, bytes_ref(id, member.read))

    def digest(self) -> str:
        """Over ids, captions and every image's bytes, so every shard is read once, as a folder of images is."""
        sha = hashlib.sha256()
        with ThreadPoolExecutor() as pool:
            contents = pool.map(_sha256, (member for _, _, member in self._entries))
            for (id, prompt, _), content in zip(self._entries, contents, strict=True):
                sha.update(json.dumps([id, prompt, content]).encode())
        for problem in self.problems:
            sha.update(json.dumps([problem.id, problem.reason]).encode())
        return sha.hexdigest()


def open_shards(spec: str, shards: Sequence[Path]) -> Source:
    """Tar files as one data set; an image's id is the shard's path below the folder of all, and its name in it."""
    return ShardSource(spec, shards, Path(os.path.commonpath([path.parent for path in shards])))


def expand_braces(spec: str) -> list[Path]:
    """The tar files that a pattern such as `shards/{000..003}.tar` or `{a,b}.tar` names; none where it is no pattern.

    Raises:
        DataError: a range that runs backwards, far too many shards, or some that are not there.
    """
    if not _BRACES.search(spec) or not spec.endswith(".tar"):
        return []
    # A pattern's groups are split off with the text between: plain, low, high, words, plain, ...
    plain, *rest = _BRACES.split(spec)
    parts: list[Sequence[str]] = [[plain]]
    for low, high, words, after in zip(rest[::4], rest[1::4], rest[2::4], rest[3::4], strict=True):
        parts += [words.split(",") if words else _range(spec, low, high), [after]]
    if prod(map(len, parts)) > _MAX_SHARDS:
        raise DataError(f"{spec}: more than {_MAX_SHARDS} shards.")
    names = map("".join, product(*parts))
    paths = [home_expanded(name, DataError) for name in dict.fromkeys(names)]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise DataError(f"{spec}: {len(missing)} of {len(paths)} shards are not there, the first is {missing[0]}.")
    return paths


def _range(spec: str, low: str, high: str) -> list[str]:
    if not 0 <= int(high) - int(low) < _MAX_SHARDS:
        raise DataError(f"{spec}: the range {low}..{high} runs backwards, or is of more than {_MAX_SHARDS} shards.")
    padded = any(len(number) > 1 and number.startswith("0") for number in (low, high))
    width = max(len(low), len(high)) if padded else 0
    return [f"{number:0{width}d}" for number in range(int(low), int(high) + 1)]


class _Shard:
    """What one tar file holds.

    Attributes:
        entries: (id, caption, image).
        problems: what is wrong with the rest, or with the file.
        others: how many members of other kinds there are, by suffix.
    """

    def __init__(self, path: Path, label: str) -> None:
        self.entries: list[tuple[str, str, Member]] = []
        self.problems: list[Problem] = []
        self.others: Counter[str] = Counter()
        self._path, self._label = path, label
        self._groups: dict[str, dict[str, Member]] = {}
        self._spoiled: set[str] = set()
        self._dotted: dict[str, list[str]] = {}
        try:
            self._size = path.stat().st_size
            for member in headers(path):
                self._take(member)
        except OSError as error:
            self.problems.append(Problem(label, f"cannot be read ({error.strerror or error})"))
        except Exception as error:  # a damaged file raises whatever tarfile trips over
            self.problems.append(Problem(label, str(error) or type(error).__name__))
        self._join_spellings()
        for key, fields in self._groups.items():
            self._group(key, fields)
        # Beside an example they are other fields of it, by webdataset's rule; alone they were meant as one.
        for key, names in self._dotted.items():
            for name in () if key in self._groups else names:
                reason = "has a dot in its name, and in shards all behind the first one is the kind; rename it"
                self.problems.append(Problem(f"{self._label}/{name}", reason))

    def _take(self, header: tarfile.TarInfo) -> None:
        path = PurePosixPath(header.name)
        if header.isdir() or any(holds_no_data(part) for part in path.parts if part != ".."):
            return
        stem, dot, suffix = path.name.partition(".")
        key, suffix = (path.parent / stem).as_posix(), suffix.lower()
        member = Member(self._path, path.as_posix(), header.offset_data, header.size)
        reason = self._refused(header, path)
        if reason is None and suffix in self._groups.get(key, {}):
            reason = "the shard holds two members of this name"
        if reason is not None:
            self.problems.append(Problem(f"{self._label}/{member.name}", reason))
            self._spoiled.add(key)
        elif suffix in _READ:
            self._groups.setdefault(key, {})[suffix] = member
        else:
            self.others[suffix if dot else "(none)"] += 1
            if suffix.rpartition(".")[2] in IMAGES:
                self._dotted.setdefault(key, []).append(member.name)

    def _refused(self, header: tarfile.TarInfo, path: PurePosixPath) -> str | None:
        if path.is_absolute() or ".." in path.parts or "\0" in header.name:
            return "its name points outside the shard"
        if header.issym() or header.islnk():
            return "a link, not a file"
        if not header.isreg():
            return "a device or a pipe, not a file"
        if header.issparse():
            return "a sparse member; pack the shard again without --sparse"
        if header.size > MAX_IMAGE_BYTES:
            return f"says that it has {header.size} bytes: neither an image nor a caption"
        if header.offset_data + header.size > self._size:
            return "truncated: the shard ends in the middle of it"
        return None

    def _join_spellings(self) -> None:
        """Puts captions without an image to the image without a caption whose name has the same letters."""
        captions: Names[str] = Names()
        for key, fields in self._groups.items():
            if key not in self._spoiled and not set(IMAGES) & fields.keys():
                captions.add(key, key)
        for key, fields in list(self._groups.items()):
            if key not in self._spoiled and fields.keys() <= set(IMAGES):
                for other in captions.find(key)[:1]:
                    fields |= self._groups.pop(other, {})

    def _group(self, key: str, fields: dict[str, Member]) -> None:
        """Makes an example, or a problem, of the members of one key."""
        if key in self._spoiled:
            return
        images = [fields[suffix] for suffix in IMAGES if suffix in fields]
        id = f"{self._label}/{images[0].name if images else key}"
        try:
            if not images:
                raise ValueError("a caption without an image")
            if len(images) > 1:
                raise ValueError(f"several images: {', '.join(image.name for image in images)}")
            self.entries.append((id, _caption(key, fields), images[0]))
        except CaptionError as error:
            self.problems.append(Problem(id, str(error), error.hint))
        except (ValueError, OSError) as error:
            self.problems.append(Problem(id, str(error)))


def _caption(key: str, fields: dict[str, Member]) -> str:
    """Of `x.txt`, else of `x.json`; ValueError or OSError says what is wrong with it."""
    name = PurePosixPath(key).name
    if "txt" in fields:
        if fields["txt"].size > MAX_CAPTION_BYTES:
            raise ValueError(f"{name}.txt is longer than {MAX_CAPTION_BYTES} bytes: not a caption")
        return decoded_caption(f"{name}.txt", fields["txt"].read())
    if "json" not in fields:
        raise ValueError(f"no caption: the shard holds no {name}.txt and no {name}.json")
    if fields["json"].size > _MAX_JSON_BYTES:
        raise ValueError(f"{name}.json is longer than {_MAX_JSON_BYTES} bytes")
    try:
        record = json.loads(fields["json"].read())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}.json is not JSON ({error})") from None
    found = caption_of(record) if isinstance(record, dict) else None
    if not isinstance(found, str):
        raise ValueError(f"{name}.json holds no text under {', '.join(TEXT_COLUMNS)}")
    return checked_caption(f"{name}.json", found)


def _sha256(member: Member) -> str:
    """As `picture_sha256`, or what kept the member from being read."""
    try:
        with open(member.shard, "rb") as file:
            if file.seek(0, os.SEEK_END) < member.offset + member.size:
                return ValueError.__name__  # as `read` has it
            return picture_sha256(parts_of(file, [(member.offset, member.size)]))
    except OSError as error:
        return type(error).__name__
