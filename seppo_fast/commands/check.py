"""`seppo-fast check`: finds what would make a run fail, and estimates its cost, without training."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from seppo_fast.capacity.batches import measures_halves
from seppo_fast.capacity.eta import seconds_of_run
from seppo_fast.capacity.plan import Need, need_of, room_on, size
from seppo_fast.capacity.presets import apply_preset, checkpoints
from seppo_fast.config.load import to_yaml
from seppo_fast.config.schema import Config
from seppo_fast.data.cache.opening import truncation
from seppo_fast.data.remarks import Remarks, remark_lines
from seppo_fast.data.scan import scan
from seppo_fast.distributed.processes import processes
from seppo_fast.models.denoiser import Denoiser
from seppo_fast.models.family import Family
from seppo_fast.models.registry import load_family
from seppo_fast.models.trainable import DTYPES, make_trainable, trainable
from seppo_fast.references.layout import PackedLayout
from seppo_fast.train.preflight import preflight
from seppo_fast.utils.errors import DataError
from seppo_fast.utils.progress import duration


def check(config: Config) -> int:
    """Prints the resolved configuration, the result of the data scan, and an estimate of memory, disk and time.

    Returns:
        0 if a run could start; the exit code of `DataError` if any file is bad, even if a run would only drop it.

    Raises:
        ConfigError, DataError: as training would raise.
    """
    device = processes().device
    config = apply_preset(config, device)
    print(to_yaml(config))
    objective = config.row
    print(f"objective: {objective.source}")
    source = preflight(config, device, processes=1)
    family = load_family(config, device)
    shape = family.latent_shape(config.data.resolution)
    family.sampler(config.sampler, shape)
    remarks = Remarks(config.data.resolution)
    problems = scan(source, losers=objective.needs_pairs, frames=family.frames, remarks=remarks)
    for problem in problems:
        print(f"bad: {problem}")
    for note in source.notes:
        print(note)
    pictures = len(source) * (1 + (objective.needs_pairs and source.has_losers))
    found = remarks.of([example.id for example in source])
    for line in remark_lines(found, pictures, config.data.resolution, family.frames):
        print(line)
    prompts = {example.prompt for example in source}
    for line in truncation(family.too_long(sorted(prompts)), len(prompts)):
        print(line)
    ties = f", {source.ties} ties dropped" if source.ties else ""
    print(f"data: {len(source) + len(source.problems)} examples, {len(problems)} bad{ties}")
    room = room_on(device)
    need = need_of(config, family, device, room)
    print(f"device memory ({size(room)} available on {device.type}):")
    print("\n".join(need.table()))
    for line in _places(config, family, need, device):
        print(line)
    text = len(prompts) * sum(tensor.numel() for tensor in family.example_row().values())
    latents = len(source) * torch.Size(shape).numel() * (2 if objective.needs_pairs else 1)
    print(f"disk: {size((latents + text) * 4)} for the cache, or half of that if a GPU fills it in half precision")
    states = need.trained + need.moments + need.average
    print(f"disk: {size(config.save.keep * states)} for {config.save.keep} saved states, plus the past policies once")
    denoiser = Denoiser(family, DTYPES[config.model.precision])
    seconds = seconds_of_run(config, need, family, denoiser)
    print(
        f"eta: about {duration(seconds)} for {config.train.updates} updates on one {device.type} like this one, "
        "estimated from timed forwards"
    )
    return DataError.exit_code if problems else 0


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
