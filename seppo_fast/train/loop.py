"""Algorithm 1 of SePPO: draw a past policy, let it generate the negatives, learn, keep the new policy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from seppo_fast.runs.signals import defer_sigint
from seppo_fast.utils.logging import tolerant_output

if TYPE_CHECKING:
    from seppo_fast.config.schema import Config
    from seppo_fast.train.trainer import Trainer


def train(config: Config, observe: Callable[[Trainer, int], None] = lambda trainer, updates: None) -> Path:
    """Runs a whole training (Algorithm 1), or resumes one; writes weights, log and pictures into `config.output`.

    The state is saved every `save.minutes` and on SIGINT, SIGTERM, SIGHUP and SIGUSR1; the same call resumes from it.

    Args:
        config: the run's configuration.
        observe: called with the trainer and the number of finished updates, once at the start and after each update.

    Returns:
        The folder with the weights: a diffusers pipeline for full weights, otherwise a LoRA.

    Raises:
        ConfigError, DataError, NonFiniteError, CheckpointError: see `seppo_fast.utils.errors`.
        Interrupted: a signal ended the run, after its state was saved.
    """
    # Imported here so that the command line can quiet the libraries before they load.
    with defer_sigint():
        from seppo_fast.distributed.processes import Processes
        from seppo_fast.runs.folder import lock_run_folder
        from seppo_fast.train.trainer import Trainer
        from seppo_fast.utils.torch_modes import deterministic, outside_modes

    processes = Processes()
    with (
        tolerant_output(),
        outside_modes(),
        deterministic(config.model.deterministic),
        lock_run_folder(Path(config.output), processes.machine) as saved,
    ):
        trainer = Trainer(config, processes, saved)
        observe(trainer, trainer.finished)
        with trainer.running():
            for update in range(trainer.finished, config.train.updates):
                if update % config.train.updates_per_iteration == 0:
                    trainer.add_checkpoint()  # the first is checkpoint 0, the initial policy
                reference = trainer.draws.reference(update)  # line 3; None if the method has no reference
                batch = trainer.method.collect(update, reference)  # lines 4 to 6: samples and the reference's errors
                trainer.record(trainer.learner.step(batch, update))  # lines 7 to 9: loss, backward, AdamW
                del batch  # before the next one is collected, since it may hold the samples of an iteration
                observe(trainer, trainer.finished)
            return trainer.save()
