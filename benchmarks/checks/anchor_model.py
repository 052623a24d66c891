"""The model's part of `python -m benchmarks.anchor`: samples, denoising errors and gradients for one set of pairs.

Shape legend: N pairs, K draws of (time, noise) per pair.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.checks.anchor_gradients import Gradient, Halves, dot
from seppo_fast.distributed.fsdp import copy_to_shard
from seppo_fast.loss import denoising_errors
from seppo_fast.methods.pairs import Pairs, noised
from seppo_fast.models.trainable import LORA_LAYER, trainable
from seppo_fast.references.layout import trainable_state_dict
from seppo_fast.runs.checkpoint import SavedState
from seppo_fast.runs.saver import load_policy
from seppo_fast.train.setup import Setup
from seppo_fast.utils.errors import NonFiniteError
from seppo_fast.utils.random import keyed_noise, keyed_rng


class Examples:
    """Winners, prompts and random numbers of N pairs; each draw is a function of (seed, example, draw) alone.

    Attributes:
        prompts: the N prompts.
        winners: `(N, *latent)` float32.
        position: `(N, K)`, the position of each draw's time: 0 at clean data, 1 at the end of the forward process.

    Args:
        setup: model and data.
        pairs: number of pairs N, at most the number of examples in the data.
        draws: number of draws per pair, K.
        seed: seed of the choice of examples and of all draws.
    """

    def __init__(self, setup: Setup, pairs: int, draws: int, seed: int) -> None:
        self._setup, self._seed, self._draws = setup, seed, draws
        cache, schedule = setup.cache, setup.family.schedule
        self._chosen: list[int] = keyed_rng(seed, "anchor order").permutation(len(cache))[:pairs].tolist()
        self.prompts = [cache.prompts[index] for index in self._chosen]
        self.winners = cache.winners(self._chosen).float()
        rows = cache.conditioning([None, *self._chosen])
        self._own, self._uncond = rows.take(slice(1, None)), rows.take(slice(0, 1))
        self._shape = tuple(self.winners.shape[1:])
        self._times = torch.empty(pairs, draws, dtype=schedule.dtype)
        for row, index in enumerate(self._chosen):
            for draw in range(draws):
                self._times[row, draw] = schedule.draw(keyed_rng(seed, "anchor time", index, draw), self._shape)
        self.position: np.ndarray = schedule.progress(self._times.flatten()).view(pairs, draws).double().numpy()

    def sampled(self, model: nn.Module) -> Tensor:
        """Returns guided samples `(N, *latent)` of the pairs' own prompts, as a rollout makes them.

        All models start from the same noise.
        """
        noise = keyed_noise(self._seed, "anchor sample", [(index,) for index in self._chosen], self._shape)
        with torch.no_grad():
            return self._setup.denoiser.sample(model, self._setup.sampler, noise, self._own, self._uncond)

    def errors(self, model: nn.Module, latents: Tensor) -> np.ndarray:
        """Returns denoising errors `(N, K)`, float64, of latents `(N, *latent)`; all latents share the same draws."""
        with torch.no_grad():
            columns = [torch.cat([errors.cpu() for errors in self._batches(model, latents, d)]) for d in self._range]
        made = torch.stack(columns, dim=1).double()
        if not bool(made.isfinite().all()):
            raise NonFiniteError("a denoising error is not finite; try another model.precision")
        return made.numpy()

    def gradients(self, model: nn.Module, latents: Tensor) -> Halves:
        """Returns the gradients of the mean denoising error over all draws, for each half of the pairs."""
        return Halves(*(self._gradient(model, latents, slice(half, None, 2)) for half in (0, 1)))

    def _gradient(self, model: nn.Module, latents: Tensor, half: slice) -> Gradient:
        weights = list(trainable(model).values())
        with torch.enable_grad():
            for draw in self._range:
                for errors in self._batches(model, latents, draw, half):
                    errors.sum().backward()  # the sum, because the gradients of a mean would underflow in fp16
        rows = len(latents[half]) * self._draws
        made = [torch.zeros(w.shape) if w.grad is None else w.grad.float().cpu().contiguous() / rows for w in weights]
        for weight in weights:
            weight.grad = None
        if not all(bool(gradient.isfinite().all()) for gradient in made):
            raise NonFiniteError("the gradient of the denoising error is not finite; try another model.precision")
        return made

    @property
    def _range(self) -> range:
        return range(self._draws)

    def _batches(self, model: nn.Module, latents: Tensor, draw: int, of: slice = slice(None)) -> Iterator[Tensor]:
        """Yields the errors of latents at one draw, on the device, in batches as large as the learner's forward."""
        config, denoiser = self._setup.config.train, self._setup.denoiser
        assert config.micro_batch is not None, "set_up chooses the micro-batch"
        keys = [(index, draw) for index in self._chosen[of]]
        noise = keyed_noise(self._seed, "anchor noise", keys, self._shape)
        numbers, times = tuple(self._chosen[of]), self._times[of, draw]
        every = Pairs(numbers, latents[of], None, times, noise, self._own.take(of))
        for batch in every.micro_batches(2 * config.micro_batch):
            shown = noised(batch, self._setup.family.schedule, denoiser.device)
            prediction = denoiser.denoise(model, *shown[:3])
            yield denoising_errors(prediction, shown.target, backend=config.backend)


@contextmanager
def weights_of(model: nn.Module, saved: SavedState) -> Iterator[float]:
    """Loads a run's policy into the model inside the block (raw weights, not the moving average).

    Yields:
        The policy's distance from the base: |policy - base| / |base|, L2, over the trained weights. For a LoRA the
        difference is the product of its factors, and the base is the weights of the layers that it adapts.

    Raises:
        CheckpointError: the run trained other weights.
    """
    state = trainable_state_dict(model)
    before = {name: tensor.detach().clone() for name, tensor in state.items()}
    load_policy(model, saved)
    try:
        yield _distance(model, before)
    finally:
        for name, tensor in state.items():
            copy_to_shard(tensor, before[name])


@torch.no_grad()
def _distance(model: nn.Module, before: dict[str, Tensor]) -> float:
    layers = [module for module in model.modules() if isinstance(module, LORA_LAYER)]
    if layers:
        changes = [layer.get_delta_weight(name) for layer in layers for name in layer.active_adapters]
        whole = [layer.get_base_layer().weight for layer in layers]
    else:
        changes = [weight - before[name] for name, weight in trainable(model).items()]
        whole = [before[name] for name in trainable(model)]
    return (dot(changes, changes) / dot(whole, whole)) ** 0.5
