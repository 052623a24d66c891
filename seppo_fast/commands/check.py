"""`seppo-fast check`: everything a run would stumble over, found without training."""

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
from seppo_fast.references.layout import Table
from seppo_fast.train.preflight import preflight
from seppo_fast.utils.errors import DataError
from seppo_fast.utils.progress import duration


def check(config: Config) -> int:
    """Prints the resolved configuration, the data scan and an estimate of memory and disk.

    Returns:
        0 where a run could start, the exit code of `DataError` where a bad file would be dropped or stop it.

    Raises:
        ConfigError, DataError: as training would.
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
    print(f"device memory, of {size(room)} on {device.type}:")
    print("\n".join(need.table()))
    for line in _places(config, family, need, device):
        print(line)
    text = len(prompts) * sum(tensor.numel() for tensor in family.example_row().values())
    latents = len(source) * torch.Size(shape).numel() * (2 if objective.needs_pairs else 1)
    print(f"disk: {size((latents + text) * 4)} for the cache, half of it where a GPU fills it in half precision")
    states = need.trained + need.moments + need.average
    print(f"disk: {size(config.save.keep * states)} for {config.save.keep} saved states, and the past policies once")
    denoiser = Denoiser(family, DTYPES[config.model.precision])
    seconds = seconds_of_run(config, need, family, denoiser)
    print(
        f"eta: about {duration(seconds)} on one such {device.type} for {config.train.updates} updates, by one forward"
    )
    return DataError.exit_code if problems else 0


def _places(config: Config, family: Family, need: Need, device: torch.device) -> Iterator[str]:
    """Where past policies go, and what waits in host memory."""
    every = sum(weight.numel() for weight in family.model.parameters())
    make_trainable(family.model, config.model, config.seed, family)
    yield f"trained: {sum(weight.numel() for weight in trainable(family.model).values()):,} of {every:,} weights"
    references = checkpoints(config)
    slab = Table.of(family.model, DTYPES[config.model.precision]).size if references else 0
    first = "GPU memory, else in " if device.type == "cuda" else ""
    yield (
        f"past policies: {references} of {size(slab)}, in {first}{_tier(config.reference.host_gib)} of "
        f"the machine's memory, else on {_tier(config.reference.disk_gib)} of disk"
    )
    if device.type == "cuda" and measures_halves(config):
        yield f"host memory: {size(need.trained)} a process for a gradient put aside (log.health_every)"
    if need.parked:
        yield f"host memory: {size(need.moments + need.trained)} a process for what is parked"


def _tier(gib: float | None) -> str:
    return "what is free" if gib is None else size(gib * 2**30)
