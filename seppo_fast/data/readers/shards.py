"""Reads images in tar files laid out as webdataset does, `x.jpg` with `x.txt` or `x.json`, without unpacking them.

Python's tarfile reads the headers; an image is then an offset and a length in its file. This gives random access,
unpacks nothing to disk, and never opens members that are neither image nor caption. The webdataset package streams
instead: it has no length and no random access, and unpickles members with certain suffixes.

Reasons of problems, those of `tars` included, are part of cache keys (see `Problem`): do not reword them.
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
from seppo_fast.data.examples import Example, Problem, Source, counted, printable
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
"""Members are read whole, hence this limit. An uncompressed image of 64 megapixels has about this size."""
_MAX_JSON_BYTES = 1 << 20
_MAX_SHARDS = 100_000
_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")


@dataclass(frozen=True)
class Member:
    """The location of a member's bytes in a shard; `name` has no leading `./`."""

    shard: Path
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        """Returns the member's bytes; raises OSError, or ValueError if the shard ends within them."""
        with open(self.shard, "rb") as file:
            file.seek(self.offset)
            content = file.read(self.size)
        if len(content) < self.size:
            raise ValueError("truncated: the shard ends in the middle of it")
        return content


class ShardSource(Source):
    """The captioned images of tar files, shard by shard, in each shard's order."""

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
            members = counted(others.total(), "member is", "members are")
            self.notes.append(f"{members} neither image nor caption and not read: {kinds}")

    def __len__(self) -> int:
        return len(self._entries)

    def _example(self, index: int) -> Example:
        id, prompt, member = self._entries[index]
        return Example(id, prompt, bytes_ref(id, member.read))

    def digest(self) -> str:
        """Digests ids, captions, problems and all images' bytes; as in a folder's digest, images are read in full."""
        sha = hashlib.sha256()
        with ThreadPoolExecutor() as pool:
            contents = pool.map(_sha256, (member for _, _, member in self._entries))
            for (id, prompt, _), content in zip(self._entries, contents, strict=True):
                sha.update(json.dumps([id, prompt, content]).encode())
        for problem in self.problems:
            sha.update(json.dumps([problem.id, problem.reason]).encode())
        return sha.hexdigest()


def open_shards(spec: str, shards: Sequence[Path]) -> Source:
    """Opens tar files as one data set; an id is the shard's path below their common folder, then the member's name."""
    return ShardSource(spec, shards, Path(os.path.commonpath([path.parent for path in shards])))


def expand_braces(spec: str) -> list[Path]:
    """Expands a pattern such as `shards/{000..003}.tar` or `{a,b}.tar`; returns [] if `spec` is not a pattern.

    Raises:
        DataError: a range runs backwards, the pattern names far too many shards, or some do not exist.
    """
    if not _BRACES.search(spec) or not spec.endswith(".tar"):
        return []
    # `re.split` also returns the three groups of each match: plain, low, high, words, plain, low, high, words, plain.
    plain, *rest = _BRACES.split(spec)
    parts: list[Sequence[str]] = [[plain]]
    for low, high, words, after in zip(rest[::4], rest[1::4], rest[2::4], rest[3::4], strict=True):
        parts += [words.split(",") if words else _range(spec, low, high), [after]]
    if prod(map(len, parts)) > _MAX_SHARDS:
        raise DataError(f"{spec}: the pattern names more than {_MAX_SHARDS} shards.")
    names = map("".join, product(*parts))
    paths = [home_expanded(name, DataError) for name in dict.fromkeys(names)]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        shards, do = counted(len(paths), "shard", "shards"), "does" if len(missing) == 1 else "do"
        raise DataError(f"{spec}: {len(missing)} of {shards} {do} not exist; the first is {missing[0]}.")
    return paths


def _range(spec: str, low: str, high: str) -> list[str]:
    if not 0 <= int(high) - int(low) < _MAX_SHARDS:
        raise DataError(f"{spec}: the range {low}..{high} runs backwards or has more than {_MAX_SHARDS} shards.")
    padded = any(len(number) > 1 and number.startswith("0") for number in (low, high))
    width = max(len(low), len(high)) if padded else 0
    return [f"{number:0{width}d}" for number in range(int(low), int(high) + 1)]


class _Shard:
    """The contents of one tar file.

    Attributes:
        entries: (id, caption, image) of each usable example.
        problems: the unusable examples and members, and damage to the file.
        others: the number of members of other kinds, by suffix.
    """

    def __init__(self, path: Path, label: str) -> None:
        self.entries: list[tuple[str, str, Member]] = []
        self.problems: list[Problem] = []
        self.others: Counter[str] = Counter()
        self._path, self._label = path, label
        self._groups: dict[str, dict[str, Member]] = {}
        self._spoiled: set[str] = set()  # keys with a refused member (a problem); their other members are not used
        self._dotted: dict[str, list[str]] = {}  # by key, images with a second dot, such as cat.v2.jpg with key `cat`
        try:
            self._size = path.stat().st_size
            for member in headers(path):
                self._take(member)
        except OSError as error:
            self.problems.append(Problem(label, f"cannot be read ({error.strerror or error})"))
        except Exception as error:  # damaged files raise arbitrary exceptions in tarfile
            self.problems.append(Problem(label, str(error) or type(error).__name__))
        self._join_spellings()
        for key, fields in self._groups.items():
            self._group(key, fields)
        # For webdataset, cat.v2.jpg is the field `v2.jpg` of the example `cat`. Beside cat.jpg it is unused, like any
        # other field. Without an image or caption of `cat` it was probably meant as an example, so it is a problem.
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
        """Matches captions without an image to images without a caption whose names differ only in Unicode spelling."""
        captions: Names[str] = Names()
        for key, fields in self._groups.items():
            if key not in self._spoiled and not set(IMAGES) & fields.keys():
                captions.add(key, key)
        for key, fields in list(self._groups.items()):
            if key not in self._spoiled and fields.keys() <= set(IMAGES):
                for other in captions.find(key)[:1]:
                    fields |= self._groups.pop(other, {})

    def _group(self, key: str, fields: dict[str, Member]) -> None:
        """Turns the members of one key into an example or a problem."""
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
    """Returns the caption in `x.txt`, else in `x.json`; raises ValueError or OSError if it is unusable."""
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
    """Returns `picture_sha256` of a member, or the exception's name if it cannot be read."""
    try:
        with open(member.shard, "rb") as file:
            if file.seek(0, os.SEEK_END) < member.offset + member.size:
                return ValueError.__name__  # what `read` raises
            return picture_sha256(parts_of(file, [(member.offset, member.size)]))
    except OSError as error:
        return type(error).__name__
