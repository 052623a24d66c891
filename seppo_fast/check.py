"""`seppo-fast check`: everything a run would stumble over, found without training."""

from __future__ import annotations

import torch

from seppo_fast.config import Config, to_yaml
from seppo_fast.data.cache import truncation
from seppo_fast.data.clips import ShortClips, short_lines
from seppo_fast.data.scan import scan
from seppo_fast.dial import checkpoints, turn_dial
from seppo_fast.diffusion import NoiseSchedule, Sampler
from seppo_fast.errors import DataError
from seppo_fast.families.load import load_family
from seppo_fast.families.sd import StableDiffusion
from seppo_fast.memory import free_bytes, sampling_footprint, training_footprint
from seppo_fast.objectives import OBJECTIVES
from seppo_fast.policy import DTYPES, make_trainable, trainable
from seppo_fast.preflight import preflight
from seppo_fast.slab import Table


def check(config: Config) -> int:
    """Prints the resolved configuration, the data scan and an estimate of memory and disk.

    Returns:
        0 where a run could start, the exit code of `DataError` where a bad file would be dropped or stop it.

    Raises:
        ConfigError, DataError: as training would.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = turn_dial(config, device)
    print(to_yaml(config))
    objective = OBJECTIVES[config.objective]
    print(f"objective: {objective.source}")
    source = preflight(config, device, processes=1)
    family = load_family(config, torch.device("cpu"))
    NoiseSchedule(family.scheduler_config)
    Sampler(family.scheduler_config, config.sampler)
    shape = family.latent_shape(config.data.resolution)
    short = ShortClips()
    problems = scan(source, losers=objective.needs_pairs, frames=family.frames, short=short)
    for problem in problems:
        print(f"bad: {problem}")
    for note in source.notes:
        print(note)
    for line in short_lines(len(short.repeating), len(short.closer), len(source), family.frames or 0):
        print(line)
    prompts = {example.prompt for example in source}
    for line in truncation(family.too_long(sorted(prompts)), len(prompts)):
        print(line)
    ties = f", {source.ties} ties dropped" if source.ties else ""
    print(f"data: {len(source)} examples, {len(problems)} bad{ties}")
    make_trainable(family.unet, config.model, config.seed)
    text = len(prompts) * family.pipe.tokenizer.model_max_length * family.unet.config.cross_attention_dim
    latents = len(source) * torch.Size(shape).numel() * (2 if objective.needs_pairs else 1)
    prompt_shape = (family.pipe.tokenizer.model_max_length, family.unet.config.cross_attention_dim)
    for line in _memory(config, family, shape, prompt_shape, device):
        print(line)
    print(f"disk: {_size((latents + text) * 4)} for the cache, half of it where a GPU fills it in half precision")
    return DataError.exit_code if problems else 0


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _tier(gib: float | None) -> str:
    return "what is free" if gib is None else _size(int(gib * 2**30))


def _memory(
    config: Config,
    family: StableDiffusion,
    latent_shape: tuple[int, ...],
    prompt_shape: tuple[int, int],
    device: torch.device,
) -> list[str]:
    """What can be counted before a run: weights, gradients, Adam, references, and what batches add."""
    unet = family.unet
    weights = sum(parameter.numel() * parameter.element_size() for parameter in unet.parameters())
    trained = sum(parameter.numel() for parameter in trainable(unet).values())
    states = 2 * trained * (1 if config.train.optimizer == "adamw8bit" else 4)
    average = trained * 4 if config.train.ema_decay else 0
    parked = config.reference.park or (config.reference.park is None and config.memory == "low")
    references = checkpoints(config)
    slab = Table.of(unet, DTYPES[config.model.precision]).size if references else 0
    shapes = (latent_shape, prompt_shape, DTYPES[config.model.precision], device)
    pair = training_footprint(unet, *shapes, denoise=family.denoise)
    sample = sampling_footprint(unet, *shapes, guided=config.sampler.guidance > 1, denoise=family.denoise)
    return [
        f"trained: {trained:,} of {sum(parameter.numel() for parameter in unet.parameters()):,} weights",
        f"device memory: {_size(weights + states + average + (0 if parked else slab))} for weights, "
        f"optimizer{' and a reference' if slab and not parked else ''}",
        f"  and while learning {_size(pair.fixed)} and {_size(pair.per_row)} a pair "
        f"(train.micro_batch = {config.train.micro_batch or 'what fits'})",
        f"  or while sampling {_size(sample.fixed)} and {_size(sample.per_row)} a sample "
        f"(sampler.batch = {config.sampler.batch or 'what fits'})",
        f"  of {_size(free_bytes(device))} free now on {device}",
        f"references: {references} of {_size(slab)}, in GPU memory, else in {_tier(config.reference.host_gib)} of the "
        f"machine's memory, else on {_tier(config.reference.disk_gib)} of disk",
        *([f"host memory: {_size(states + trained * 4)} a process for what is parked"] if parked else []),
    ]
