"""SPO: at each step several candidates are compared by what they would become; the trajectory continues from one."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from seppo_fast.diffusion.conditioning import Conditioning
from seppo_fast.methods.generation import Keys
from seppo_fast.methods.parts import MethodParts
from seppo_fast.methods.reverse.d3po import StepPreference
from seppo_fast.methods.reverse.transitions import Transitions
from seppo_fast.methods.rewards.method import Groups, Iteration, reward_statistics
from seppo_fast.utils.random import keyed_noise, keyed_rng


class SpoMethod(StepPreference):
    """Trains on the best and the worst of several candidates for the next latent.

    The candidates of a step share its mean. Each is judged by the clean latents that the model predicts from it, with
    the forward that the next step needs anyway; at the last step the candidates themselves are judged. The published
    preference model also sees the time; an ordinary scorer sees only the picture.

    Args:
        parts: the run's parts.
    """

    def __init__(self, parts: MethodParts) -> None:
        super().__init__(parts)
        self._candidates = parts.config.rl.candidates
        self._found: dict[tuple[int, ...], tuple[np.ndarray, np.ndarray]] = {}

    def _sample(self, model: nn.Module, keys: Keys) -> Tensor:
        """Returns `(B, compared steps, 3, *latent)`: x_t, the best and the worst candidate, float32 on the CPU."""
        noise, conditioning, uncond = self._maker.generation(keys)
        device = self._parts.denoiser.device
        predict = partial(self._next, model, conditioning.to(device), uncond.to(device))
        latents = noise.to(device)
        gaps, finals, kept = [], np.empty(0), []
        with torch.no_grad():
            prediction = predict(latents, 0)
            for index, step in enumerate(self._steps):
                mean = step.mean(latents, prediction)
                if index not in self._trained_steps:
                    latents = mean + step.sigma * self._noise(keys, index, 0).to(device)
                    prediction = predict(latents, index + 1)
                    continue
                made = torch.stack([mean + step.sigma * self._noise(keys, index, k).to(device) for k in self._range])
                last = index + 1 == len(self._steps)
                predictions = None if last else torch.stack([predict(one, index + 1) for one in made])
                scores = self._scores(keys, made if predictions is None else self._clean(made, predictions, index + 1))
                best, worst, gap = best_and_worst(scores)
                rows = torch.arange(len(keys))
                kept.append(torch.stack([latents, made[best, rows], made[worst, rows]], 1).cpu())
                gaps.append(gap)
                finals = scores
                chosen = torch.tensor([self._branch(key, index) for key in keys])
                latents = made[chosen, rows]
                prediction = latents if predictions is None else predictions[chosen, rows]
        for row, key in enumerate(keys):
            self._found[key] = np.array([gap[row] for gap in gaps]), finals[:, row]
        return torch.stack(kept, dim=1)

    @property
    def _range(self) -> range:
        return range(self._candidates)

    def _next(
        self, model: nn.Module, conditioning: Conditioning, uncond: Conditioning, latents: Tensor, index: int
    ) -> Tensor:
        """Returns the guided prediction before a step, `(B, *latent)` float32."""
        times = torch.full((len(latents),), self._steps[index].timestep, device=latents.device)
        guidance = self._config.sampler.guidance
        return self._parts.denoiser.guided(model, latents, times, conditioning, uncond, guidance)

    def _noise(self, keys: Keys, index: int, candidate: int) -> Tensor:
        shape = self._parts.cache.latent_shape
        return keyed_noise(self._config.seed, "sde", [(*key, candidate, index) for key in keys], shape)

    def _branch(self, key: tuple[int, ...], index: int) -> int:
        """Returns the candidate from which a trajectory continues."""
        return int(keyed_rng(self._config.seed, "branch", *key, index).integers(self._candidates))

    def _clean(self, candidates: Tensor, predictions: Tensor, index: int) -> Tensor:
        """Returns what the candidates `(n, B, *latent)` would become, by the predictions before step `index`."""
        flat, predicted = candidates.flatten(0, 1), predictions.flatten(0, 1)
        times = torch.full((len(flat),), self._steps[index].timestep)
        return self._parts.family.schedule.clean(flat, predicted, times).view_as(candidates)

    def _scores(self, keys: Keys, latents: Tensor) -> np.ndarray:
        """Returns the scores of latents `(n, B, *latent)`: `(n, B)` float64, NaN where one is missing."""
        self._parts.interruption.check()
        prompts = [self._prompt(key) for key in keys] * len(latents)
        (scores,) = self._score(prompts, latents.flatten(0, 1))
        return scores.reshape(len(latents), len(keys))

    def _reward(self, window: range, keys: Keys, samples: Tensor) -> Groups:
        """Returns the gaps between best and worst candidate of each compared step, NaN where a score is missing."""
        found = [self._found[key] for key in keys]
        self._found = {}
        gaps = self._gathered(window, np.stack([gap for gap, _ in found]))
        finals = self._gathered(window, np.stack([scores for _, scores in found]))
        rewards = reward_statistics(self._sign * np.stack(list(finals.values())))
        every = np.stack(list(gaps.values()))
        self._rewards = rewards | {"gap": float(np.mean(every[~np.isnan(every)])) if not np.isnan(every).all() else 0.0}
        return gaps

    def _advantages(self, begin: int, rewards: Groups) -> Groups:
        """Returns 1 for each step whose candidates differ by more than `rl.gap`, and NaN for the others."""
        least = self._config.rl.gap
        # NaN compares as false.
        return {place: np.where(gaps > least, 1.0, np.nan) for place, gaps in rewards.items()}

    def _batch(self, made: Iteration, update: int) -> Transitions:
        kept = made.advantages.reshape(len(made.keys), len(self._trained_steps))
        rows = [
            ([place], step)
            for place, key in enumerate(made.keys)
            if key[0] == update
            for column, step in enumerate(self._trained_steps)
            if not np.isnan(kept[place, column])
        ]
        return self._transitions(made, update, rows, total=made.counts[update], advantage=torch.ones(len(rows)))

    def _places(self, samples: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        compared = torch.tensor([self._trained_steps.index(number) for number in step.tolist()])
        now = 3 * (samples * len(self._trained_steps) + compared[:, None])
        return now, torch.stack([now + 1, now + 2], dim=2)


def best_and_worst(scores: np.ndarray) -> tuple[Tensor, Tensor, np.ndarray]:
    """Returns which of n candidates is best and which is worst, and by how much they differ.

    Args:
        scores: `(n, B)`; higher is better. NaN where one is missing.

    Returns:
        Two int64 tensors `(B,)`, and `(B,)` float64: NaN if a score is missing. Of equal scores the first counts.
    """
    missing = np.isnan(scores).any(0)
    known = np.where(missing, 0.0, scores)
    best, worst = known.argmax(0), known.argmin(0)
    gap = np.where(missing, np.nan, known.max(0) - known.min(0))
    return torch.from_numpy(best), torch.from_numpy(worst), gap
