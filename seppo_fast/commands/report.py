"""`seppo-fast report RUN`: one HTML page about a run, finished or not: summary, curves, pictures, settings.

The page is self-contained: no scripts, no other files, no network. Text from users is escaped.
"""

from __future__ import annotations

import base64
import io
import itertools
import os
import secrets
import stat
import statistics
from collections.abc import Callable, Sequence
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from seppo_fast import __version__
from seppo_fast.commands import curves
from seppo_fast.commands.panels import numbers, panels, skipped
from seppo_fast.commands.remarks import notes, warnings
from seppo_fast.config.plain_yaml import MOST_BYTES, parse_yaml
from seppo_fast.data.media.images import ImageError, decode_image, file_ref, open_file, open_image
from seppo_fast.evaluation.grids import CAPTION_WIDTH
from seppo_fast.evaluation.scores import read_scores
from seppo_fast.runs.folder import lacking
from seppo_fast.runs.journal import LOG, SKIPPED, read_journal
from seppo_fast.runs.watch import intervals
from seppo_fast.utils.errors import ConfigError

NAME = "report.html"
_NOT_YET = "the run has not finished its first update; rerun this later, or add --watch, which waits for it"
_BEGINS = b"<!doctype html>"
_LAST = {"loss": "loss", "reject rate": "aaf_rate", "reward": "reward_mean", "peak memory, GiB": "memory_gib"}
_PICTURES = 6  # at most so many sample pictures are shown, beside the base's
_WIDEST = 1600  # a picture's largest width in the page, in pixels
_MOST_LOG_BYTES = 1 << 27  # some hundred thousand updates
_MOST_UPDATES = 10**9

_STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1c1e21; --dim: #5b626b; --line: #d9dde2; --first: #1565c0;
  --second: #c2570c; --third: #00796b; --fourth: #8e24aa; --warn: #b3261e; --warn-back: #fdecea; }
@media (prefers-color-scheme: dark) { :root { --back: #15181c; --text: #e6e8ea; --dim: #9aa3ad; --line: #343a41;
  --first: #6cb1ff; --second: #ffb074; --third: #4fd1c0; --fourth: #dfa0f0; --warn: #ff8a80; --warn-back: #3a1d1b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 1400px; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; margin: 0.2rem 0; } h2 { font-size: 1.1rem; margin: 1.6rem 0 0.6rem; }
.dim { color: var(--dim); }
.warning { border-left: 4px solid var(--warn); background: var(--warn-back); padding: 0.6rem 0.9rem; margin: 0.8rem 0; }
.note { border-left: 4px solid var(--line); padding: 0.6rem 0.9rem; margin: 0.8rem 0; }
.curves { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); }
figure { margin: 0; }
.curve { border: 1px solid var(--line); border-radius: 6px; padding: 0.6rem; }
.pictures { display: flex; flex-wrap: wrap; gap: 0.4rem; align-items: flex-start; }
.pictures img { display: block; max-width: 100%; height: auto; }
table { border-collapse: collapse; } td { padding: 0.15rem 1rem 0.15rem 0; vertical-align: top; }
td:first-child { color: var(--dim); }
pre { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; padding: 0.8rem; font-size: 13px; }
"""


def report(run: Path, output: Path | None = None, say: Callable[[str], object] = print) -> Path:
    """Writes the page; an older report is replaced.

    Args:
        run: the run's folder.
        output: the file; None: `report.html` in the run's folder.
        say: receives a line for the user.

    Returns:
        The file.

    Raises:
        ConfigError: the folder holds no run's log, a file cannot be read or written, or `output` is another file.
    """
    log = _log(run)
    file = output or run / NAME
    if not file.name:
        raise ConfigError(f"{file}: is a folder; name the file to write, such as {file / NAME}")
    if file.is_file() and not _is_page(file):
        raise ConfigError(f"{file}: exists and is not a seppo_fast report; choose another --output")
    # Paths may contain bytes that are not UTF-8.
    content = page(run, log).encode("utf-8", errors="replace")
    # A unique name, because two commands may write the same page. Not .tmp-*: a starting run removes those.
    staging = file.with_name(f".{file.name}-{secrets.token_hex(4)}")
    try:
        staging.write_bytes(content)
        os.replace(staging, file)
    except OSError as problem:
        raise ConfigError(f"{file}: cannot be written: {problem.strerror}") from problem
    finally:
        with suppress(OSError):  # it exists only if this failed or was interrupted
            staging.unlink()
    say(f"report: {file}")
    return file


def _is_page(file: Path) -> bool:
    """Returns whether a file begins like a report, or is empty; if it cannot be read, True: writing then reports it."""
    try:
        with file.open("rb") as opened:
            return opened.read(len(_BEGINS)).lower() in (_BEGINS, b"")
    except OSError:
        return True


def page(run: Path, log: Sequence[dict[str, Any]]) -> str:
    """Returns the HTML page about a run's folder and its log."""
    settings, found = _settings(run), intervals(log)
    parts = [
        f"<h1>{escape(run.resolve().name)}</h1>",
        *warnings(found),
        *notes(log, _counts(settings)["updates_per_iteration"]),
        "<h2>Summary</h2>",
        _table(_summary(run, log, settings)),
        *(panels(log, found) if log else ['<h2>Curves</h2><p class="dim">no update has finished yet</p>']),
        "<h2>Samples</h2>",
        _samples(run / "samples"),
        "<h2>Settings</h2>",
        f"<pre>{escape(settings.decode('utf-8', errors='replace'))}</pre>"
        if settings
        else f'<p class="dim">no config.yaml that can be read and has at most {MOST_BYTES} bytes</p>',
        f'<p class="dim">seppo_fast {escape(__version__)}</p>',
    ]
    title = f"{escape(run.resolve().name)} - seppo_fast"
    # A second line of defence: even if something were not escaped, nothing would run or be fetched.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        f'{_BEGINS.decode()}\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}{curves.STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _log(run: Path) -> list[dict[str, Any]]:
    """Returns the logged updates up to the first with an impossible number; raises ConfigError."""
    try:
        found = os.stat(run / LOG)
        if not stat.S_ISREG(found.st_mode):
            raise ConfigError(f"{run}: not the folder of a run: {LOG} is not a file")
        if found.st_size > _MOST_LOG_BYTES:
            raise ConfigError(f"{run / LOG}: has {found.st_size} bytes; a report reads at most {_MOST_LOG_BYTES}")
        log = read_journal(run)
    except OSError as problem:
        unread = f": {LOG} cannot be read ({problem.strerror})"
        absent = isinstance(problem, FileNotFoundError | NotADirectoryError)
        raise ConfigError(
            lacking(run, unread, _NOT_YET) if absent else f"{run}: not the folder of a run{unread}"
        ) from problem
    return list(itertools.takewhile(lambda entry: 0 <= entry["update"] <= _MOST_UPDATES, log))


def planned_updates(run: Path) -> int | None:
    """Returns the number of updates that a run's config.yaml plans; None if it cannot be read from there."""
    return _counts(_settings(run))["updates"]


def _settings(run: Path) -> bytes:
    """Returns the content of config.yaml; empty if it cannot be read or is larger than a configuration may be."""
    try:
        with open_file(run / "config.yaml") as opened:
            content = opened.read(MOST_BYTES + 1)
    except OSError:
        return b""
    return content if len(content) <= MOST_BYTES else b""


def _counts(settings: bytes) -> dict[str, int | None]:
    """Returns updates, updates per iteration and pairs per update from config.yaml; None for an invalid value."""
    try:
        train = parse_yaml(settings)["train"]
        values = {key: train.get(key) for key in ("updates", "updates_per_iteration", "pairs_per_update")}
    except (ValueError, KeyError, TypeError, AttributeError):
        values = dict.fromkeys(("updates", "updates_per_iteration", "pairs_per_update"))
    return {
        key: value if isinstance(value, int) and 0 < value <= _MOST_UPDATES else None for key, value in values.items()
    }


def _table(rows: dict[str, str]) -> str:
    cells = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in rows.items())
    return f"<table>{cells}</table>"


