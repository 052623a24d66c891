"""A training run: its model, data, past policies, method and learner; how it is saved, resumed and ended."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from seppo_fast.capacity.plan import out_of_memory
from seppo_fast.config.schema import Config
from seppo_fast.distributed.fsdp import sharding_asked
from seppo_fast.distributed.processes import Processes
from seppo_fast.methods.draws import Draws
from seppo_fast.methods.parts import MethodParts
from seppo_fast.methods.registry import method_of
from seppo_fast.models.trainable import trainable
from seppo_fast.references.layout import trainable_state_dict
from seppo_fast.references.swap import swap_parameters
from seppo_fast.references.tiers import PoolFullError
from seppo_fast.runs.checkpoint import REFERENCES, SavedState, put_aside_newer
from seppo_fast.runs.journal import LOG, SKIPPED
from seppo_fast.runs.saver import AVERAGE, OPTIMIZER, POLICY, Saver, fitting, load_policy, on_cpu
from seppo_fast.runs.signals import Interrupted, Interruption
from seppo_fast.runs.weights import write_weights, written_after
from seppo_fast.train.learner import Learner
from seppo_fast.train.recorder import Recorder
from seppo_fast.train.setup import open_pool, set_up
from seppo_fast.utils.errors import CheckpointError, ConfigError, NonFiniteError
from seppo_fast.utils.logging import say
from seppo_fast.utils.memory import is_out_of_memory


class Trainer:
    """Builds a training run and owns its state.

    Args:
        config: the configuration as requested.
        processes: the run's processes; created here if None.
        saved: the state to resume from; None for a new run.

    Attributes:
        config: the run's configuration, with everything that was left open filled in.
        finished: number of finished updates.
        family: the loaded model.
        policy: the network being trained.
        cache: latents and conditioning of the training data.
        denoiser: the forward pass that policy and references share.
        sampler: generates samples.
        references: the pool of past policies; None if the method has no reference.
        draws: chooses the past policy that is an update's reference.
        parts: the parts that the method was built from.
        method: collects what an update learns from, and computes the loss.
        learner: makes the updates.
        recorder: writes log, trackers and pictures.
        saver: writes states.
    """

    def __init__(self, config: Config, processes: Processes | None = None, saved: SavedState | None = None) -> None:
        self.processes = processes = processes or Processes()
        self.sharded = sharding_asked()
        setup = set_up(config, processes, saved)
        self._asked, self._fingerprints = setup.asked, setup.fingerprints
        self.config = config = setup.config
        self.folder = Path(config.output)
        self.family, self.policy, self.cache = setup.family, setup.policy, setup.cache
        self.denoiser, self.sampler = setup.denoiser, setup.sampler
        self.references = open_pool(config, processes.machine)
        self.draws = Draws(config, self.references)
        self.interruption = Interruption(alone=processes.world == 1)
        self.parts = MethodParts(
            config=config,
            family=self.family,
            cache=self.cache,
            denoiser=self.denoiser,
            sampler=self.sampler,
            model=self.family.model,
            draws=self.draws,
            processes=processes,
            interruption=self.interruption,
            judge=setup.judge,
        )
        self.method = method_of(self.parts)
        self.recorder = Recorder(setup, processes, self.sharded)
        self.learner = Learner(self.policy, self.method, config, processes, self.interruption, self.recorder.skipped)
        if config.reference.park:
            self.method.make_room(self.learner.parked)
        self.saver = Saver(self.folder, config.save.minutes, config.save.keep)
        self.finished, self._added, self._stalled = 0, -1, 0.0
        if saved is not None:
            self._restore(saved)  # last, since the recorder draws the base model's pictures first

    def add_checkpoint(self) -> None:
        """Adds the current policy to the pool, where later draws may pick it; at most once before each update."""
        pool = self.references
        if pool is None or (len(pool) and self.config.row.draw == "initial") or self._added == self.finished:
            return
        self.saver.wait()  # its thread reads the pool
        try:
            pool.add(self.policy)
        except PoolFullError as problem:
            if not len(pool):
                raise ConfigError(f"reference.gpu_gib, host_gib, disk_gib: {problem}") from problem
            say(f"this policy is not kept; references are still drawn from the {len(pool)} before it: {problem}")
        self._added = self.finished

    def record(self, stats: dict[str, float]) -> None:
        """Counts an update as finished and writes its log entry and, if they are due, its pictures and the run's state.

        Raises:
            Interrupted: a signal has arrived, and the run has several processes.
        """
        self.finished += 1
        stall, self._stalled = self.saver.stalled - self._stalled, self.saver.stalled
        stats = stats | {"rollout_seconds": self.method.seconds, "save_stall_seconds": stall}
        self.recorder.record(self.finished, stats)
        due, asked = self.processes.any(self.processes.main and self.saver.due(), self.interruption.asked)
        if due:
            self.save_state()
        if asked and self.processes.world > 1:
            raise Interrupted("interrupted")

    def save_state(self) -> None:
        """Starts writing the run's state after the last finished update, from which the same command resumes.

        Raises:
            CheckpointError: earlier states could not be written, three in a row.
        """
        main = self.processes.main
        if not self.finished or not (main or self.sharded):
            return
        begins = main and self.saver.begins(self.finished)
        if self.sharded:
            (begins,) = self.processes.any(begins)
        if not begins:
            return
        tensors, numbers = self.learner.state()
        tensors[POLICY] = trainable_state_dict(self.policy)
        files = {name: on_cpu(those, keep=main) for name, those in tensors.items()}
        if not main:
            return
        batch = self.method.sampling_batch or self.config.sampler.batch
        sampler = self.config.sampler.model_copy(update={"batch": batch})
        configs = {"asked": self._asked, "config": self.config.model_copy(update={"sampler": sampler})}
        numbers |= {"update": self.finished, "added": self._added, "fingerprints": self._fingerprints}
        if method := self.method.state(self.finished):
            numbers["method"] = method
        numbers |= {name: config.model_dump(mode="json") for name, config in configs.items()}
        self.saver.save(self.finished, files, numbers, self.references, self.method.files())

    def _restore(self, saved: SavedState) -> None:
        load_policy(self.policy, saved)
        files = {OPTIMIZER: saved.tensors(OPTIMIZER)}
        if self.learner.ema is not None:
            files[AVERAGE] = fitting(saved, AVERAGE, trainable(self.policy))
        try:
            self.learner.restore(files, saved.numbers)
            self._added = int(saved.numbers["added"])
            self.method.restore(saved.numbers.get("method", {}), saved.folder)
        except (KeyError, TypeError, ValueError, AttributeError, AssertionError) as problem:
            raise CheckpointError(f"{saved.folder}: its metadata does not match this run ({problem!r})") from problem
        if self.references is not None:
            try:
                self.references.restore(saved.folder / REFERENCES, self.processes.device, self.policy)
            except PoolFullError as problem:
                raise ConfigError(
                    f"reference.gpu_gib, host_gib, disk_gib: no room for the run's past policies: {problem}"
                ) from problem
        self.finished = saved.update
        if self.processes.main:
            put_aside_newer(self.folder, self.finished)
            self.recorder.open(self.finished)
        say(f"resuming after update {self.finished} of {self.config.train.updates}")

    @contextmanager
    def running(self) -> Iterator[None]:
        """Lets a signal end the run inside the block, with its state saved; frees everything at the end of the block.

        Raises:
            Interrupted: a signal ended the run.
            CheckpointError: a signal ended the run, or it was finished, but its state could not be saved.
            OutOfMemoryError: memory ran out; the message says what takes it, and which settings would take less.
        """
        try:
            with self.interruption:
                try:
                    yield
                except Interrupted:
                    self.save_state()
                    self.saver.wait(last=True)
                    self.processes.barrier()  # a launcher kills the others as soon as one exits
                    done = f"after update {self.finished}; rerun the same command to resume"
                    raise Interrupted(f"interrupted {done if self.finished else 'before the first update'}") from None
                except (MemoryError, RuntimeError) as error:
                    if self.sharded or not is_out_of_memory(error):
                        raise  # the message's memory count does not know shards
                    raise out_of_memory(self.config, self.family, self.processes.device, error) from error
        finally:
            try:
                self.saver.wait()
            finally:
                self.recorder.finish()
                if self.references is not None:
                    self.references.close()

    def save(self) -> Path:
        """Writes the run's state and its weights, or their moving average if there is one; prints the folder.

        Returns:
            The folder with the weights.

        Raises:
            CheckpointError: the state or the weights could not be written.
            NonFiniteError: no update of the run changed the weights, so none are written.
        """
        folder = self.folder / "weights"
        self.save_state()
        if not self.learner.applied:
            raise NonFiniteError(
                f"none of the run's {self.finished} updates changed the weights: {self._why_unchanged()}"
            )
        main = self.processes.main
        (missing,) = self.processes.any(main and written_after(folder) != self.finished)
        if missing and self.learner.ema is not None:
            self.learner.ema.copy_to(trainable(self.policy).values())
        if missing and self.sharded:
            wholes = on_cpu(trainable(self.policy), keep=main)
            if main:
                swap_parameters(
                    self.family.model,
                    trainable(self.family.model),
                    {name: nn.Parameter(t) for name, t in wholes.items()},
                )
        if missing and main:
            write_weights(folder, self.family, self.policy, self.config, self.finished)
        say(f"weights: {folder}")
        self.saver.wait(last=True)
        self.processes.barrier()
        return folder

    def _why_unchanged(self) -> str:
        """Returns why all updates were skipped, and what to try."""
        empty, log, skipped = self.learner.without_rows, self.folder / LOG, self.folder / SKIPPED
        if empty == self.finished:
            return (
                f"objective {self.config.objective!r} found nothing to learn from, since the rewards that it compares "
                f"were equal, missing, or closer than rl.gap allows (see reward_std, unscored and kept in {log}). No "
                "weights are written. First try another rl.reward or more samples per prompt"
            )
        how = f"{self.finished - empty} times, and {empty} had nothing to learn from;" if empty else "each time, and"
        searching = "more train.updates (fp16 was still searching for its loss scale), "
        return (
            f"the gradient was non-finite {how} all {self.finished} were skipped (sample ids in {skipped}). No weights "
            f"are written. First try {searching if self.learner.searching else ''}another model.precision or a lower "
            "train.learning_rate"
        )
