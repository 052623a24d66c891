"""Counts the memory that a run needs, by part and phase, and suggests settings that need less.

The bytes of weights and their copies are known; what a batch adds is counted on tensors without data (see
`seppo_fast.capacity.footprint`). So the count also works at the moment when memory has run out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import psutil  # type: ignore[import-untyped]
import torch
from torch import nn

from seppo_fast.capacity.batches import MEMORY_PRESETS, BatchRoom, measures_halves
from seppo_fast.capacity.footprint import Footprint, round_trip_bytes, sampling_footprint, training_footprint
from seppo_fast.capacity.presets import filled, learner_bytes, pool_bytes, trained_bytes
from seppo_fast.config.schema import Config
from seppo_fast.data.cache.build import encoded_at_once
from seppo_fast.models.family import Family
from seppo_fast.models.trainable import DTYPES, make_trainable
from seppo_fast.runs.checkpoint import saved_states
from seppo_fast.scorers.registry import weight_count
from seppo_fast.utils.errors import CheckpointError, ConfigError, OutOfMemoryError
from seppo_fast.utils.memory import free_bytes

_SHARE = 0.9  # suggestions may fill this share of the available memory, or of the need that was too large
_SUGGESTIONS = 3
_NOTHING_FITS = "none of the settings tried (smaller batches, recomputation and others) would be enough"


@dataclass(frozen=True)
class Need:
    """The bytes that a run needs on its device, by what takes them.

    Attributes:
        weights: the network's weights, trained and frozen.
        trained: the trained weights.
        moments: Adam's moments.
        average: the moving average of the trained weights.
        references: the past policies that stay on the device, and the resident one.
        pair: what a micro-batch adds while learning: fixed bytes, gradients included, and bytes per pair.
        sample: what a sampling batch adds: fixed bytes, and bytes per sample.
        micro_batch: number of pairs in a micro-batch.
        batch: number of samples in a sampling batch.
        parked: whether moments and trained weights are in host memory while sampling.
        aside: the winners' gradient that `log.health_every` stores; it is in host memory, so 0 on a GPU.
        round_trip: what decoding and encoding samples takes, after sampling; 0 without `sampler.round_trip` and
            without a judge, which also has samples decoded.
        judge: the weights of the scorer `reference.judge`. What its scoring adds to them is not counted.
    """

    weights: int
    trained: int
    moments: int
    average: int
    references: int
    pair: Footprint
    sample: Footprint
    micro_batch: int
    batch: int
    parked: bool
    aside: int = 0
    round_trip: int = 0
    judge: int = 0

    @property
    def learning(self) -> int:
        """Bytes at the peak of an update."""
        return self._kept + self.aside + self.pair.fixed + self.micro_batch * self.pair.per_row

    @property
    def sampling(self) -> int:
        """Bytes at the peak of a rollout."""
        aside = self.moments + self.trained if self.parked else 0
        return self._kept - aside + max(self.sample.fixed + self.batch * self.sample.per_row, self.round_trip)

    @property
    def _kept(self) -> int:
        return self.weights + self.judge + self.moments + self.average + self.references

    @property
    def peak(self) -> int:
        """The larger of `learning` and `sampling`."""
        return max(self.learning, self.sampling)

    def table(self) -> list[str]:
        """Returns the lines of a table of what takes the memory."""
        away = "in host memory while sampling" if self.parked else ""
        rows = [
            ("weights", self.weights, ""),
            *([("judge", self.judge, "weights of reference.judge")] if self.judge else []),
            ("Adam's moments", self.moments, away),
            ("moving average", self.average, ""),
            ("past policies", self.references, ""),
            ("gradients and casts", self.pair.fixed, "while learning"),
            *([("winners' gradient", self.aside, "while learning, for log.health_every")] if self.aside else []),
            (f"{self.micro_batch} pairs", self.micro_batch * self.pair.per_row, f"{size(self.pair.per_row)} each"),
            (f"or {self.batch} samples", self.batch * self.sample.per_row, f"{size(self.sample.per_row)} each"),
            *([("or their pixels", self.round_trip, "through the VAE")] if self.round_trip else []),
            ("peak", self.peak, "while learning" if self.learning == self.peak else "while sampling"),
        ]
        return [f"  {name:22}{size(count):>11}  {note}".rstrip() for name, count, note in rows]


def need_of(config: Config, family: Family, device: torch.device, room: int, most: int | None = None) -> Need:
    """Counts the memory that a configuration needs in one process.

    Batch sizes and parking that the configuration leaves open are chosen as in a run.

    Args:
        config: the run's configuration, after `apply_preset`.
        family: the model family; its network is not changed, and may be in training already.
        device: the device on which the run would compute.
        room: bytes of the device that the run can use.
        most: upper bound on the bytes in use, weights included, when batch sizes are chosen; None: the weights, the
            judge's included, plus the preset's share of the rest of `room`.

    Raises:
        ConfigError: the model does not support the resolution.
    """
    counted = _counted(config, family, device)
    model = counted.model
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    average = trained_bytes(model) if config.train.ema_decay else 0
    judge = _judge(config, device)
    need = Need(
        weights=weights,
        trained=trained_bytes(model),
        moments=learner_bytes(config, model) - average,
        average=average,
        references=pool_bytes(config, model, device, max(0, room - weights - judge)),
        pair=counted.pair,
        sample=counted.sample,
        micro_batch=config.train.micro_batch or 0,
        batch=config.sampler.batch or 0,
        parked=device.type == "cuda" and bool(config.reference.park),
        aside=trained_bytes(model) if device.type == "cpu" and measures_halves(config) else 0,
        round_trip=counted.round_trip,
        judge=judge,
    )
    if most is None:
        loaded = weights + judge
        most = loaded + int(MEMORY_PRESETS[config.memory].share * max(0, room - loaded))
    return _filled_in(need, config, device, most)


class _Counted(NamedTuple):
    """A family's network as a configuration trains it, on the `meta` device, and what its batches take."""

    model: nn.Module
    pair: Footprint
    sample: Footprint
    round_trip: int


