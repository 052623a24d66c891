"""Phrases of an older, laconic style that readers stumbled over do not come back."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SUFFIXES = (".py", ".md", ".yaml", ".toml", ".ipynb", "Makefile")

# The phrase, and what to write in its place.
BANNED = {
    r"\bgo(es|ing)? on\b": "resume(s), continue(s)",
    r"\b(is|are) none\b(?! of)": "is invalid, does not exist",
    r"\b(is|are) there already\b": "already exists",
    r"\bask(s|ed)? for\b": "request(s), requested, need(s)",
    r"\bwhat is not\b": "non-..., anything that is not",
    r"\bnothing there\b": "missing, does not exist",
    r"\bleads? out of\b": "resolves to a path outside",
    r"\bmend(s|ed|ing)?\b": "fix",
    r"\bby (its|their) names?\b": "by name, named",
    r"\bNone where\b": "None if, None when",
    r"\b(is|are) of (a|another|the)\b": "belongs to, has",
    r"\bstood still\b": "was paused",
    r"\bgoes away\b": "is removed, closes",
    r"^\s+`?[a-z_]+`?: of \w": "a noun phrase: `config: the run's configuration`",
}


def _lines():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in listed:
        if name.endswith(SUFFIXES) and not name.startswith("tests/golden/") and Path(name).name != Path(__file__).name:
            for number, line in enumerate((ROOT / name).read_text(encoding="utf-8").splitlines(), 1):
                yield f"{name}:{number}", line


@pytest.mark.parametrize("phrase", BANNED)
def test_no_file_holds_a_banned_phrase(phrase):
    found = [f"{where}: {line.strip()}" for where, line in _lines() if re.search(phrase, line)]
    assert not found, f"write {BANNED[phrase]!r} instead:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("phrase", "line"),
    [
        (r"\bgo(es|ing)? on\b", "A run that goes on goes on there"),
        (r"\b(is|are) none\b(?! of)", "keys or values that are none"),
        (r"\bwhat is not\b", "what is not finite as null"),
        (r"^\s+`?[a-z_]+`?: of \w", "        config: of the run."),
    ],
)
def test_the_patterns_find_the_old_sentences(phrase, line):
    assert phrase in BANNED and re.search(phrase, line)
