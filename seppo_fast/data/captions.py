"""What a caption may be, wherever it comes from."""

from __future__ import annotations

MAX_CAPTION_BYTES = 65_536
TEXT_COLUMNS = ("text", "caption", "prompt", "txt")
"""Under which names tables and JSON objects hold it; the first that is there."""


def checked_caption(what: str, text: str) -> str:
    """The text without white space around it; ValueError says what is wrong with `what`."""
    if len(text.encode("utf-8", "surrogatepass")) > MAX_CAPTION_BYTES:
        raise ValueError(f"{what} is longer than {MAX_CAPTION_BYTES} bytes: not a caption")
    if "\0" in text:
        raise ValueError(f"{what} holds NUL characters: not text")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        # no tokenizer takes it: there is no UTF-8 for it
        raise ValueError(f"{what} holds half a character (a lone surrogate): not text")
    if not text.strip():
        raise ValueError(f"{what} is empty")
    return text.strip()


def decoded_caption(what: str, content: bytes) -> str:
    """As `checked_caption`, of a file's bytes."""
    if len(content) > MAX_CAPTION_BYTES:
        raise ValueError(f"{what} is longer than {MAX_CAPTION_BYTES} bytes: not a caption")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{what} is not UTF-8 text") from None
    return checked_caption(what, text)