# Counting takes seconds, and many suggestions differ only in settings that do not change these counts.
_COUNTED: WeakKeyDictionary[Family, dict[tuple[Any, ...], _Counted]] = WeakKeyDictionary()


def _counted(config: Config, family: Family, device: torch.device) -> _Counted:
    guided = config.sampler.guidance > 1
    key = (config.model.model_dump_json(), config.data.resolution, guided, _pixel_rows(config), device.type)
    known = _COUNTED.setdefault(family, {})
    if key not in known:
        model = family.empty()
        make_trainable(model, config.model, config.seed, family)
        circumstances: dict[str, Any] = {
            "denoise": family.denoise,
            "inputs": family.example_inputs(config.data.resolution),
            "dtype": DTYPES[config.model.precision],
            "device": device,
        }
        pair = training_footprint(model, **circumstances)
        sample = sampling_footprint(model, **circumstances, guided=guided)
        known[key] = _Counted(model, pair, sample, _round_trip(config, family, device))
    return known[key]


def _round_trip(config: Config, family: Family, device: torch.device) -> int:
    rows = _pixel_rows(config)
    coder = family.coder() if rows else None
    if coder is None:
        return 0
    batch = rows * encoded_at_once(family.frames), *family.latent_shape(config.data.resolution)
    return round_trip_bytes(coder, batch, family.dtype, device)


def _pixel_rows(config: Config) -> int:
    """Returns how many rows per sample are decoded at once: for a judge its winner too; 0 if nothing is decoded."""
    if config.row.reward is not None:
        return 1
    return 2 if config.reference.judge is not None else int(config.sampler.round_trip)


def _judge(config: Config, device: torch.device) -> int:
    """Returns the bytes of the judge's weights, in the dtype in which a run loads them."""
    if config.scorer is None:
        return 0
    _, name, folder = config.scorer
    return weight_count(name, None if folder is None else Path(folder)) * (2 if device.type == "cuda" else 4)


def _filled_in(need: Need, config: Config, device: torch.device, most: int) -> Need:
    """Chooses batches and parking that the configuration leaves open, as a run of one process does."""
    room = BatchRoom(
        budget=most - need.weights - need.judge,
        moments=need.moments,
        average=need.average,
        references=need.references,
        cpu=device.type == "cpu",
        aside=need.aside,
    )
    micro_batch = need.micro_batch or room.micro_batch(config, need.pair)
    parked = need.parked
    if config.reference.park is None and device.type == "cuda":
        parked = room.parks(config, need.sample)
    batch = need.batch or room.batch(config, need.sample, parked)
    return replace(need, micro_batch=micro_batch, parked=parked, batch=batch)


