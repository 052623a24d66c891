"""Scores generated media with several scorers, one at a time, into files.

FOLDER/scores/<scorer>-<version>-<dtype>.jsonl     a line per media file: {"file", "sha256", "score"}
FOLDER/scores/<scorer>-<dtype>.json                what the scorer was, and which of its files is the newest
FOLDER/scores/<scorer>.failed                      why a scorer gave no scores
FOLDER/scores/.parts/                              finished chunks, from which scoring resumes
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from seppo_fast.evaluation.media.files import decode_media
from seppo_fast.evaluation.media.items import BASE, READERS, Item, Media, media_digests
from seppo_fast.evaluation.media.work import alone, unfinished
from seppo_fast.evaluation.scoring.calling import Calls, ScorerError, reason
from seppo_fast.scorers import registry
from seppo_fast.utils.errors import CheckpointError, ConfigError, DataError
from seppo_fast.utils.fault_injection import fault
from seppo_fast.utils.files import read_json, remove_temporary, write_atomically
from seppo_fast.utils.logging import say, warn
from seppo_fast.utils.progress import progress

SCORES = "scores"
_FAILED = ".failed"
_CHUNK = 64  # frames that are scored at once; a picture is one frame


@dataclass(frozen=True)
class ScorerInfo:
    """What gave the scores of a file.

    Attributes:
        scorer: the name by which it was requested.
        key: its name, version and dtype, which name the file of scores and its column in tables.
        version: the version of what it computes.
        digest: the digest of its weights or rules.
        dtype: the dtype that it computes in.
        higher_is_better: whether a higher score is better.
        cut: the number of prompts of the list that it truncated.
    """

    scorer: str
    key: str
    version: str
    digest: str
    dtype: str
    higher_is_better: bool
    cut: int


@dataclass(frozen=True)
class _Chunk:
    """Files of one model that are scored at once; `name` is the name of the finished chunk's file."""

    name: str
    files: list[str]
    prompts: list[str]
    counted: bool  # whether its truncated prompts count: once for the list of prompts


def require_scorers(names: Sequence[str], weights: Path | None) -> None:
    """Checks that all scorers are known and their weights at hand; users' own functions are imported.

    Raises:
        ConfigError: no scorer or the same one twice, an unknown name, a function that cannot be imported, or missing
            weights; the message lists all of them.
    """
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"--scorers {','.join(names)}: name at least one scorer, and each only once")
    missing = [problem for name in names if (problem := registry.missing_weights(name, weights)) is not None]
    if missing:
        raise ConfigError("--scorers: files are missing\n" + "\n".join(f"  {problem}" for problem in missing))
    for name in names:
        if ":" in name:
            registry.load_scorer(name, torch.device("cpu"), torch.float32, weights)


def score_media(
    folder: Path,
    media: Media,
    names: Sequence[str],
    *,
    device: torch.device,
    dtype: torch.dtype,
    weights: Path | None,
    rank: int = 0,
    world: int = 1,
) -> list[str]:
    """Scores all media, scorer by scorer; scores that exist for the same files and the same scorer are kept.

    A scorer that fails gives no scores; the others are not affected.

    Args:
        folder: the folder with the media and their `items.json`.
        media: the items.
        names: the scorers' names.
        device: the scorers' device.
        dtype: the dtype that they compute in.
        weights: the folder with their weights.
        rank: this process's rank.
        world: the number of processes.

    Returns:
        A message for each scorer that failed.

    Raises:
        ConfigError: a media file is missing.
        DataError: a media file is damaged.
        CheckpointError: the results cannot be written.
    """
    hashes = media_digests(folder, media)
    say(f"{len(hashes)} files to score")
    problems, keys = [], set[str]()
    for name in names:
        failed = folder / SCORES / f"{_plain(name)}{_FAILED}"
        try:
            key = _score_with(name, folder, media, hashes, device, dtype, weights, rank, world, keys)
            keys.add(key)
            failed.unlink(missing_ok=True)
        except ScorerError as problem:
            warn(f"scorer {name}: {problem}; it is left out")
            problems.append(f"{name}: {problem}")
            row = {"scorer": name, "problem": str(problem)}
            write_atomically(failed, (json.dumps(row) + "\n").encode(), CheckpointError)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return problems


def _score_with(
    name: str,
    folder: Path,
    media: Media,
    hashes: Mapping[str, str],
    device: torch.device,
    dtype: torch.dtype,
    weights: Path | None,
    rank: int,
    world: int,
    taken: set[str],
) -> str:
    """Scores all media with one scorer and returns its key; raises ScorerError."""
    try:
        scorer = registry.load_scorer(name, device, dtype, weights)
        precision = str(dtype).removeprefix("torch.")
        key = f"{_plain(scorer.name)}-{_plain(scorer.version)}-{precision}"
        info = ScorerInfo(name, key, scorer.version, scorer.digest, precision, bool(scorer.higher_is_better), 0)
    except Exception as problem:
        raise ScorerError(f"cannot be loaded ({reason(problem)})") from problem
    if key in taken:
        raise ScorerError(f"has the same name and version as another scorer of this command, {key}")
    parts, called = folder / SCORES / ".parts" / key, Calls(name, scorer)
    chunks = list(_chunks(folder, media))

    def done(number: int) -> bool:
        return _part(parts, chunks[number], info.digest, hashes) is not None

    have = sum(len(chunk.files) for number, chunk in enumerate(chunks) if done(number))
    with (
        progress(len(hashes), "scored", f"files with {name}", initial=have) as advance,
        ThreadPoolExecutor(READERS) as readers,
    ):
        for number in unfinished(parts / ".lock", len(chunks), done, rank, world):
            chunk = chunks[number]
            remove_temporary(parts, {chunk.name})
            pictures = np.stack(list(readers.map(lambda file: _pixels(folder, file), chunk.files)))
            scores, cut = called(chunk.prompts, pictures)
            rows = [
                {"file": file, "sha256": hashes[file], "score": score if math.isfinite(score) else None}
                for file, score in zip(chunk.files, scores, strict=True)
            ]
            part = {"digest": info.digest, "cut": cut, "scores": rows}
            fault("score-write")
            write_atomically(parts / chunk.name, json.dumps(part).encode(), CheckpointError)
            advance(len(chunk.files))
    _assemble(folder, info, [(chunk, _part(parts, chunk, info.digest, hashes)) for chunk in chunks])
    return key