def _summary(run: Path, log: Sequence[dict[str, Any]], settings: bytes) -> dict[str, str]:
    counts = _counts(settings)
    total, pairs = counts["updates"], counts["pairs_per_update"]
    finished = log[-1]["update"] if log else 0
    rows = {"updates": f"{finished} of {total}" if total else str(finished)}
    if not log:
        return rows
    seconds = sum(numbers(log, "seconds"))
    rows["time"] = f"{_clock(seconds)} for rollouts and learning"
    if rates := numbers(log, "pairs_per_second"):
        rows["rate"] = f"{statistics.median(rates):.3g} pairs/s (median)" + (
            f", {pairs} pairs per update" if pairs else ""
        )
    stall = sum(numbers(log, "save_stall_seconds"))
    if seconds and stall:
        rows["waiting for saves"] = f"{_clock(stall)}, {stall / (seconds + stall):.2%}"
    left_out = skipped(log)
    shown = ", ".join(map(str, left_out[:20])) + (", ..." if len(left_out) > 20 else "")
    rows["skipped updates"] = f"{len(left_out)}: {shown}; samples in {SKIPPED}" if left_out else "none"
    for name, key in _LAST.items():
        if values := numbers(log, key):
            rows[name] = f"{values[-1]:.4g}" + ("" if key == "memory_gib" else " (last)")
    scores = read_scores(run)
    return rows | ({"scores": str(scores)} if scores else {})


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} m" if hours else f"{minutes} m {rest} s" if minutes else f"{seconds:.1f} s"


def _samples(folder: Path) -> str:
    """Returns the base's samples from the first picture, then the run's after a few updates, including the last."""
    # Sorted by length first: from a million updates on, numbers have more digits.
    files = sorted(folder.glob("update-*.png"), key=lambda file: (len(file.name), file.name))
    last = len(files) - 1
    chosen = sorted({round(place * last / max(1, _PICTURES - 1)) for place in range(_PICTURES)}) if files else []
    images = []
    for file in (files[place] for place in chosen):
        try:
            picture = decode_image(file.name, open_image(file_ref(file)), formats=("PNG",))
            if picture.width <= CAPTION_WIDTH:
                raise ImageError(file.name, "too narrow to be a sample picture of a run")
        except ImageError as problem:
            images.append(f'<p class="dim">{escape(file.name)} cannot be shown: {escape(problem.reason)}</p>')
            continue
        # The columns that `FixedPrompts` writes: captions, base, current.
        middle = CAPTION_WIDTH + max(0, picture.width - CAPTION_WIDTH) // 2
        if not any(image.startswith("<img") for image in images):
            images.append(_image(picture.crop((0, 0, middle, picture.height)), "prompts and base"))
        images.append(_image(picture.crop((middle, 0, picture.width, picture.height)), file.stem))
    return f'<div class="pictures">{"".join(images)}</div>' if images else '<p class="dim">no pictures</p>'


def _image(picture: Image.Image, name: str) -> str:
    picture.thumbnail((_WIDEST, 4 * _WIDEST))
    data = io.BytesIO()
    picture.save(data, "WEBP", quality=90)
    code = base64.b64encode(data.getvalue()).decode("ascii")
    size = f'width="{picture.width}" height="{picture.height}"'
    return f'<img {size} alt="{escape(name)}" title="{escape(name)}" src="data:image/webp;base64,{code}">'
