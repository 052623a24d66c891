"""Writes a study: the page and media for the raters, and beside them the key, which raters must not get."""

from __future__ import annotations

import base64
import hashlib
import json
import statistics
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from seppo_fast.evaluation.human.items import Material
from seppo_fast.evaluation.human.media import Sheet, copy_media
from seppo_fast.evaluation.human.plan import Shown
from seppo_fast.evaluation.human.study import KEY, QUESTIONS, Study, media_files
from seppo_fast.utils.errors import CheckpointError, ConfigError
from seppo_fast.utils.files import staged_folder

SHIPPED = "for-raters"
_PAGE, _MEDIA = "index.html", "media"


def write_study(study: Study, material: Material, folder: Path) -> None:
    """Writes `for-raters/index.html`, `for-raters/media/` and `key.json` into a new folder.

    Args:
        study: the drawn study.
        material: the media that it was drawn from.
        folder: the folder to create.

    Raises:
        ConfigError: the folder exists.
        DataError: a medium is missing or damaged, or the media of an item differ in size.
        CheckpointError: the folder cannot be written.
    """
    if folder.exists():
        raise ConfigError(f"{folder}: exists; choose another --output, or remove it if its study is no longer needed")
    with staged_folder(folder, CheckpointError) as staging:
        media = staging / SHIPPED / _MEDIA
        media.mkdir(parents=True)
        sheets = copy_media(media_files(study, material), media, study.seed, study.source)
        (staging / SHIPPED / _PAGE).write_text(page(study, sheets), encoding="utf-8", newline="\n")
        study.write_key(staging / KEY)


def page(study: Study, sheets: Mapping[Shown, Sheet]) -> str:
    """Returns the HTML page: no file but the media beside it, no request to any other machine, no cookies."""
    room = files(__package__)
    script = room.joinpath("page.js").read_text(encoding="utf-8")
    style = room.joinpath("page.css").read_text(encoding="utf-8")
    # `file:` because browsers disagree whether 'self' matches the files beside a page that is opened from disk.
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; "
        "img-src 'self' file: data: blob:; base-uri 'none'; form-action 'none'"
    )
    # `<` is escaped because a prompt could close the element.
    content = json.dumps(_content(study, sheets)).replace("<", "\\u003c")
    minutes = _minutes(study)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="referrer" content="no-referrer">'
        f"<title>Comparison study</title><style>{style}</style></head>\n<body>\n"
        + _BODY.replace("MINUTES", f"{minutes}")
        + f'<script type="application/json" id="study">{content}</script>\n<script>{script}</script>\n</body></html>\n'
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _content(study: Study, sheets: Mapping[Shown, Sheet]) -> dict[str, Any]:
    """Returns the data of the page: no model, no item id, no kind of trial, nothing from which a side follows."""
    return {
        "study": study.id,
        # The same for all media, because the models' own frame rates could differ.
        "milliseconds": statistics.median_low(sheet.milliseconds for sheet in sheets.values()),
        "questions": [{"name": name, "text": QUESTIONS[name]} for name in study.questions],
        "media": {
            sheet.file: {key: getattr(sheet, key) for key in ("width", "height", "frames", "columns", "rows")}
            for sheet in sorted(sheets.values(), key=lambda sheet: sheet.file)
        },
        "raters": {
            name: [[study.prompts[row.item], sheets[row.left].file, sheets[row.right].file] for row in rows]
            for name, rows in study.raters.items()
        },
    }


def _minutes(study: Study) -> int:
    """Returns an estimate of the time per rater: five seconds for each question."""
    return max(1, round(max(map(len, study.raters.values())) * len(study.questions) * 5 / 60))


_BODY = """<main>
<section id="welcome">
<h1>Which one is better?</h1>
<p>You will see pairs of generated pictures or clips and answer the same questions about each pair. This takes about
MINUTES minutes; you can stop at any time and continue later in the same browser. Some pairs test attention, and some
appear twice.</p>
<p>Answer with the buttons or the keys <kbd>1</kbd> left, <kbd>2</kbd> about the same, <kbd>3</kbd> right. Read the
prompt first. Nothing is sent anywhere: at the end, save your answers as a file and send that file back.</p>
<p><label for="rater">Your name: </label><select id="rater"></select>
<button type="button" id="start" class="main">Start</button></p>
<noscript><p class="warning">This page needs JavaScript.</p></noscript>
</section>
<p id="storage" class="warning" hidden>This browser does not keep answers. Save them before you close the page.</p>
<section id="work" tabindex="-1" hidden>
<div class="dim" id="count"></div>
<progress id="progress" aria-label="answers given"></progress>
<div id="trial">
<p id="prompt"></p>
<div class="pair" id="pair">
<div><div class="box" id="left"><div class="zoom"><div class="tile"></div></div></div>
<div class="side">left</div></div>
<div><div class="box" id="right"><div class="zoom"><div class="tile"></div></div></div>
<div class="side">right</div></div>
</div>
<h2 id="question" aria-live="polite"></h2>
<div class="answers">
<button type="button" id="answer-left">Left <kbd>1</kbd></button>
<button type="button" id="answer-same">About the same <kbd>2</kbd></button>
<button type="button" id="answer-right">Right <kbd>3</kbd></button>
</div>
</div>
<h2 id="finished" tabindex="-1" hidden>All questions are answered. Save the answers and send the file back.</h2>
<div class="tools">
<button type="button" id="undo">Undo <kbd>u</kbd></button>
<span id="viewing" class="tools">
<button type="button" id="zoom">Zoom <kbd>z</kbd></button>
<button type="button" id="play">Pause <kbd>p</kbd></button>
</span>
<button type="button" id="save">Save answers <kbd>s</kbd></button>
</div>
<p id="said" class="dim" role="status"></p>
<p class="dim">When zoomed, move with the pointer or the arrow keys. To change the name, reload the page.</p>
</section>
</main>
"""
