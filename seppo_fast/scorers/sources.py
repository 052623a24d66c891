"""Where published weights come from: a local folder or the hub cache, and what to tell a user who lacks them.

Nothing is downloaded here. A run that trains may be offline, and a download of gigabytes should be the user's decision.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import try_to_load_from_cache


@dataclass(frozen=True)
class Source:
    """Files of a scorer that are published together.

    Attributes:
        place: the subfolder of the local weights' folder in which they are searched, named like a scorer.
        repository: their hub id; for a source with `url`, its name elsewhere.
        files: the names of the files that are loaded.
        size: how large they are, for messages.
        pickle: the name under which the only file is published as a pickle; empty for safetensors and vocabularies.
        url: the address of a file that is not on the hub.
    """

    place: str
    repository: str
    files: tuple[str, ...]
    size: str
    pickle: str = ""
    url: str = ""

    def locate(self, folder: Path | None) -> dict[str, Path] | None:
        """Returns the files by name, in `folder / place` or else the hub cache; None if any of them is missing."""
        if folder is not None and all((folder / self.place / name).is_file() for name in self.files):
            return {name: folder / self.place / name for name in self.files}
        if self.url:
            return None
        cached = {name: try_to_load_from_cache(self.repository, name) for name in self.files}
        # The cache may also know that a file does not exist, which is neither None nor a path.
        found = {name: Path(path) for name, path in cached.items() if isinstance(path, str)}
        return found if len(found) == len(self.files) else None

    def advice(self, folder: Path | None) -> str:
        """Returns what is missing, how large it is, and the commands that provide it."""
        pickle = self._pickle(folder)
        if pickle is not None:
            return (
                f"{pickle.with_name(self.files[0])}: the published file is a pickle, which is not loaded, because it "
                f"can run code; convert it once: seppo-fast score --convert {_quoted(pickle)}"
            )
        wanted = (self.pickle,) if self.pickle else self.files
        local = Path("scorers" if folder is None else folder) / self.place
        if self.url:
            steps = [f"mkdir -p {_quoted(local)}", f"curl -L {shlex.quote(self.url)} -o {_quoted(local / self.pickle)}"]
        else:
            steps = [f"hf download {self.repository} {' '.join(wanted)}"]
            # A pickle needs a folder of its own, in which the converted file can stand beside it.
            steps[0] += f" --local-dir {_quoted(local)}" if self.pickle or folder is not None else ""
        if self.pickle:
            steps.append(f"seppo-fast score --convert {_quoted(local / self.pickle)}")
        searched = [] if folder is None else [str(local)]
        searched += [] if self.url else ["the hub cache"]
        where = f"; not found in {' or '.join(searched)}" if searched else ""
        then = ", and add --weights scorers" if self.pickle and folder is None else ""
        return f"{', '.join(wanted)} of {self.repository} ({self.size}){where}; run {' && '.join(steps)}{then}"

    def _pickle(self, folder: Path | None) -> Path | None:
        """Returns the published pickle if it exists in either place, not yet converted."""
        if not self.pickle:
            return None
        local = None if folder is None else folder / self.place / self.pickle
        if local is not None and local.is_file():
            return local
        cached = None if self.url else try_to_load_from_cache(self.repository, self.pickle)
        return Path(cached) if isinstance(cached, str) else None


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