def room_on(device: torch.device) -> int:
    """Returns how many bytes of a device this process uses or could still allocate."""
    if device.type == "cuda":
        return free_bytes(device) + torch.cuda.memory_allocated(device)
    return free_bytes(device) + int(psutil.Process().memory_info().rss)


def out_of_memory(config: Config, family: Family, device: torch.device, error: BaseException) -> OutOfMemoryError:
    """Returns an exception whose message lists what takes a run's memory and which settings would fit.

    Args:
        config: the run's configuration, with its batches chosen.
        family: the model family.
        device: the run's device.
        error: the allocator's exception.
    """
    problem = (str(error).splitlines() or ["allocation failed"])[0]
    if device.type == "cuda" and not isinstance(error, torch.OutOfMemoryError):
        return OutOfMemoryError(
            f"out of host memory (not GPU memory): {problem}; to use less, set --reference.park false, a smaller "
            "reference.host_gib (past policies then go to disk) or a smaller reference.pairs_gib, or start fewer "
            "processes on the machine"
        )
    room = room_on(device)
    need = need_of(config, family, device, room)
    fitting = [
        f"  {' '.join(f'--{key} {_word(value)}' for key, value in changes.items())}: {size(lighter.peak)}"
        for changes, lighter in suggestions(config, family, device, room, int(_SHARE * min(room, need.peak)))
    ]
    lines = [
        f"out of memory: {problem}",
        "estimated memory by part:",
        *need.table(),
        f"this process can use {size(room)} on {device.type}; memory of other programs is excluded",
        *(["settings that would fit:", *fitting] if fitting else [_NOTHING_FITS]),
    ]
    return OutOfMemoryError("\n".join(lines))


def suggestions(
    config: Config, family: Family, device: torch.device, room: int, most: int
) -> Iterator[tuple[dict[str, Any], Need]]:
    """Yields up to three changes with which a run needs at most `most` of `room` bytes, mildest first.

    Each comes with what the run would then need.
    """
    found = 0
    for changes in _ladder(config, device):
        lighter = _with(config, {**changes, "train.micro_batch": None, "sampler.batch": None})
        try:
            need = need_of(lighter, family, device, room, most)
        except ConfigError:
            continue  # the model does not support half the resolution
        batches = {"train.micro_batch": need.micro_batch, "sampler.batch": need.batch}
        before = {"train.micro_batch": config.train.micro_batch, "sampler.batch": config.sampler.batch}
        for key, rows in batches.items():
            batches[key] = min(rows, before[key] or rows)
        need = replace(need, micro_batch=batches["train.micro_batch"], batch=batches["sampler.batch"])
        if need.peak <= most:
            found += 1
            yield {**{key: rows for key, rows in batches.items() if rows != before[key]}, **changes}, need
        if found == _SUGGESTIONS:
            return


def _ladder(config: Config, device: torch.device) -> Iterator[dict[str, Any]]:
    """Yields changes that save memory: first those that only cost time, then those that train something else."""
    yield {}
    changes: dict[str, Any] = {}
    if not config.model.gradient_checkpointing:
        changes["model.gradient_checkpointing"] = True
    if device.type == "cuda" and not config.reference.park:
        changes["reference.park"] = True  # no effect on a CPU
    if changes:
        yield dict(changes)
    near, beyond = ("gpu_gib", "host_gib") if device.type == "cuda" else ("host_gib", "disk_gib")
    if getattr(config.reference, near) != 0 and getattr(config.reference, beyond) != 0:
        changes[f"reference.{near}"] = 0
        yield dict(changes)
    if _has_states(Path(config.output)):
        return  # the next changes would make it another run, which cannot resume from these states
    if config.model.train == "full":
        yield {**changes, "model.train": "lora"}
    yield {**changes, "data.resolution": config.data.resolution // 2}


def _has_states(run: Path) -> bool:
    try:
        return bool(saved_states(run))
    except CheckpointError:
        # Unknown; this error must not replace the message about memory. True is the safe answer: it leaves out changes
        # with which a run that has states could not resume.
        return True


def _with(config: Config, changes: Mapping[str, Any]) -> Config:
    sections: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    return filled(config, **sections)


def size(count: float) -> str:
    """Formats a number of bytes as MiB or GiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
