"""The models that `seppo-fast score` compares: runs with the same base, and how their media are sampled."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from seppo_fast.config.schema import Config
from seppo_fast.diffusion.protocols import SamplingProtocol
from seppo_fast.evaluation.generate import PromptBatches
from seppo_fast.evaluation.media.items import BASE
from seppo_fast.models.denoiser import Denoiser
from seppo_fast.models.family import Family
from seppo_fast.models.registry import family_of, load_family
from seppo_fast.models.trainable import DTYPES
from seppo_fast.runs.checkpoint import SavedState, checked_state, newest_state, saved_states, state_folder
from seppo_fast.runs.resume import refuse_other_content, saved_config
from seppo_fast.runs.weights import load_trained
from seppo_fast.utils.errors import ConfigError

_BATCHES = {False: 16, True: 2}  # samples at once if no run sets sampler.batch, by whether they are clips
_INSTEAD = "The base must be the one that the run started with; put it back in its place"


@dataclass(frozen=True)
class Subject:
    """A run whose weights are compared with its base.

    Attributes:
        name: its name in tables, which differs from the others' and from "base".
        saved: the state with the weights.
        config: the run's configuration, with the settings with which its media are sampled.
    """

    name: str
    saved: SavedState
    config: Config

    @property
    def clips(self) -> bool:
        """Whether the model makes clips."""
        return family_of(self.config.model).makes_clips

    @property
    def base(self) -> str | None:
        """The fingerprint of the base model; None if the state does not have it."""
        fingerprints = self.saved.numbers.get("fingerprints", {})
        return fingerprints.get("model") if isinstance(fingerprints, dict) else None

    def compared(self) -> dict[str, Any]:
        """Returns everything in which runs must agree to be compared, by the name of the field."""
        config = self.config
        sampler = {f"sampler.{name}": getattr(config.sampler, name) for name in ("name", "steps", "guidance")}
        return {
            "the base model's fingerprint": self.base,
            **sampler,
            "data.resolution": config.data.resolution,
            "data.frames": config.data.frames if self.clips else None,
            "model.precision": config.model.precision,
        }


def subjects_of(
    runs: Sequence[Path], update: int | None, protocol: SamplingProtocol, guidance: float | None, batch: int | None
) -> list[Subject]:
    """Returns the runs to compare, with their sampling settings.

    Args:
        runs: the runs' folders.
        update: the update whose saved state is used; None: each run's newest intact state.
        protocol: the sampling settings; those that it leaves open are each run's own.
        guidance: the guidance scale instead of the protocol's.
        batch: the number of samples generated at once; None: the smallest that a run set as `sampler.batch`, or 16
            pictures or 2 clips.

    Raises:
        ConfigError: a folder is not a run's, it has no such state, or the runs differ in their base or in a sampling
            setting; the message names the first field that differs.
        CheckpointError: a state is damaged.
    """
    states = [_state(run, update) for run in runs]
    asked = [saved_config(saved, "asked").sampler.batch for saved in states]
    clips = family_of(saved_config(states[0]).model).makes_clips
    batch = batch or min([size for size in asked if size] or [_BATCHES[clips]])
    changes = {**protocol.sampler, "batch": batch} | ({} if guidance is None else {"guidance": guidance})
    found: list[Subject] = []
    for run, saved in zip(runs, states, strict=True):
        plain, taken = run.resolve().name, {BASE, *(subject.name for subject in found)}
        numbered = (f"{plain}-{number}" for number in itertools.count(2))
        name = next(name for name in itertools.chain([plain], numbered) if name not in taken)
        found.append(Subject(name, saved, _sampled(saved_config(saved), protocol, changes)))
    _refuse_different(found)
    return found


def _sampled(config: Config, protocol: SamplingProtocol, changes: Mapping[str, Any]) -> Config:
    """Returns a configuration with a protocol's sampling settings."""
    model = config.model.model_copy(update={"precision": protocol.precision or config.model.precision})
    data = config.data.model_copy(update={"resolution": protocol.resolution or config.data.resolution})
    sampler = config.sampler.model_copy(update=changes)
    return config.model_copy(update={"model": model, "data": data, "sampler": sampler})


def _state(run: Path, update: int | None) -> SavedState:
    if update is None:
        saved = newest_state(run)
        if saved is None:
            raise ConfigError(f"{run}: not the folder of a run with a saved state")
        return saved
    folder = state_folder(run, update)
    if not folder.is_dir():
        have = ", ".join(place.name.removeprefix("update-").lstrip("0") for place in saved_states(run)) or "none"
        raise ConfigError(f"--update {update}: {run} has no saved state after this update; saved: {have}")
    return checked_state(folder)


def _refuse_different(subjects: Sequence[Subject]) -> None:
    first, *others = subjects
    for other in others:
        for (field, value), found in zip(first.compared().items(), other.compared().values(), strict=True):
            if value != found:
                raise ConfigError(
                    f"{first.name} and {other.name} differ in {field}: {value!r} and {found!r}; runs are compared only "
                    "with the same base and sampling settings (--protocol and --guidance set the latter). Score them "
                    "separately"
                )


def load_subject(subject: Subject, device: torch.device, *, raw: bool, base: bool) -> tuple[Family, bool]:
    """Loads a run's model, or its base.

    Args:
        subject: the run.
        device: the device of the model.
        raw: whether to use the raw weights even if the run keeps their moving average.
        base: whether to load the base instead.

    Returns:
        The model, and whether its weights are the moving average.

    Raises:
        ConfigError: the base is missing or has changed since the run started.
        CheckpointError: the state does not match the model.
    """
    if not base:
        return load_trained(subject.config, subject.saved, device, raw=raw, instead=_INSTEAD)
    family = load_family(subject.config, device)
    refuse_other_content(subject.saved, {"model": (family.identity(),)}, _INSTEAD)
    return family, False


def batches_of(family: Family, config: Config, prompts: Sequence[str], seed: int) -> PromptBatches:
    """Moves a model to its device and returns the batches that it generates for prompts."""
    family.model.to(family.device, memory_format=family.memory_format)  # type: ignore[call-overload]
    denoiser = Denoiser(family, DTYPES[config.model.precision])
    resolution = config.data.resolution
    sampler = family.sampler(config.sampler, family.latent_shape(resolution))
    return PromptBatches(family, denoiser, family.model, sampler, prompts, resolution=resolution, seed=seed)
