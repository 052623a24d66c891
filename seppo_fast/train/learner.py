"""The optimizer update: forward, loss, backward, clipping and step, over this rank's pairs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from seppo_fast.config.schema import Config
from seppo_fast.distributed.fsdp import copy_to_shard, gather_full, is_sharded
from seppo_fast.distributed.processes import Processes
from seppo_fast.methods.method import Batch, Method
from seppo_fast.models.trainable import make_ema, trainable
from seppo_fast.runs.journal import SKIPPED
from seppo_fast.runs.signals import Interruption
from seppo_fast.train.halves import GradientHalves
from seppo_fast.train.optimizer import learning_rate, make_optimizer
from seppo_fast.utils.errors import NonFiniteError
from seppo_fast.utils.fault_injection import fault
from seppo_fast.utils.logging import say

_MAX_SKIPPED = 3  # updates in a row with a non-finite gradient before the run stops


class Learner:
    """Trains the policy on what a method collects, by the method's loss.

    Attributes:
        optimizer: AdamW over the trained weights.
        scaler: scales the loss in fp16; disabled otherwise.
        ema: the moving average of the trained weights; None if it is off.
        applied: number of updates, in the whole run, that changed the weights; the others were skipped.
        without_rows: number of those skipped because the method left out every row.

    Args:
        policy: the network, its trained weights marked; sharded or not.
        method: runs the policy on micro-batches.
        config: the run's configuration, with its micro-batch chosen.
        processes: the run's processes.
        interruption: checked before each micro-batch; if it raises, the weights stay as the last update left them.
        skipped: called when an update is skipped, with its number (from 1), the sample ids of all ranks, and whether
            the loss scaler was still searching for its scale.
    """

    def __init__(
        self,
        policy: nn.Module,
        method: Method,
        config: Config,
        processes: Processes,
        interruption: Interruption,
        skipped: Callable[[int, list[int], bool], None] = lambda update, sample_ids, searching: None,
    ) -> None:
        assert config.train.micro_batch is not None, "train.micro_batch must be chosen by now"
        self.policy = policy
        self.ema = make_ema(policy, config.train.ema_decay)
        self._method = method
        self._interruption = interruption
        self._tell_skipped = skipped
        self._micro_batch = config.train.micro_batch
        self._config = config
        self._processes = processes
        self.optimizer = make_optimizer(policy, config.learning_rate, config.train)
        half = config.model.precision == "fp16"
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=half)
        self._halves = GradientHalves(policy, method, processes, self._add_gradients, config.log.health_every)
        self._skipped = 0
        self.applied = 0
        self.without_rows = 0

    def step(self, batch: Batch, update: int) -> dict[str, float]:
        """Makes one update on this rank's share of a batch.

        Args:
            batch: this rank's share of what the update learns from.
            update: the update's index, from 0.

        Returns:
            The values to log: means over the rows of all ranks (see `Method.averages`); `rows`, their number, if the
            method determines it; `grad_norm` before clipping; every `log.health_every` updates the two halves of the
            gradient (see `GradientHalves.numbers`); `skipped`, 1 if the weights were left unchanged, because the
            gradient was non-finite or the method left out every row, so that loss and gradient are NaN; and
            `learn_seconds`.

        Raises:
            NonFiniteError: the gradient is non-finite for the third update in a row, none of them because the loss
                scaler was still searching for its scale.
        """
        started = time.perf_counter()
        rows = self._rows(batch)
        if not rows:
            return self._left_out()
        winners = self._halves.winners(update, self._parts(batch))
        sums = self._accumulate(batch)
        self.scaler.unscale_(self.optimizer)
        halves = {} if winners is None else self._halves.numbers(winners, self.scaler.get_scale())
        del winners
        parameters = list(trainable(self.policy).values())
        norm = gather_full(torch.nn.utils.clip_grad_norm_(parameters, self._config.train.max_grad_norm)).item()
        good = math.isfinite(sums["loss"])  # a non-finite loss comes from the batch, not from the scale
        searching = self.searching and good
        finite = math.isfinite(norm)
        if finite:
            self._set_learning_rate(update)
            self.scaler.step(self.optimizer)
            self.applied += 1
            # In the first update half of a LoRA has no gradient, since the other half is zero; during the warm-up that
            # other half may still be too small for half precision.
            if self.applied == max(2, self._config.train.warmup_updates + 1):
                self._report_untrained(update)
            if self.ema is not None:
                self.ema.step(parameters)
        self.scaler.update(None if good else self.scaler.get_scale())
        self.optimizer.zero_grad(set_to_none=True)
        self._skipped = 0 if finite or searching else self._skipped + 1
        if not finite:  # alike on all ranks, which share the gradient
            ids = [sample for part in self._processes.gather(list(batch.sample_ids)) for sample in part]
            self._tell_skipped(update + 1, ids, searching)
        if self._skipped == _MAX_SKIPPED:
            raise NonFiniteError(
                f"update {update + 1}: the gradient was non-finite {_MAX_SKIPPED} times in a row "
                f"(loss {sums['loss']}). The sample ids begin with {list(batch.sample_ids[:8])}; all are in {SKIPPED} "
                "in the run's folder. First try a lower train.learning_rate or another model.precision"
            )
        means = self._method.averages(sums, rows)
        took = time.perf_counter() - started
        means |= halves if finite else {}
        if self._method.rows(batch) is not None:
            means["rows"] = float(rows)
        return means | {"grad_norm": norm, "skipped": float(not finite), "learn_seconds": took}

    def _left_out(self) -> dict[str, float]:
        """Counts an update without rows; returns the values to log."""
        self.without_rows += 1
        nothing = {"loss": math.nan, "grad_norm": math.nan, "rows": 0.0, "skipped": 1.0, "learn_seconds": 0.0}
        return nothing | self._method.averages({}, 0)

    def _accumulate(self, batch: Batch) -> dict[str, float]:
        """Accumulates the gradient of the mean loss over all ranks' rows; returns the sums to log. One host sync."""
        made: list[dict[str, torch.Tensor]] = []
        for part, scale in self._parts(batch):
            fault("micro-batch")
            step = self._method.loss(self.policy, part, scale)
            if "loss" not in step.sums:
                raise ValueError(f"{type(self._method).__name__}.loss: StepLoss.sums must contain 'loss'")
            step.output.backward(step.grad)
            made.append(step.sums)
        self._add_gradients()
        sums = {name: torch.stack([one[name] for one in made]).sum() for name in made[0]}
        reduced = self._processes.sum(torch.stack(list(sums.values())))
        return dict(zip(sums, reduced.tolist(), strict=True))

    def _parts(self, batch: Batch) -> Iterator[tuple[Any, torch.Tensor]]:
        """Yields micro-batches, each with the factor on its gradient; checks for an interruption before each."""
        rows = self._rows(batch)
        scale = self.scaler.scale(torch.ones((), device=self._processes.device))  # a tensor: stays on the device
        for part in batch.micro_batches(self._micro_batch):
            self._interruption.check()
            yield part, scale * (len(part) / rows)

    def _rows(self, batch: Batch) -> int:
        rows = self._method.rows(batch)
        return self._config.train.pairs_per_update if rows is None else rows

    def _add_gradients(self) -> None:
        """Sums each gradient over all processes; with shards, backward has done so.

        Once per pass and tensor by tensor, not with DDP's buckets: DDP changes them after its first update, and three
        or more processes sum other buckets in another order, so a resumed run would not be the same.
        """
        if self._processes.world == 1 or is_sharded(self.policy):
            return
        weights = trainable(self.policy).values()
        self._processes.sum_gradients([weight.grad for weight in weights if weight.grad is not None])

    def _report_untrained(self, update: int) -> None:
        """Prints which trained tensors have no gradient. Nothing else shows it: the loss falls all the same."""
        absent = [name for name, norm in gradient_norms(self.policy).items() if not norm]
        if absent:
            say(
                f"{len(absent)} of {len(trainable(self.policy))} trained tensors had no gradient in update "
                f"{update + 1}: {', '.join(absent[:3])}{', ...' if len(absent) > 3 else ''}. Check whether the model's "
                "output depends on them, and try another model.precision"
            )

    @property
    def searching(self) -> bool:
        """Whether the loss scaler of fp16 may still lower its scale."""
        return self.scaler.is_enabled() and self.scaler.get_scale() > 1

    def state(self) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
        """Returns the learner's state besides the weights: live tensors by file and name, and everything else."""
        tensors: dict[str, torch.Tensor] = {}
        plain: dict[str, Any] = {}
        for name, parameter in trainable(self.policy).items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                (tensors if isinstance(value, torch.Tensor) else plain)[f"{key}/{name}"] = value
        files = {"optimizer": tensors}
        numbers = {
            "optimizer": plain,
            "scaler": self.scaler.state_dict(),
            "skipped": self._skipped,
            "applied": self.applied,
            "without_rows": self.without_rows,
        }
        if self.ema is not None:
            files["average"] = dict(zip(trainable(self.policy), self.ema.shadow_params, strict=True))
            numbers["average_step"] = self.ema.optimization_step
        return files, numbers

    def restore(self, files: Mapping[str, Mapping[str, torch.Tensor]], numbers: Mapping[str, Any]) -> None:
        """Loads what `state` returned, with its tensors on the CPU.

        Raises:
            KeyError, ValueError: the state does not match this optimizer and these weights.
        """
        parameters = trainable(self.policy)
        for place, value in [*files["optimizer"].items(), *numbers["optimizer"].items()]:
            key, _, name = place.partition("/")
            own = parameters[name]
            if isinstance(value, torch.Tensor):
                # Moments get their parameter's memory layout, whatever the file's.
                like = torch.empty_like(own.detach(), dtype=value.dtype) if value.shape == own.shape else None
                if like is not None:
                    copy_to_shard(like, value)
                value = value.to(own.device) if like is None else like
            self.optimizer.state[own][key] = value
        if self._config.train.optimizer == "adamw":
            for name, own in parameters.items():
                shapes = {key: value.shape for key, value in self.optimizer.state.get(own, {}).items()}
                if shapes not in ({}, {"step": torch.Size(), "exp_avg": own.shape, "exp_avg_sq": own.shape}):
                    raise ValueError(f"the optimizer state of {name} has {shapes}")
        self.scaler.load_state_dict(numbers["scaler"])
        self._skipped = int(numbers["skipped"])
        self.applied = applied_updates(numbers)
        self.without_rows = int(numbers.get("without_rows", 0))
        if self.ema is not None:
            for name, shadow in zip(parameters, self.ema.shadow_params, strict=True):
                copy_to_shard(shadow, files["average"][name])
            self.ema.optimization_step = numbers["average_step"]

    @contextmanager
    def parked(self) -> Iterator[None]:
        """Keeps the optimizer's state in host memory inside the block; two copies buy room for a rollout."""
        device = self._processes.device
        self._move_state(torch.device("cpu"))
        try:
            yield
        finally:
            self._move_state(device)

    def _move_state(self, device: torch.device) -> None:
        for state in self.optimizer.state.values():
            state.update({name: value.to(device) for name, value in state.items() if isinstance(value, torch.Tensor)})

    def _set_learning_rate(self, update: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self._config, update)


def gradient_norms(model: nn.Module) -> dict[str, float]:
    """Returns each trained tensor's gradient norm by name, 0 without a gradient; one host sync, more for shards."""
    parameters = trainable(model)
    gradients = {name: weight.grad for name, weight in parameters.items() if weight.grad is not None}
    if not gradients:
        return dict.fromkeys(parameters, 0.0)
    norms = torch.stack([gather_full(torch.linalg.vector_norm(gradient)) for gradient in gradients.values()]).tolist()
    return dict.fromkeys(parameters, 0.0) | dict(zip(gradients, norms, strict=True))


def applied_updates(numbers: Mapping[str, Any]) -> int:
    """Returns how many updates before a saved state changed the weights; if an older version did not record it, all."""
    return int(numbers.get("applied", numbers["update"]))
