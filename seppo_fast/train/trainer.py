"""What a run holds: model, data, past policies, learner, log; and its two phases: `rollout` and `learner`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from seppo_fast.capacity.plan import out_of_memory
from seppo_fast.capacity.presets import fit_to_machine, turn_dial
from seppo_fast.config.load import to_yaml
from seppo_fast.config.objectives import OBJECTIVES
from seppo_fast.config.schema import Config
from seppo_fast.distributed.fsdp import settled, shard, sharding_asked
from seppo_fast.distributed.processes import Patience, node_of, processes
from seppo_fast.evaluation.generate import FixedPrompts
from seppo_fast.methods.pairs import PairMaker
from seppo_fast.methods.reference_errors import REFERENCE_STRATEGIES
from seppo_fast.methods.rollout import Rollout
from seppo_fast.models.denoiser import Denoiser
from seppo_fast.models.registry import load_family
from seppo_fast.models.trainable import DTYPES, compile_blocks, make_trainable, trainable
from seppo_fast.references.layout import trained_state
from seppo_fast.references.swap import exchange
from seppo_fast.references.tiers import PoolFullError
from seppo_fast.runs.checkpoint import REFERENCES, SavedState, put_aside_newer
from seppo_fast.runs.journal import SKIPPED, Journal
from seppo_fast.runs.resume import refuse_other_content, resumed_config
from seppo_fast.runs.saver import AVERAGE, OPTIMIZER, POLICY, Saver, fitting, load_policy, on_cpu
from seppo_fast.runs.signals import Interrupted, Interruption
from seppo_fast.runs.trackers import Trackers
from seppo_fast.runs.weights import write_weights, written_after
from seppo_fast.train.learner import Learner
from seppo_fast.train.opening import open_cache, open_pool
from seppo_fast.train.optimizer import learning_rate
from seppo_fast.train.preflight import preflight
from seppo_fast.utils.errors import CheckpointError, ConfigError, NonFiniteError
from seppo_fast.utils.files import disk_message
from seppo_fast.utils.memory import is_out_of_memory


class Trainer:
    """Everything a run holds, set up in the order in which a user's mistakes are cheapest to find.

    Args:
        config: as it is asked for.
        accelerator: see `processes`; None: made here.
        saved: the state to go on from; None: a run from its beginning.

    Attributes:
        config: of the run, with all that was left to be chosen filled in.
        finished: updates.
        family: the model.
        policy: the network that is trained: the family's, or its shards.
        cache: the data.
        denoiser: the one forward of policy and reference.
        sampler: how references generate.
        references: the past policies; None where the objective has no reference.
        rollout: makes the pairs, the reference's samples and errors.
        learner: makes the updates.
    """

    def __init__(self, config: Config, accelerator: Accelerator | None = None, saved: SavedState | None = None) -> None:
        self.objective = OBJECTIVES[config.objective]
        self.accelerator = accelerator or processes()
        device, world = self.accelerator.device, self.accelerator.num_processes
        self.folder = Path(config.output)
        self.sharded = sharding_asked()
        if self.sharded:
            config = settled(config, world)
        self._asked = config
        if saved is not None:
            config = resumed_config(config, saved)
        config = turn_dial(config, device)
        source = preflight(config, device, world)
        self.family = load_family(config, device)
        self.policy = self.family.model
        self._fingerprints = {"model": self.family.identity()}
        if saved is not None:
            refuse_other_content(saved, {"model": (self._fingerprints["model"],)})
        patience = Patience(self.accelerator)

        def accept(*data: str) -> None:
            if saved is not None:
                refuse_other_content(saved, {"data": data})

        with patience.first_alone():
            self.cache = open_cache(config, source, self.family, self.accelerator.print, accept)
        patience.wait()  # each process reads all of the data for its digest
        self._fingerprints["data"] = self.cache.fingerprint
        if not node_of(self.accelerator).alike(self._fingerprints):
            raise ConfigError("model.path, data.source, data.cache: the processes of this run found different ones")
        make_trainable(self.policy, config.model, config.seed, self.family)
        # 8-bit AdamW makes weights contiguous at its first step, and then the forward would round otherwise. Shards
        # are of contiguous weights only.
        plain = config.train.optimizer == "adamw8bit" or self.sharded
        layout = torch.contiguous_format if plain else self.family.memory_format
        self.policy.to(device, memory_format=layout)  # type: ignore[call-overload]
        self.config = config = fit_to_machine(config, self.family, self.accelerator)
        assert config.model.attention != "auto", "the attention is chosen"
        self.family.set_attention(self.policy, config.model.attention)
        if config.model.temporal_attention == "triton":
            self.family.set_temporal_attention(self.policy, "triton")
        self.denoiser = Denoiser(self.family, DTYPES[config.model.precision])
        self.sampler = self.family.sampler(config.sampler, self.cache.latent_shape)
        self.references = open_pool(config, self.accelerator) if self.objective.draw else None
        if self.sharded:
            # From here on the family's network is a plain one for references; the policy is the shards.
            self.family.model = shard(self.policy, self.family.sharded, device)
        errors = REFERENCE_STRATEGIES[config.reference.errors](self.family, self.denoiser, self.family.model, config)
        if config.model.compile:
            compile_blocks(self.policy, config.model.attention, self.family)
        self.interruption = Interruption(self._warn, alone=world == 1)
        self.learner = Learner(
            self.policy, errors, config, self.accelerator, self.interruption.check, self._record_skipped
        )
        self.rollout = Rollout(
            config,
            PairMaker(config, self.cache, self.family.schedule, rank=self.accelerator.process_index, world=world),
            self.denoiser,
            self.sampler,
            self.references,
            errors,
            world=world,
            making_room=self.learner.parked if config.reference.park else nullcontext,
            report=self.accelerator.print,
            warn=self._warn,
            check=self.interruption.check,
            least=patience.least,
        )
        self._journal = Journal(self.folder, config.train.updates, config.train.pairs_per_update, device)
        self._trackers = Trackers(config, self._warn)
        self._samples = self._fixed_prompts()
        self._saver = Saver(self.folder, config.save.minutes, config.save.keep, self._warn)
        self.finished, self._added, self._opened, self._stalled = 0, -1, False, 0.0
        if saved is not None:
            self._restore(saved)  # last: the pictures of the base are made before

    def _warn(self, line: str) -> None:
        """Says it, whichever process it is of."""
        world = self.accelerator.num_processes
        print(f"process {self.accelerator.process_index}: {line}" if world > 1 else line, flush=True)

    def add_checkpoint(self) -> None:
        """The policy as it is now becomes a reference that later draws may pick; once before an update."""
        pool = self.references
        if pool is None or (len(pool) and self.objective.draw == "initial") or self._added == self.finished:
            return
        self._saver.wait()  # it reads the pool
        try:
            pool.add(self.policy)
        except PoolFullError as problem:
            if not len(pool):
                raise ConfigError(f"reference.gpu_gib, host_gib, disk_gib: {problem}") from problem
            self.accelerator.print(f"this policy is not kept; draws go on among the {len(pool)} before it: {problem}")
        self._added = self.finished

    def report(self, stats: dict[str, float]) -> None:
        """Counts an update as finished; writes the log, and where they are due a picture and the run's state."""
        self.finished += 1
        if self.accelerator.is_main_process:
            self._write(self.finished, stats)
        self._draw_samples(self.finished)
        due, asked = self._any(self.accelerator.is_main_process and self._saver.due(), self.interruption.asked)
        if due:
            self.save_state()
        if asked and self.accelerator.num_processes > 1:
            raise Interrupted("interrupted")

    def _any(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is up in any process."""
        if self.accelerator.num_processes == 1:
            return list(flags)
        counts = torch.tensor([float(flag) for flag in flags], device=self.accelerator.device)
        return [count > 0 for count in self.accelerator.reduce(counts, "sum").tolist()]

    def _write(self, updates: int, stats: dict[str, float]) -> None:
        if not self._opened:
            self._open_folder(0)  # not before: a run that ends without an update leaves nothing
        stall, self._stalled = self._saver.stalled - self._stalled, self._saver.stalled
        stats |= {"rollout_seconds": self.rollout.seconds, "save_stall_seconds": stall}
        stats = self._journal.tell(updates, stats | {"learning_rate": learning_rate(self.config, updates - 1)})
        self._trackers.log(updates, stats)
        try:
            self._journal.write(updates, stats)
        except OSError as problem:
            self._warn(f"the run goes on: {disk_message(self.folder, problem)}")

    def _draw_samples(self, updates: int) -> None:
        if self._samples is None or updates % self.config.log.sample_every:
            return
        file = self.folder / "samples" / f"update-{updates:06d}.png"
        try:
            self._samples.write(file if self.accelerator.is_main_process else None, f"update {updates}")
        except OSError as problem:
            self._warn(f"the run goes on: {disk_message(self.folder, problem)}")

    def _record_skipped(self, update: int, sample_ids: list[int], searching: bool) -> None:
        """Writes down whose gradient was not finite, before the learner may end the run for it."""
        if not self.accelerator.is_main_process:
            return
        if not self._opened:
            self._open_folder(0)
        try:
            self._journal.skipped(update + 1, sample_ids, searching)
        except OSError as problem:
            self._warn(f"samples of the skipped update {update + 1}: {disk_message(self.folder, problem)}")

    def save_state(self) -> None:
        """Begins to write the run's state as the last finished update left it, for the same command to go on from.

        Raises:
            CheckpointError: the third one in a row that the disk refused.
        """
        main = self.accelerator.is_main_process
        if not self.finished or not (main or self.sharded):
            return
        begins = main and self._saver.begins(self.finished)
        if self.sharded:
            (begins,) = self._any(begins)
        if not begins:
            return
        tensors, numbers = self.learner.state()
        tensors[POLICY] = trained_state(self.policy)
        files = {name: on_cpu(those, keep=main) for name, those in tensors.items()}
        if not main:
            return
        batch = self.config.sampler.model_copy(update={"batch": self.rollout.batch})
        configs = {"asked": self._asked, "config": self.config.model_copy(update={"sampler": batch})}
        numbers |= {"update": self.finished, "added": self._added, "fingerprints": self._fingerprints}
        numbers |= {name: config.model_dump(mode="json") for name, config in configs.items()}
        self._saver.save(self.finished, files, numbers, self.references)

    def _restore(self, saved: SavedState) -> None:
        load_policy(self.policy, saved)
        files = {OPTIMIZER: saved.tensors(OPTIMIZER)}
        if self.learner.ema is not None:
            files[AVERAGE] = fitting(saved, AVERAGE, trainable(self.policy))
        try:
            self.learner.restore(files, saved.numbers)
            self._added = int(saved.numbers["added"])
        except (KeyError, TypeError, ValueError, AttributeError, AssertionError) as problem:
            raise CheckpointError(
                f"{saved.folder}: holds other numbers than a state of this run ({problem!r})"
            ) from problem
        if self.references is not None:
            try:
                self.references.restore(saved.folder / REFERENCES, self.accelerator.device, self.policy)
            except PoolFullError as problem:
                raise ConfigError(
                    f"reference.gpu_gib, host_gib, disk_gib: no room for the past policies of the run: {problem}"
                ) from problem
        self.finished = saved.update
        if self.accelerator.is_main_process:
            put_aside_newer(self.folder, self.finished)
            self._open_folder(self.finished)
        self.accelerator.print(f"going on after update {self.finished} of {self.config.train.updates}")

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside the block a signal ends the run where it can, its state saved; all is freed after it.

        Raises:
            Interrupted: a signal came.
            CheckpointError: and the state could not be saved.
            OutOfMemoryError: with what takes the memory, and settings that would take less.
        """
        try:
            with self.interruption:
                try:
                    yield
                except Interrupted:
                    self.save_state()
                    self._saver.wait(last=True)
                    self.accelerator.wait_for_everyone()  # a launcher kills the others when one leaves
                    done = f"after update {self.finished}; the same command goes on"
                    raise Interrupted(f"interrupted {done if self.finished else 'before an update'}") from None
                except (MemoryError, RuntimeError) as error:
                    if self.sharded or not is_out_of_memory(error):
                        raise  # what a shard takes is not counted
                    raise out_of_memory(self.config, self.family, self.accelerator.device, error) from error
        finally:
            try:
                self._saver.wait()
            finally:
                self._trackers.finish()
                if self.references is not None:
                    self.references.close()

    def save(self) -> Path:
        """Writes the run's state and its weights, the moving average where there is one; says where they are.

        Raises:
            CheckpointError: one of them could not be written.
            NonFiniteError: no update of the run changed the weights; none are written.
        """
        folder = self.folder / "weights"
        self.save_state()
        if not self.learner.applied:
            more = (
                "More train.updates (fp16 still searched its scale), another" if self.learner.searching else "Another"
            )
            raise NonFiniteError(
                f"none of the run's {self.finished} updates changed the weights: the gradient was not finite each "
                f"time, and all {self.finished} were skipped (sample ids in {self.folder / SKIPPED}). No weights are "
                f"written. {more} model.precision or a lower train.learning_rate are the first things to try"
            )
        main = self.accelerator.is_main_process
        (missing,) = self._any(main and written_after(folder) != self.finished)
        if missing and self.learner.ema is not None:
            self.learner.ema.copy_to(trainable(self.policy).values())
        if missing and self.sharded:
            wholes = on_cpu(trainable(self.policy), keep=main)
            if main:
                exchange(
                    self.family.model,
                    trainable(self.family.model),
                    {name: nn.Parameter(t) for name, t in wholes.items()},
                )
        if missing and main:
            write_weights(folder, self.family, self.policy, self.config, self.finished)
        self.accelerator.print(f"weights: {folder}")
        self._saver.wait(last=True)
        self.accelerator.wait_for_everyone()
        return folder

    def _open_folder(self, finished: int) -> None:
        try:
            (self.folder / "samples").mkdir(parents=True, exist_ok=True)
            (self.folder / "config.yaml").write_text(to_yaml(self.config), encoding="utf-8")
            self._journal.resume(finished)
        except OSError as problem:
            raise CheckpointError(disk_message(self.folder, problem)) from problem
        self._trackers.start(finished)
        self._opened = True

    def _fixed_prompts(self) -> FixedPrompts | None:
        if not self.config.log.sample_every or not (self.accelerator.is_main_process or self.sharded):
            return None
        prompts = self.config.log.sample_prompts or tuple(dict.fromkeys(self.cache.prompts))[:4]
        return FixedPrompts(self.family, self.denoiser, self.policy, self.sampler, prompts, self.config.data.resolution)
