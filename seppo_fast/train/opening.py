"""What a configuration asks for beside its model, opened: the pool of past policies and the cache of the data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator

from seppo_fast.config.objectives import OBJECTIVES
from seppo_fast.config.schema import Config
from seppo_fast.data.cache.latents import LatentCache
from seppo_fast.data.cache.opening import open_or_build
from seppo_fast.data.examples import Source
from seppo_fast.distributed.processes import node_of
from seppo_fast.models.family import Family
from seppo_fast.models.trainable import DTYPES
from seppo_fast.references.pool import ReferencePool
from seppo_fast.references.tiers import Budget


def open_pool(config: Config, accelerator: Accelerator) -> ReferencePool:
    """The empty pool of past policies of a configuration."""
    draw = OBJECTIVES[config.objective].draw
    assert draw is not None

    def size(gib: float | None) -> int | None:
        return None if gib is None else int(gib * 2**30)

    reference = config.reference
    newest = draw == "newest"  # no other one will ever be drawn
    return ReferencePool(
        config.seed,
        draw,
        keep=2 if newest else reference.keep,
        rule="newest" if newest else reference.keep_rule,
        compute=DTYPES[config.model.precision],
        budget=Budget(size(reference.gpu_gib), size(reference.host_gib), size(reference.disk_gib)),
        folder=Path(config.data.cache),
        node=node_of(accelerator),
    )


def open_cache(
    config: Config,
    source: Source,
    family: Family,
    report: Callable[[str], object] = print,
    accept: Callable[[str, str], object] = lambda fingerprint, former: None,
) -> LatentCache:
    """The latent and prompt cache of a configuration, built where it is not there yet; see `open_or_build`.

    Raises:
        ConfigError: a resolution that the model does not take.
        DataError: see `seppo_fast.data`.
    """
    family.latent_shape(config.data.resolution)
    cache = open_or_build(
        source,
        family,
        resolution=config.data.resolution,
        frames=family.frames,
        flip=config.data.flip,
        folder=Path(config.data.cache),
        losers=OBJECTIVES[config.objective].needs_pairs,
        report=report,
        accept=accept,
    )
    family.park_encoders()
    return cache
