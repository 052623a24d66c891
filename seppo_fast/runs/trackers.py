"""The numbers of the log in tensorboard and wandb, by accelerate's trackers; `log.jsonl` has them in any case."""

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

FOLDERS = {"tensorboard", "wandb"}  # in the run's folder, named as the trackers


def require_trackers(config: Config) -> None:
    """Looks whether the trackers that are asked for are installed; imports none.

    Raises:
        ConfigError: one is not; its pip line.
    """
    for name in config.log.trackers:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"log.trackers: {name} is not installed: pip install 'seppo_fast[{name}]'")


class Trackers:
    """Those that `log.trackers` names; for one process of the run, which goes on without one that fails.

    Args:
        config: of the run.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._running: dict[str, GeneralTracker] = {}

    def start(self, finished: int) -> None:
        """Opens them for the updates after `finished`, in the folder of a run that has begun.

        In tensorboard what a killed run wrote of later updates gives way to what comes. wandb goes on with its run of
        the same id and takes no step twice: of such updates it keeps what came first, the same but for the times.
        """
        starts = {"tensorboard": self._start_tensorboard, "wandb": self._start_wandb}
        for name in self._config.log.trackers:
            self._guarded(name, partial(starts[name], finished))

    def log(self, update: int, stats: Mapping[str, float]) -> None:
        """Sends what `Journal.format` gave of an update; its number is the step."""
        for name, tracker in list(self._running.items()):
            self._guarded(name, partial(tracker.log, dict(stats), step=update))

    def finish(self) -> None:
        """Waits until all is written or sent."""
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
        """A tracker's trouble, of whatever kind, is no reason to lose a run."""
        try:
            action()
        except Exception as problem:
            self._running.pop(name, None)
            warn(f"the run goes on without {name}: {type(problem).__name__}: {problem}")
