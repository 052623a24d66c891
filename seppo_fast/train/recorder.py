"""Records a run: its log, its trackers, pictures at fixed prompts, and the sample ids of skipped updates."""

from __future__ import annotations

from pathlib import Path

from seppo_fast.config.load import to_yaml
from seppo_fast.distributed.processes import Processes
from seppo_fast.evaluation.generate import FixedPrompts
from seppo_fast.runs.journal import Journal
from seppo_fast.runs.trackers import Trackers
from seppo_fast.train.optimizer import learning_rate
from seppo_fast.train.setup import Setup
from seppo_fast.utils.errors import CheckpointError
from seppo_fast.utils.files import disk_message
from seppo_fast.utils.logging import warn


class Recorder:
    """Writes everything in the run's folder but states and weights.

    Create it before the first update: it draws the pictures of the base model.

    Args:
        setup: the run's parts.
        processes: the run's processes; only the first one writes.
        sharded: whether all processes must generate the pictures together.
    """

    def __init__(self, setup: Setup, processes: Processes, sharded: bool) -> None:
        config = setup.config
        self._config = config
        self._folder = Path(config.output)
        self._main = processes.main
        train = config.train
        self._journal = Journal(self._folder, train.updates, train.pairs_per_update, processes.device, config.row.unit)
        self._trackers = Trackers(config)
        self._opened = False
        self.samples = None
        if config.log.sample_every and (self._main or sharded):
            prompts = config.log.sample_prompts or tuple(dict.fromkeys(setup.cache.prompts))[:4]
            self.samples = FixedPrompts(
                setup.family, setup.denoiser, setup.policy, setup.sampler, prompts, config.data.resolution
            )

    def open(self, finished: int) -> None:
        """Starts writing after `finished` updates; only the first process calls this.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        try:
            (self._folder / "samples").mkdir(parents=True, exist_ok=True)
            (self._folder / "config.yaml").write_text(to_yaml(self._config), encoding="utf-8")
            self._journal.resume(finished)
        except OSError as problem:
            raise CheckpointError(disk_message(self._folder, problem)) from problem
        self._trackers.start(finished)
        self._opened = True

    def record(self, update: int, stats: dict[str, float]) -> None:
        """Writes update number `update` (from 1) to log and trackers, and draws its pictures if they are due."""
        if self._main:
            self._write(update, stats)
        self._draw(update)

    def _write(self, update: int, stats: dict[str, float]) -> None:
        if not self._opened:
            self.open(0)  # not earlier: a run that ends without an update leaves nothing
        stats = self._journal.format(update, stats | {"learning_rate": learning_rate(self._config, update - 1)})
        self._trackers.log(update, stats)
        try:
            self._journal.append(update, stats)
        except OSError as problem:
            warn(f"training continues; the log entry is written later: {disk_message(self._folder, problem)}")

    def _draw(self, update: int) -> None:
        if self.samples is None or update % self._config.log.sample_every:
            return
        file = self._folder / "samples" / f"update-{update:06d}.png"
        try:
            self.samples.write(file if self._main else None, f"update {update}")
        except OSError as problem:
            warn(f"training continues without these pictures: {disk_message(self._folder, problem)}")

    def skipped(self, update: int, sample_ids: list[int], searching: bool) -> None:
        """Records the sample ids of an update with a non-finite gradient, before the learner may end the run for it.

        Args:
            update: the update's number, from 1.
            sample_ids: the update's sample ids, from all processes.
            searching: whether the loss scaler was still searching for its scale.
        """
        if not self._main:
            return
        if not self._opened:
            self.open(0)
        try:
            self._journal.skipped(update, sample_ids, searching)
        except OSError as problem:
            warn(f"the sample ids of skipped update {update} were not recorded: {disk_message(self._folder, problem)}")

    def finish(self) -> None:
        """Closes the trackers."""
        self._trackers.finish()
