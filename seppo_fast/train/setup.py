"""Sets up a run, in an order that finds a user's mistakes as cheaply as possible."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from seppo_fast.capacity.presets import apply_preset, fit_to_device
from seppo_fast.config.schema import Config
from seppo_fast.data.cache.latents import LatentCache
from seppo_fast.data.cache.opening import open_or_build
from seppo_fast.data.examples import Source
from seppo_fast.diffusion.sampler import Sampler
from seppo_fast.distributed.fsdp import shard, sharding_asked, validate_fsdp_config
from seppo_fast.distributed.machine import Node
from seppo_fast.distributed.processes import Processes
from seppo_fast.methods.reverse.method import steps_of
from seppo_fast.models.denoiser import Denoiser
from seppo_fast.models.family import Family
from seppo_fast.models.registry import load_family
from seppo_fast.models.trainable import DTYPES, compile_blocks, make_trainable
from seppo_fast.references.pool import ReferencePool
from seppo_fast.references.tiers import Budget
from seppo_fast.runs.checkpoint import SavedState
from seppo_fast.runs.resume import refuse_other_content, resumed_config
from seppo_fast.scorers.registry import load_scorer
from seppo_fast.scorers.scorer import Scorer
from seppo_fast.train.preflight import preflight
from seppo_fast.utils.errors import ConfigError, OutOfMemoryError
from seppo_fast.utils.memory import is_out_of_memory


@dataclass(frozen=True)
class Setup:
    """The parts of a run that are made before its method and its learner.

    Attributes:
        asked: the configuration as requested.
        config: the configuration with everything that was left open filled in.
        family: the loaded model. If the policy is sharded, `family.model` is a plain network for references.
        policy: the network being trained: `family.model`, or the sharded network.
        cache: latents and conditioning of the training data.
        denoiser: the forward pass that policy and references share.
        sampler: generates samples.
        fingerprints: digests of the model, of the data, and of the judge or the reward if there is one.
        judge: the scorer that `reference.judge` or `rl.reward` names; None without one.
    """

    asked: Config
    config: Config
    family: Family
    policy: nn.Module
    cache: LatentCache
    denoiser: Denoiser
    sampler: Sampler
    fingerprints: dict[str, str]
    judge: Scorer | None


def set_up(config: Config, processes: Processes, saved: SavedState | None) -> Setup:
    """Checks a configuration, loads its model and its data, and chooses what it leaves open.

    Args:
        config: the configuration as requested.
        processes: the run's processes.
        saved: the state to resume from; None for a new run.

    Raises:
        ConfigError, DataError, CheckpointError: the message says what is wrong, and what to do.
    """
    device = processes.device
    if sharding_asked():
        config = validate_fsdp_config(config, processes.world)
    asked = config
    if saved is not None:
        config = resumed_config(config, saved)
    config = apply_preset(config, device)
    source = preflight(config, device, processes.world)
    family = load_family(config, device)
    if config.row.process == "reverse":
        steps_of(config, family)  # before the data are encoded, since it may refuse the model's scheduler
    judge = _judge(config, device)
    fingerprints = {"model": family.identity()}
    if judge is not None:
        fingerprints["judge" if config.row.reward is None else "reward"] = judge.digest
    if saved is not None:
        refuse_other_content(saved, {name: (digest,) for name, digest in fingerprints.items()})
    cache = _shared_cache(config, source, family, processes, saved)
    fingerprints["data"] = cache.fingerprint
    if not processes.same(fingerprints):
        raise ConfigError("model.path, data.source, data.cache: ranks see different model, data or scorer files")
    config, policy = _policy(config, family, processes)
    return Setup(
        asked=asked,
        config=config,
        family=family,
        policy=policy,
        cache=cache,
        denoiser=Denoiser(family, DTYPES[config.model.precision]),
        sampler=family.sampler(config.sampler, cache.latent_shape),
        fingerprints=fingerprints,
        judge=judge,
    )


def _judge(config: Config, device: torch.device) -> Scorer | None:
    """Loads the run's scorer, judge or reward; its networks stay on the device, in float16 on a GPU."""
    if config.scorer is None:
        return None
    _, name, folder = config.scorer
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    return load_scorer(name, device, dtype, None if folder is None else Path(folder))


def _shared_cache(
    config: Config, source: Source, family: Family, processes: Processes, saved: SavedState | None
) -> LatentCache:
    """Returns the cache, which the first process fills and all processes then read."""

    def accept(*data: str) -> None:
        if saved is not None:
            refuse_other_content(saved, {"data": data})

    with processes.first_alone(), _encoding(config):
        family.latent_shape(config.data.resolution)
        cache = open_or_build(
            source,
            family,
            resolution=config.data.resolution,
            frames=family.frames,
            flip=config.data.flip,
            folder=Path(config.data.cache),
            losers=config.row.needs_pairs,
            accept=accept,
        )
        family.park_encoders()
    processes.barrier(patient=True)  # patient, since each process reads all of the data to compute its digest
    return cache


@contextmanager
def _encoding(config: Config) -> Iterator[None]:
    """Turns running out of memory inside the block into an error that names the setting that matters there."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        problem = (str(error).splitlines() or ["allocation failed"])[0]
        raise OutOfMemoryError(
            f"out of memory while encoding data.source at data.resolution = {config.data.resolution}: {problem}; set a "
            "smaller data.resolution (Stable Diffusion 1.5 was made for 512)"
        ) from error


def _policy(config: Config, family: Family, processes: Processes) -> tuple[Config, nn.Module]:
    """Returns the configuration that fits the network and the machine, and the network being trained, on its device."""
    policy, device = family.model, processes.device
    make_trainable(policy, config.model, config.seed, family)
    # 8-bit AdamW makes weights contiguous in its first step, after which the forward would round differently. Sharding
    # requires contiguous weights.
    plain = config.train.optimizer == "adamw8bit" or sharding_asked()
    layout = torch.contiguous_format if plain else family.memory_format
    policy.to(device, memory_format=layout)  # type: ignore[call-overload]
    config = fit_to_device(config, family, processes)
    assert config.model.attention != "auto", "model.attention must be chosen by now"
    family.set_attention(policy, config.model.attention)
    if config.model.temporal_attention == "triton":
        family.set_temporal_attention(policy, "triton")
    if sharding_asked():
        family.model = shard(policy, family.sharded, device)
    if config.model.compile:
        compile_blocks(policy, config.model.attention, family)
    return config, policy


def open_pool(config: Config, machine: Node) -> ReferencePool | None:
    """Returns an empty pool for the run's past policies, or None if its method has no reference.

    Args:
        config: the run's configuration.
        machine: the run's processes; those on the same machine share one copy of the past policies.
    """
    draw = config.row.draw
    if draw is None:
        return None

    def size(gib: float | None) -> int | None:
        return None if gib is None else int(gib * 2**30)

    reference = config.reference
    newest = draw == "newest"  # older ones will never be drawn
    return ReferencePool(
        config.seed,
        draw,
        keep=2 if newest else reference.keep,
        rule="newest" if newest else reference.keep_rule,
        compute=DTYPES[config.model.precision],
        budget=Budget(size(reference.gpu_gib), size(reference.host_gib), size(reference.disk_gib)),
        folder=Path(config.data.cache),
        node=machine,
    )
