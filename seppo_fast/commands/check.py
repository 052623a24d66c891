"""`seppo-fast check`: finds what would make a run fail, and estimates its cost, without training."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from seppo_fast.capacity.eta import seconds_of_run
from seppo_fast.capacity.plan import Need, need_of, room_on, size
from seppo_fast.capacity.presets import apply_preset, checkpoints
from seppo_fast.capacity.work import (
    iteration_samples,
    latents_per_sample,
    measures_halves,
    row_latents,
    rows_per_update,
)
from seppo_fast.config.load import to_yaml
from seppo_fast.config.schema import Config
from seppo_fast.data.cache.build import too_many
from seppo_fast.data.cache.opening import truncation
from seppo_fast.data.examples import Example, Problem, Source
from seppo_fast.data.remarks import Remarks, remark_lines
from seppo_fast.data.scan import scan
from seppo_fast.distributed.processes import processes
from seppo_fast.methods.reverse.d3po import PUBLISHED_CLAMP
from seppo_fast.methods.reverse.method import clip_for, steps_of
from seppo_fast.models.denoiser import Denoiser
from seppo_fast.models.family import Family
from seppo_fast.models.registry import family_of, load_family
from seppo_fast.models.trainable import DTYPES, make_trainable, trainable
from seppo_fast.references.layout import PackedLayout
from seppo_fast.train.preflight import preflight
from seppo_fast.utils.errors import DataError
from seppo_fast.utils.progress import duration


def check(config: Config) -> int:
    """Prints the resolved configuration, an estimate of memory, disk and time, and last what is wrong with the data.

    The data are read first, so that their mistakes are also printed if the model cannot be loaded.

    Returns:
        0 if a run could start; the exit code of `DataError` if any file is bad, even if a run would only drop it.

    Raises:
        ConfigError, DataError: as training would raise.
    """
    device = processes().device
    config = apply_preset(config, device)
    print(to_yaml(config))
    print(f"objective: {config.row.source}")
    source = preflight(config, device, processes=1)
    frames = config.data.frames if family_of(config.model).makes_clips else None
    print("reading the data ...", flush=True)
    remarks = Remarks(config.data.resolution)
    problems = scan(source, losers=config.row.needs_pairs, frames=frames, remarks=remarks)
    try:
        for line in _estimate(config, source, problems, device):
            print(line, flush=True)
    finally:
        for line in _findings(config, source, problems, remarks, frames):
            print(line, flush=True)
    return DataError.exit_code if problems else 0


def _usable(source: Source, problems: Sequence[Problem]) -> list[Example]:
    """Returns the examples without a problem."""
    bad = {problem.id for problem in problems}
    return [example for example in source if example.id not in bad]


def _findings(
    config: Config, source: Source, problems: Sequence[Problem], remarks: Remarks, frames: int | None
) -> Iterator[str]:
    """Yields the lines about the data: notes, remarks on the usable examples, each bad example, and the counts."""
    usable = _usable(source, problems)
    pictures = len(usable) * (1 + (config.row.needs_pairs and source.has_losers))
    yield from source.notes
    found = remarks.of([example.id for example in usable])
    yield from remark_lines(found, pictures, config.data.resolution, frames)
    for problem in problems:
        yield f"bad: {problem}"
    ties = f", {source.ties} ties dropped" if source.ties else ""
    total = len(source) + len(source.problems)
    rest = f", {len(usable)} usable" if problems else ""
    yield f"data: {total} examples, {len(problems)} bad{rest}{ties}"
    if problems:
        refused = too_many(problems, total)
        yield "a run refuses more than 1 % of bad examples: fix or remove them" if refused else "a run leaves them out"


def _estimate(config: Config, source: Source, problems: Sequence[Problem], device: torch.device) -> Iterator[str]:
    """Yields the lines about the model, and estimates of memory, disk and time.

    Raises:
        ConfigError: the model cannot be loaded, or does not support a setting.
    """
    family = load_family(config, device)
    shape = family.latent_shape(config.data.resolution)
    family.sampler(config.sampler, shape)
    usable = _usable(source, problems)
    prompts = {example.prompt for example in usable}
    if config.row.reward is not None:
        yield from _rewarded(config, len(prompts))
    if config.row.process == "reverse":
        yield from _reverse(config, family, math.prod(shape))
    yield from truncation(family.too_long(sorted(prompts)), len(prompts))
    room = room_on(device)
    need = need_of(config, family, device, room)
    yield f"device memory ({size(room)} available on {device.type}):"
    yield from need.table()
    if config.scorer is not None:
        counted = "its weights are in the table, but " if need.judge else ""
        yield f"{config.scorer[0]}: {counted}the memory and time of its scoring are not estimated"
    yield from _places(config, family, need, device)
    if config.row.reward is not None:
        yield _samples_in_host_memory(config, family, math.prod(shape))
    text = len(prompts) * sum(tensor.numel() for tensor in family.example_row().values())
    latents = len(usable) * torch.Size(shape).numel() * (2 if config.row.needs_pairs else 1)
    yield f"disk: {size((latents + text) * 4)} for the cache, or half of that if a GPU fills it in half precision"
    states = need.trained + need.moments + need.average
    yield f"disk: {size(config.save.keep * states)} for {config.save.keep} saved states, plus the past policies once"
    if config.row.replay:
        samples = config.train.updates * config.train.pairs_per_update * torch.Size(shape).numel()
        yield f"disk: {size(4 * samples)} for the samples of all iterations"
    denoiser = Denoiser(family, DTYPES[config.model.precision])
    seconds = seconds_of_run(config, need, family, denoiser)
    yield (
        f"eta: about {duration(seconds)} for {config.train.updates} updates on one {device.type} like this one, "
        "extrapolated from a few timed forwards"
    )


def _rewarded(config: Config, prompts: int) -> Iterator[str]:
    """Yields lines on what an update and an iteration of an objective with a reward consist of.

    Args:
        config: the run's configuration.
        prompts: number of different prompts in the data.
    """
    train, rl, each, own = config.train, config.rl, config.samples_per_prompt, config.prompts_per_update
    most = "up to " if config.row.reward == "steps" else ""
    yield (
        f"an update: {own * each} samples ({own} prompts, {each} each), {most}{rows_per_update(config)} rows; an "
        f"iteration: {iteration_samples(config)} samples, made before its {train.updates_per_iteration} updates"
    )
    seen = train.updates * own * each / max(1, prompts)
    keeps_rewards = config.row.loss == "policy-gradient" and config.row.samples_per_prompt == 1  # DDPO, not GRPO
    if keeps_rewards and seen < rl.prompt_count:
        yield (
            f"the run samples each of {prompts} prompts {seen:.2g} times, less often than rl.prompt_count = "
            f"{rl.prompt_count}: rewards are compared with those of the whole iteration, not of the prompt; use fewer "
            "prompts, or more rl.samples_per_prompt"
        )


def _reverse(config: Config, family: Family, numbers: int) -> Iterator[str]:
    """Yields lines on the steps that are trained, and on the clip range in effect.

    Args:
        config: the run's configuration.
        family: the model.
        numbers: how many numbers a latent has.

    Raises:
        ConfigError: the pipeline's scheduler has no such steps, or no step is left to train.
    """
    rl = config.rl
    steps, trained = steps_of(config, family)
    each = max(1, round(rl.steps * len(trained)))
    yield f"steps: {len(steps)}, {sum(step.sigma > 0 for step in steps)} of them random; {each} trained per sample"
    yield from (f"steps: {remark}" for remark in family.remarks_on_end(config.sampler, steps))
    if config.row.loss == "policy-gradient":
        rule = f"the rule 1e-4 sqrt(16384 / N) for latents of N = {numbers} numbers"
        yield (
            f"rl.clip: {clip_for(numbers):.3g}, by {rule}"
            if rl.clip is None
            else f"rl.clip: {rl.clip:.3g}, as set; {rule} gives {clip_for(numbers):.3g}"
        )
    else:
        yield f"rl.clip: ratios to the initial policy are clamped to 1 +- {rl.clip or PUBLISHED_CLAMP:.3g}"


def _samples_in_host_memory(config: Config, family: Family, numbers: int) -> str:
    """Returns the line on the host memory of an iteration's samples; `numbers` is the size of a latent."""
    latent, each = 4 * numbers, latents_per_sample(config)
    samples = iteration_samples(config)
    line = (
        f"host memory: {size(samples * each * latent)} for an iteration's samples (latents per sample: {each}), shared "
        "by the processes; in a file in data.cache if a process's share exceeds reference.pairs_gib"
    )
    rows = row_latents(config) * latent
    if config.row.process == "forward":
        text = 4 * sum(tensor.numel() for tensor in family.example_row().values())
        rows += rows_per_update(config) * config.train.updates_per_iteration * text
    return line + (f"; {size(rows)} for rows and predictions" if rows else "")


def _places(config: Config, family: Family, need: Need, device: torch.device) -> Iterator[str]:
    """Yields lines that say where past policies are stored and what else host memory holds."""
    every = sum(weight.numel() for weight in family.model.parameters())
    make_trainable(family.model, config.model, config.seed, family)
    yield f"trained: {sum(weight.numel() for weight in trainable(family.model).values()):,} of {every:,} weights"
    references = checkpoints(config)
    slab = PackedLayout.of(family.model, DTYPES[config.model.precision]).size if references else 0
    first = "GPU memory, then in " if device.type == "cuda" else ""
    yield (
        f"past policies: {references} of {size(slab)} each, in {first}host memory (up to "
        f"{_tier(config.reference.host_gib)}), then on disk (up to {_tier(config.reference.disk_gib)})"
    )
    if device.type == "cuda" and measures_halves(config):
        yield f"host memory: {size(need.trained)} per process for the winners' gradient (log.health_every)"
    if need.parked:
        yield f"host memory: {size(need.moments + need.trained)} per process for parked optimizer state and weights"


def _tier(gib: float | None) -> str:
    return "a share of what is free" if gib is None else size(gib * 2**30)
