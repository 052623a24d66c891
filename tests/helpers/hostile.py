"""Malicious files for tests, and the command line's error messages about them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from seppo_fast.cli import main
from seppo_fast.config.load import to_yaml
from tests.helpers.runs import tiny_config

UNSAFE = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.marker), "w"))


def payloads(marker: Path) -> list[bytes]:
    """Returns the payload as pickle writes it and as torch writes it."""
    file = marker.with_name("payload")
    torch.save({"weight": Payload(marker)}, file)
    return [pickle.dumps(Payload(marker), protocol=2), file.read_bytes()]


def run_config(folder: Path, pipeline: Path, **sections: Any) -> Path:
    """Writes a configuration file for a run of one update and returns its path."""
    small = {"train": {"updates": 1, "pairs_per_update": 2, "micro_batch": 2}, "sampler": {"steps": 1, "batch": 2}}
    file = folder / "run.yaml"
    file.write_text(to_yaml(tiny_config(pipeline, folder, **small | sections)))
    return file


def ends(capsys: pytest.CaptureFixture[str], code: int, *words: object) -> str:
    """Runs `seppo-fast WORDS`, asserts its exit code, and returns its error message."""
    assert main([str(word) for word in words]) == code
    said = capsys.readouterr().err
    said = said[said.rindex("seppo-fast: ") :]  # after the progress bars of libraries that load weights
    assert "Traceback" not in said
    assert len(said) < 5000
    return said
