"""Sends the logged numbers to TensorBoard and W&B through accelerate's trackers; `log.jsonl` always has them too."""

from __future__ import annotations

import importlib.util
import os
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from seppo_fast.config.schema import Config
from seppo_fast.utils.errors import ConfigError
from seppo_fast.utils.logging import warn

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

FOLDERS = {"tensorboard", "wandb"}  # in the run's folder, named after the trackers


def require_trackers(config: Config) -> None:
    """Checks that the requested trackers are installed, without importing them.

    Raises:
        ConfigError: a tracker is not installed; the message has the pip command.
    """
    for name in config.log.trackers:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"log.trackers: {name} is not installed: pip install 'seppo_fast[{name}]'")


class Trackers:
    """The trackers in `log.trackers`, used by one process of the run. A tracker that fails is dropped with a warning.

    Args:
        config: the run's configuration.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._running: dict[str, GeneralTracker] = {}

    def start(self, finished: int) -> None:
        """Opens the trackers for the updates after `finished`; the run's folder must exist.

        If a killed run had logged later updates already, TensorBoard replaces them with the repeated ones. W&B resumes
        the run of the same id and accepts each step once, so it keeps the first values, which differ only in the times.
        """
        starts = {"tensorboard": self._start_tensorboard, "wandb": self._start_wandb}
        for name in self._config.log.trackers:
            self._guarded(name, partial(starts[name], finished))

    def log(self, update: int, stats: Mapping[str, float]) -> None:
        """Sends what `Journal.format` returned for an update; the step is the update's number."""
        for name, tracker in list(self._running.items()):
            self._guarded(name, partial(tracker.log, dict(stats), step=update))

    def finish(self) -> None:
        """Closes the trackers, waiting until everything is written or sent."""
        for name, tracker in list(self._running.items()):
            self._guarded(name, tracker.finish)
        self._running = {}

    def _start_tensorboard(self, finished: int) -> None:
        from accelerate.tracking import TensorBoardTracker

        self._start("tensorboard", TensorBoardTracker("tensorboard", self._config.output, purge_step=finished + 1))

    def _start_wandb(self, finished: int) -> None:
        from accelerate.tracking import WandBTracker

        folder = Path(self._config.output)
        number = folder / "wandb" / "run-id"
        number.parent.mkdir(exist_ok=True)
        if not finished or not number.exists():
            number.write_text(uuid.uuid4().hex, encoding="ascii")
        tracker = WandBTracker(
            os.environ.get("WANDB_PROJECT", "seppo_fast"),
            name=folder.name,
            dir=str(folder),
            id=number.read_text(encoding="ascii"),
            resume="allow",
        )
        self._start("wandb", tracker)
        tracker.store_init_configuration(self._config.model_dump(mode="json"))

    def _start(self, name: str, tracker: GeneralTracker) -> None:
        tracker.start()
        self._running[name] = tracker

    def _guarded(self, name: str, action: Callable[[], object]) -> None:
        """Runs an action of a tracker; if it raises anything, drops the tracker instead of ending the run."""
        try:
            action()
        except Exception as problem:
            self._running.pop(name, None)
            warn(f"the run continues without {name}: {type(problem).__name__}: {problem}")
