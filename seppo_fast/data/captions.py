"""What a caption may be, wherever it comes from, and what to do about one in another encoding."""

from __future__ import annotations

import codecs
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

MAX_CAPTION_BYTES = 65_536
TEXT_COLUMNS = ("text", "caption", "prompt", "txt")
"""Under which names tables and JSON objects hold it; the first that holds text."""

_MARKS = {
    codecs.BOM_UTF8: "",
    codecs.BOM_UTF32_LE: "UTF-32",  # before UTF-16, whose mark is its beginning
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


class CaptionError(ValueError):
    """A caption that cannot be used; `hint` says what to do about it, where that is known."""

    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.hint = hint


def checked_caption(what: str, text: str) -> str:
    """The text without byte order marks, and white space around it; raises CaptionError, which names `what`."""
    if len(text.encode("utf-8", "surrogatepass")) > MAX_CAPTION_BYTES:
        raise CaptionError(f"{what} is longer than {MAX_CAPTION_BYTES} bytes: not a caption")
    if "\0" in text:
        raise CaptionError(f"{what} holds NUL characters: not text")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        # no tokenizer takes it: there is no UTF-8 for it
        raise CaptionError(f"{what} holds half a character (a lone surrogate): not text")
    text = text.replace("\ufeff", "").strip()
    if not text:
        raise CaptionError(f"{what} is empty")
    return text


def decoded_caption(what: str, content: bytes, path: Path | None = None) -> str:
    """As `checked_caption`, of a file's bytes; `path` is the file, where it is one of its own."""
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
    """What a record holds under `TEXT_COLUMNS`: the first text that is not blank, else the first that is not null."""
    held = [record[name] for name in TEXT_COLUMNS if record.get(name) is not None]
    texts = [value for value in held if isinstance(value, str)]
    return next((text for text in texts if text.strip()), (texts or held or [None])[0])


def encoding_hint(content: bytes, path: Path | None = None) -> str:
    """In which encoding a text probably is that is not UTF-8, and the shell's line that converts its file."""
    encoding = _likely_encoding(content)
    if path is None:
        return f"it looks like {encoding}" if encoding else ""
    if not encoding:
        return "save it as UTF-8; of the encodings that `iconv -l` lists it looks like none of the usual Western ones"
    file, new = _shell_word(path.absolute()), _shell_word(path.absolute().with_name(f"{path.name}.utf-8"))
    return f"it looks like {encoding}; to convert it: iconv -f {encoding} -t UTF-8 {file} > {new} && mv {new} {file}"


def _likely_encoding(content: bytes) -> str:
    """The name that iconv has for it; empty where nothing speaks for one, or it is UTF-8."""
    for mark, name in _MARKS.items():
        if content.startswith(mark):
            return name
    for name, zeros in (("UTF-16LE", content[1::2]), ("UTF-16BE", content[::2])):
        if zeros.count(0) > len(content) // 5:  # a zero beside each of mostly Latin letters
            return name
    # In Western languages most letters are ASCII, and one that is not stands alone or beside one other.
    beyond, letters = len(re.findall(rb"[\x80-\xff]", content)), len(re.findall(rb"[A-Za-z]", content))
    unlike = re.search(rb"[\x80-\xff]{3}|[\0\x81\x8d\x8f\x90\x9d]", content)  # five bytes that it leaves undefined
    return "WINDOWS-1252" if 0 < 2 * beyond <= letters and not unlike else ""


def _shell_word(path: Path) -> str:
    """The path as one word for a shell; what a terminal would not show as it is, in bash's way of writing bytes."""
    if str(path).isprintable():
        return shlex.quote(str(path))
    shown = (chr(byte) if 32 <= byte < 127 and byte not in b"'\\" else f"\\x{byte:02x}" for byte in os.fsencode(path))
    return f"$'{''.join(shown)}'"