def _assemble(folder: Path, info: ScorerInfo, parts: Sequence[tuple[_Chunk, dict[str, Any] | None]]) -> None:
    """Writes a scorer's two files from its finished chunks."""
    rows, cut = [], 0
    for chunk, part in parts:
        assert part is not None, "unfinished() ends only when all chunks are done"
        rows += part["scores"]
        cut += part["cut"] if chunk.counted else 0
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    place = folder / SCORES
    about, name = asdict(info) | {"cut": cut}, f"{_plain(info.scorer)}-{info.dtype}.json"
    with alone(place, {f"{info.key}.jsonl", name}):
        write_atomically(place / f"{info.key}.jsonl", lines.encode(), CheckpointError)
        write_atomically(place / name, (json.dumps(about, indent=1) + "\n").encode(), CheckpointError)


def _chunks(folder: Path, media: Media) -> Iterator[_Chunk]:
    """Yields the chunks of all models, which depend only on the items: a scorer's rounding depends on its batch."""
    first = _pixels(folder, media.items[0].files[BASE])
    size = max(1, _CHUNK // (len(first) if first.ndim == 4 else 1))
    by_digest = {
        digest: name for name, digest in reversed(list(media.models.items()))
    }  # equal models share their files
    by_sample: dict[int, list[Item]] = {}
    for item in media.items:
        by_sample.setdefault(item.sample, []).append(item)
    for name, digest in media.models.items():
        if by_digest[digest] != name:
            continue
        for sample, rows in by_sample.items():
            for start in range(0, len(rows), size):
                some = rows[start : start + size]
                place = f"{digest}-{some[0].seed}-{sample}-{start}.json"
                files, prompts = [item.files[name] for item in some], [item.prompt for item in some]
                yield _Chunk(place, files, prompts, counted=name == BASE and sample == 0)


def _part(parts: Path, chunk: _Chunk, digest: str, hashes: Mapping[str, str]) -> dict[str, Any] | None:
    """Returns a finished chunk; None if it is missing, damaged, or of other files or another version of the scorer."""
    try:
        part = read_json(parts / chunk.name)
        found = {row["file"]: row["sha256"] for row in part["scores"]}
        same = part["digest"] == digest and found == {file: hashes[file] for file in chunk.files}
        return dict(part) if same else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_infos(folder: Path) -> list[ScorerInfo]:
    """Reads what each scorer was that has a file of scores in the output folder of `seppo-fast score`.

    Raises:
        DataError: a file is malformed.
    """
    found = []
    for file in sorted((folder / SCORES).glob("*.json")):
        try:
            info = ScorerInfo(**read_json(file))
            if not isinstance(info.key, str) or not isinstance(info.higher_is_better, bool):
                raise ValueError("key must be text, higher_is_better true or false")
        except (OSError, ValueError, TypeError) as problem:
            raise DataError(f"{file}: malformed scores ({problem}); remove it and score again") from problem
        found.append(info)
    return found


def read_scores_of(folder: Path, media: Media) -> tuple[dict[str, tuple[ScorerInfo, dict[str, float]]], dict[str, str]]:
    """Reads what `score_media` wrote.

    Returns:
        For each scorer with scores for all media, by key, what it was and the score of each file (NaN: none); and the
        reason why others have no scores, by name or key.

    Raises:
        DataError: a file of scores is malformed.
    """
    wanted = {file for item in media.items for file in item.files.values()}
    found: dict[str, tuple[ScorerInfo, dict[str, float]]] = {}
    without: dict[str, str] = {}
    for info in read_infos(folder):
        file = folder / SCORES / f"{_plain(info.key)}.jsonl"
        try:
            rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
            scores = {row["file"]: math.nan if row["score"] is None else float(row["score"]) for row in rows}
        except (OSError, ValueError, KeyError, TypeError) as problem:
            raise DataError(f"{file}: malformed scores ({problem}); remove it and score again") from problem
        if wanted <= scores.keys():
            found[info.key] = info, scores
        else:
            without[info.key] = "it has not scored all media; rerun the command without --only statistics"
    for file in sorted((folder / SCORES).glob(f"*{_FAILED}")):
        try:
            row = read_json(file)
            name, why = str(row["scorer"]), str(row["problem"])
        except (OSError, ValueError, KeyError, TypeError):
            name, why = file.stem, "it failed"
        if all(info.scorer != name for info, _ in found.values()):
            without[name] = why
    return found, without


def _pixels(folder: Path, file: str) -> np.ndarray:
    return decode_media((folder / file).read_bytes(), str(folder / file))


def _plain(name: str) -> str:
    """Returns a name with only characters that are valid in file names everywhere."""
    return re.sub(r"[^\w.-]+", "_", name)
