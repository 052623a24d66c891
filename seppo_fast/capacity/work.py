"""Counts an update's work from the configuration alone: rows, forwards, decoded samples, and latents in host memory.

What `train.pairs_per_update` counts depends on the objective, see `Objective.unit`: "a unit" below is one of these. For
objectives that learn from a reward, counts are upper bounds: what teaches nothing is left out of an update.
"""

from __future__ import annotations

from typing import NamedTuple

from seppo_fast.config.objectives import OFFSET_ROWS
from seppo_fast.config.schema import Config

_BACKWARD = 2  # FLOP of a backward, relative to a forward


class Forwards(NamedTuple):
    """The network's work per unit, in forwards of one row; guidance doubles the rows.

    Attributes:
        without_gradient: those of past policies, and of the policy itself without a gradient.
        trained: the policy's forwards that have a backward.
    """

    without_gradient: float
    trained: float


def measures_halves(config: Config) -> bool:
    """Returns whether a run measures the gradients of winners and losers separately (`log.health_every`)."""
    return bool(config.log.health_every) and config.row.negatives is not None


def trained_steps(config: Config) -> int:
    """Returns how many steps of the sampler are trained per sample; 1 if the objective trains on noised data."""
    rl, steps = config.rl, config.sampler.steps
    if config.row.process == "forward":
        return 1
    if config.row.reward == "steps":
        return steps - rl.plain_steps
    random = steps if rl.window is None else rl.window[1] - rl.window[0] + 1
    return max(1, round(rl.steps * random))


def network_rows(config: Config) -> int:
    """Returns the rows of the network per row of a micro-batch: a pair's two latents, or one, doubled by guidance."""
    latents = 2 if config.row.negatives is not None or _compares_samples(config) else 1
    return latents * (guided_rows(config) if config.row.process == "reverse" else 1)


def guided_rows(config: Config) -> int:
    """Returns the rows of the network per guided prediction: 2, or 1 without guidance."""
    return 2 if config.sampler.guidance > 1 else 1


def rows_per_update(config: Config) -> int:
    """Returns the rows of an update's micro-batches, over all processes."""
    return config.train.pairs_per_update * trained_steps(config) // (2 if _compares_samples(config) else 1)


def _compares_samples(config: Config) -> bool:
    """Returns whether a row is a step of two samples, as in D3PO."""
    return config.row.loss == "step-preference" and config.row.reward == "final"


def forwards(config: Config) -> Forwards:
    """Returns the work per unit: rollout, errors of past policies, and training the policy.

    KTO's offset takes one more forward of some rows: of the policy, and of the reference too if its errors are not
    computed ahead.
    """
    objective = config.row
    if objective.reward is not None:
        return _of_rewards(config)
    rows = network_rows(config)
    passes = 1 + 1 / config.log.health_every if measures_halves(config) else 1
    sampled = config.sampler.steps * guided_rows(config) / config.reference.uses
    offset = 0.0
    if objective.loss == "kto":
        models = 1 if config.reference.errors == "ahead" else 2
        offset = models * min(1.0, OFFSET_ROWS / config.train.pairs_per_update)
    return Forwards(
        without_gradient=(sampled if objective.negatives == "generated" else 0)
        + offset
        + (rows if objective.draw else 0),
        trained=rows * passes,
    )


def _of_rewards(config: Config) -> Forwards:
    rl, guided, trained = config.rl, guided_rows(config), trained_steps(config)
    sampled = config.sampler.steps
    if config.row.reward == "steps":
        # The forward before a step also judges the candidates that the step may start from.
        sampled = 1 + rl.plain_steps + (trained - 1) * rl.candidates
    rows = trained * guided if config.row.process == "reverse" else 1
    length = config.train.updates_per_iteration
    # An iteration's first update trains the very policy that sampled.
    old = 0.0 if config.row.loss == "step-preference" else (length - 1) / length
    initial = 1 if rl.kl or config.row.loss == "step-preference" else 0
    return Forwards(sampled * guided / config.reference.uses + rows * (old + initial), rows)


def forwards_per_pair(config: Config) -> float:
    """Returns the work per unit in forwards of one row; a backward counts as two forwards."""
    made = forwards(config)
    again = 1 if config.model.gradient_checkpointing else 0
    return made.without_gradient + made.trained * (1 + _BACKWARD + again)


def decodes_per_pair(config: Config) -> float:
    """Returns how many latents a scorer has decoded per unit; a judge also sees each sample's winner."""
    if config.row.reward == "steps":
        return trained_steps(config) * config.rl.candidates
    seen = 1 if config.row.reward is not None else 2 if config.reference.judge is not None else 0
    return seen / config.reference.uses


def iteration_samples(config: Config) -> int:
    """Returns the number of samples of an iteration, over all processes, for objectives that learn from a reward."""
    return config.prompts_per_update * config.samples_per_prompt * config.train.updates_per_iteration


def latents_per_sample(config: Config) -> int:
    """Returns how many latents a rewarded sample leaves in host memory until the iteration's end."""
    if config.row.process == "forward":
        return 1
    # For each compared step: where it starts, the best and the worst candidate.
    return 3 * trained_steps(config) if config.row.reward == "steps" else config.sampler.steps + 1


def row_latents(config: Config) -> float:
    """Returns how many more latents the rows of an iteration take, over all processes: predictions.

    Rows only refer to samples. Those of DiffusionNFT have the prediction of the policy that sampled, except in an
    iteration's first update. `rl.kl` adds the initial policy's prediction.
    """
    length = config.train.updates_per_iteration
    rows = rows_per_update(config) * length
    initial = rows if config.rl.kl else 0
    return initial + (rows * (length - 1) / length if config.row.loss == "nft" else 0)
