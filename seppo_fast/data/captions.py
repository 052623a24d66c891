"""Validates captions from every source, and suggests how to convert those that are not UTF-8.

The messages of `CaptionError` become reasons of `Problem`s, which are part of cache keys: do not reword them.
"""

from __future__ import annotations

import codecs
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

MAX_CAPTION_BYTES = 65_536
TEXT_COLUMNS = ("text", "caption", "prompt", "txt")
"""Columns of tables and keys of JSON objects that may hold the caption, by descending priority."""

_MARKS = {
    codecs.BOM_UTF8: "",
    codecs.BOM_UTF32_LE: "UTF-32",  # must precede UTF-16, whose mark is a prefix of this one
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


class CaptionError(ValueError):
    """Raised for a caption that cannot be used; `hint` says what to do about it, or is empty."""

    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.hint = hint


def checked_caption(what: str, text: str) -> str:
    """Returns the text without byte order marks and surrounding white space; raises CaptionError, naming `what`."""
    if len(text.encode("utf-8", "surrogatepass")) > MAX_CAPTION_BYTES:
        raise CaptionError(f"{what} is longer than {MAX_CAPTION_BYTES} bytes: not a caption")
    if "\0" in text:
        raise CaptionError(f"{what} holds NUL characters: not text")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        # It cannot be encoded as UTF-8, so tokenizers reject it.
        raise CaptionError(f"{what} holds half a character (a lone surrogate): not text")
    text = text.replace("\ufeff", "").strip()
    if not text:
        raise CaptionError(f"{what} is empty")
    return text


def decoded_caption(what: str, content: bytes, path: Path | None = None) -> str:
    """Decodes a caption and checks it as `checked_caption` does; `path` is its file, None inside a tar file."""
    if len(content) > MAX_CAPTION_BYTES:
        raise CaptionError(f"{what} is longer than {MAX_CAPTION_BYTES} bytes: not a caption")
    try:
        return checked_caption(what, content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise CaptionError(f"{what} is not UTF-8 text", encoding_hint(content, path)) from None
    except CaptionError as error:
        if _likely_encoding(content):
            error.hint = encoding_hint(content, path)
        raise


def caption_of(record: Mapping[str, object]) -> object:
    """Returns the first non-blank text under `TEXT_COLUMNS`, else the first text, else the first non-null value."""
    held = [record[name] for name in TEXT_COLUMNS if record.get(name) is not None]
    texts = [value for value in held if isinstance(value, str)]
    return next((text for text in texts if text.strip()), (texts or held or [None])[0])


def encoding_hint(content: bytes, path: Path | None = None) -> str:
    """Returns a hint naming the likely encoding of non-UTF-8 text and, given its file, the command that converts it."""
    encoding = _likely_encoding(content)
    if path is None:
        return f"it looks like {encoding}" if encoding else ""
    if not encoding:
        return "save it as UTF-8; its encoding could not be guessed (`iconv -l` lists the possible ones)"
    file, new = _shell_word(path.absolute()), _shell_word(path.absolute().with_name(f"{path.name}.utf-8"))
    return f"it looks like {encoding}; to convert it: iconv -f {encoding} -t UTF-8 {file} > {new} && mv {new} {file}"


def _likely_encoding(content: bytes) -> str:
    """Returns iconv's name of the likely encoding, or an empty string if none is likely or the text is UTF-8."""
    for mark, name in _MARKS.items():
        if content.startswith(mark):
            return name
    for name, zeros in (("UTF-16LE", content[1::2]), ("UTF-16BE", content[::2])):
        if zeros.count(0) > len(content) // 5:  # in UTF-16, one of a Latin letter's two bytes is zero
            return name
    # In Western languages most letters are ASCII, and non-ASCII letters come in runs of at most two.
    beyond, letters = len(re.findall(rb"[\x80-\xff]", content)), len(re.findall(rb"[A-Za-z]", content))
    unlike = re.search(rb"[\x80-\xff]{3}|[\0\x81\x8d\x8f\x90\x9d]", content)  # WINDOWS-1252 leaves five bytes undefined
    return "WINDOWS-1252" if 0 < 2 * beyond <= letters and not unlike else ""


def _shell_word(path: Path) -> str:
    """Quotes a path for a shell; a path with unprintable characters is written in bash's $'...' notation."""
    if str(path).isprintable():
        return shlex.quote(str(path))
    shown = (chr(byte) if 32 <= byte < 127 and byte not in b"'\\" else f"\\x{byte:02x}" for byte in os.fsencode(path))
    return f"$'{''.join(shown)}'"
