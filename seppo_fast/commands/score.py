"""`seppo-fast score RUN ...`: generates media with base and runs at the same seeds, scores and compares them.

The three phases (generate, score, statistics) exchange nothing but files in one folder. Each can be interrupted and
resumed, and any number of processes may work on the first two at once.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from seppo_fast.config.schema import Config, did_you_mean
from seppo_fast.data.cache.opening import truncation
from seppo_fast.diffusion.protocols import PROTOCOLS
from seppo_fast.evaluation.generate import PromptBatches
from seppo_fast.evaluation.media import BASE, disk_need, make_media, media_of, model_digest, read_media
from seppo_fast.evaluation.prompts import PromptList, read_prompts
from seppo_fast.evaluation.scores import SCORE_FOLDER
from seppo_fast.evaluation.scoring import require_scorers, score_media
from seppo_fast.evaluation.table import GRID, TABLE, read_scored, write_results
from seppo_fast.models.denoiser import Denoiser
from seppo_fast.models.family import Family
from seppo_fast.models.registry import family_of, load_family
from seppo_fast.models.trainable import DTYPES
from seppo_fast.runs.checkpoint import SavedState, checked_state, newest_state, saved_states, state_folder
from seppo_fast.runs.resume import refuse_other_content, saved_config
from seppo_fast.runs.weights import load_trained
from seppo_fast.utils.errors import CheckpointError, ConfigError, DataError, OutOfMemoryError
from seppo_fast.utils.files import read_json, write_atomically
from seppo_fast.utils.logging import say, set_rank
from seppo_fast.utils.memory import is_out_of_memory

Phase = Literal["generate", "score", "statistics"]
DEFAULT_SCORERS = ("pickscore", "hpsv2.1", "imagereward", "aesthetic")
SETTINGS = "settings.json"
_BATCHES = {False: 16, True: 2}  # samples at once if no run sets sampler.batch, by whether they are clips
_INSTEAD = "The base must be the one that the run started with; put it back in its place"


@dataclass(frozen=True)
class Options:
    """What the command line requests; None where nothing was given.

    Attributes:
        runs: the runs' folders.
        prompts: the prompt file.
        scorers: the scorers' names; empty: all that have scores, or the default ones if any has to be run.
        samples: samples per prompt.
        seed: the seed of the starting noise.
        guidance: the guidance scale instead of the protocol's.
        protocol: the name of the sampling settings; see `PROTOCOLS`.
        batch: the number of samples generated at once.
        update: the update whose saved state is scored; None: the newest state.
        raw: whether to score the raw weights even if a run keeps their moving average.
        only: the only phase to run; None: all three.
        output: the folder; None: `score` in the first run's.
        weights: the folder with the scorers' weights.
    """

    runs: tuple[Path, ...]
    prompts: Path | None = None
    scorers: tuple[str, ...] = ()
    samples: int = 1
    seed: int = 0
    guidance: float | None = None
    protocol: str = "run"
    batch: int | None = None
    update: int | None = None
    raw: bool = False
    only: Phase | None = None
    output: Path | None = None
    weights: Path | None = None

    @property
    def folder(self) -> Path:
        """The folder that the command writes."""
        if self.output is None and not self.runs:
            raise ConfigError("score: name at least one RUN, or with --only score or statistics an --output folder")
        return self.output or self.runs[0] / SCORE_FOLDER


@dataclass(frozen=True)
class _Subject:
    """A run whose weights are scored: its name in tables, saved state, and configuration with the sampling settings."""

    name: str
    saved: SavedState
    config: Config


def score(options: Options) -> None:
    """Runs the requested phases; see the module.

    Raises:
        ConfigError: an option is invalid, weights of a scorer are missing (checked before anything is generated), the
            runs cannot be compared, or the folder holds media of other settings.
        DataError: the prompt file or a media file cannot be used, or every scorer failed.
        CheckpointError: a state cannot be read, the disk is too small, or a file cannot be written.
        OutOfMemoryError: a model does not fit.
    """
    rank, world = _place()
    folder = options.folder
    _check(options)
    names = options.scorers or DEFAULT_SCORERS
    if options.only in (None, "score"):
        require_scorers(names, options.weights)
    if options.only in (None, "generate"):
        _generate(options, folder, rank, world)
    else:
        _refuse_other_prompts(options, folder)
    if options.only in (None, "score"):
        device = _device()
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        media = read_media(folder)
        problems = score_media(
            folder, media, names, device=device, dtype=dtype, weights=options.weights, rank=rank, world=world
        )
        if len(problems) == len(names):
            raise DataError(f"{folder}: every scorer failed: {'; '.join(problems)}")
    if options.only in (None, "statistics") and rank == 0:
        chosen = options.scorers or (names if options.only is None else None)
        scored = read_scored(folder, read_settings(folder), chosen)
        _tell(write_results(scored, options.weights), folder)


def read_settings(folder: Path) -> dict[str, Any]:
    """Reads `settings.json`: how the media in a folder were made.

    Raises:
        ConfigError: it is missing or malformed, or belongs to other media than `items.json`.
    """
    file = folder / SETTINGS
    try:
        settings = dict(read_json(file))
        models = {name: row["digest"] for name, row in settings["models"].items()}
    except FileNotFoundError:
        raise ConfigError(f"{file}: does not exist; generate first: run the command without --only") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise ConfigError(f"{file}: malformed ({problem}); remove it and generate again") from problem
    if models != dict(read_media(folder).models):
        raise ConfigError(f"{file}: lists other models than items.json; run the command without --only")
    return settings


def _check(options: Options) -> None:
    """Raises ConfigError for an option out of range."""
    if options.samples < 1:
        raise ConfigError(f"--samples {options.samples}: must be at least 1")
    if options.seed < 0:
        raise ConfigError(f"--seed {options.seed}: must be at least 0")
    if options.guidance is not None and not options.guidance >= 1:
        raise ConfigError(f"--guidance {options.guidance}: must be at least 1, which turns guidance off")
    if options.batch is not None and options.batch < 1:
        raise ConfigError(f"--batch {options.batch}: must be at least 1")
    if options.protocol not in PROTOCOLS:
        raise ConfigError(f"--protocol {options.protocol!r} is unknown{did_you_mean(options.protocol, PROTOCOLS)}")
    if options.only in (None, "generate") and (options.prompts is None or not options.runs):
        raise ConfigError("score: --prompts FILE and at least one RUN are needed to generate")


def _generate(options: Options, folder: Path, rank: int, world: int) -> None:
    assert options.prompts is not None
    prompts = read_prompts(options.prompts)
    subjects = _subjects(options)
    config, device = subjects[0].config, _device()
    _refuse_different(subjects)
    clips = family_of(config.model).makes_clips
    settings = _settings(options, prompts, subjects, device, clips)
    _refuse_other_settings(folder, settings)
    _require_disk(folder, settings, len(subjects) + 1)
    if rank == 0:
        _write_settings(folder, settings)
    models: dict[str, Any] = {}
    encoders: dict[str, str] = {}
    for subject in [None, *subjects]:
        family, average = _loaded(subject, subjects[0], options, device)
        if encoders and family.fingerprint() != encoders:
            assert subject is not None
            raise ConfigError(f"{subject.name}: its text encoder or VAE differs from the base's; score it separately")
        encoders = family.fingerprint()
        protocol = {name: value for name, value in settings["protocol"].items() if name not in ("name", "source")}
        digest = model_digest({"weights": family.identity(), "encoders": encoders, "protocol": protocol})
        name = BASE if subject is None else subject.name
        update = 0 if subject is None else subject.saved.update
        models[name] = {"digest": digest, "update": update, "average": average}
        if subject is None:
            cut = family.too_long(sorted(set(prompts.texts)))
            for line in truncation(cut, len(set(prompts.texts))):
                say(line)
        media = media_of(prompts, {name: digest}, options.samples, options.seed, clips=clips)
        with _explaining_memory(settings["protocol"]["sampler"]["batch"]):
            make_media(folder, name, media.items, _batches(family, config, prompts, options.seed, device), rank, world)
        del family
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    _write_settings(folder, settings | {"models": models})
    digests = {name: row["digest"] for name, row in models.items()}
    media_of(prompts, digests, options.samples, options.seed, clips=clips).write(folder)


def _subjects(options: Options) -> list[_Subject]:
    """Returns the runs to score, all with the same sampling settings if their own agree."""
    found, names = [], [BASE]
    for run in options.runs:
        saved = _state(run, options.update)
        config = saved_config(saved)
        plain = run.resolve().name
        name = next(n for n in (plain, *(f"{plain}-{i}" for i in range(2, 10**6))) if n not in names)
        names.append(name)
        found.append(_Subject(name, saved, config))
    protocol = PROTOCOLS[options.protocol]
    asked = [saved_config(subject.saved, "asked").sampler.batch for subject in found]
    clips = family_of(found[0].config.model).makes_clips
    batch = options.batch or min([size for size in asked if size] or [_BATCHES[clips]])
    changes: dict[str, Any] = {**protocol.sampler, "batch": batch}
    if options.guidance is not None:
        changes["guidance"] = options.guidance
    subjects = []
    for subject in found:
        config = subject.config
        model = config.model.model_copy(update={"precision": protocol.precision or config.model.precision})
        data = config.data.model_copy(update={"resolution": protocol.resolution or config.data.resolution})
        sampler = config.sampler.model_copy(update=changes)
        config = config.model_copy(update={"model": model, "data": data, "sampler": sampler})
        subjects.append(_Subject(subject.name, subject.saved, config))
    return subjects


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


def _refuse_different(subjects: Sequence[_Subject]) -> None:
    """Raises ConfigError, naming the first field that differs, unless base and sampling settings are the same."""
    first, *others = subjects
    for other in others:
        for (field, value), found in zip(_compared(first).items(), _compared(other).values(), strict=True):
            if value != found:
                raise ConfigError(
                    f"{first.name} and {other.name} differ in {field}: {value!r} and {found!r}; runs are compared only "
                    "with the same base and sampling settings (--protocol and --guidance set the latter). Score them "
                    "separately"
                )


def _compared(subject: _Subject) -> dict[str, Any]:
    config = subject.config
    sampler = {f"sampler.{name}": getattr(config.sampler, name) for name in ("name", "steps", "guidance")}
    prints = subject.saved.numbers.get("fingerprints", {})
    base = prints.get("model") if isinstance(prints, dict) else None
    clips = family_of(config.model).makes_clips
    return {
        "the base model's fingerprint": base,
        **sampler,
        "data.resolution": config.data.resolution,
        "data.frames": config.data.frames if clips else None,
        "model.precision": config.model.precision,
    }


def _settings(
    options: Options, prompts: PromptList, subjects: Sequence[_Subject], device: torch.device, clips: bool
) -> dict[str, Any]:
    """Returns the content of `settings.json`, without the models."""
    config, protocol = subjects[0].config, PROTOCOLS[options.protocol]
    names = ("name", "steps", "guidance", "batch")
    return {
        "command": _command(options),
        "protocol": {
            "name": options.protocol,
            "source": protocol.source,
            "sampler": {name: getattr(config.sampler, name) for name in names},
            "resolution": config.data.resolution,
            "frames": config.data.frames if clips else None,
            "precision": config.model.precision,
            "device": device.type,
        },
        "prompts": {"name": prompts.name, "digest": prompts.digest, "count": len(prompts.prompts)},
        "samples": options.samples,
        "seed": options.seed,
        "base": _compared(subjects[0])["the base model's fingerprint"],
    }


def _command(options: Options) -> str:
    """Returns the command that gives the same results, with the folders' names instead of their paths."""
    assert options.prompts is not None
    words = ["seppo-fast score", *(run.resolve().name for run in options.runs), "--prompts", options.prompts.name]
    words += ["--scorers", ",".join(options.scorers or DEFAULT_SCORERS)]
    words += ["--samples", str(options.samples), "--seed", str(options.seed), "--protocol", options.protocol]
    words += [] if options.guidance is None else ["--guidance", f"{options.guidance:g}"]
    words += [] if options.batch is None else ["--batch", str(options.batch)]
    words += [] if options.update is None else ["--update", str(options.update)]
    return " ".join([*words, *(["--raw"] if options.raw else [])])


def _refuse_other_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raises ConfigError if a folder holds media of other settings; the message names the first that differs."""
    file = folder / SETTINGS
    if not file.exists():
        return
    try:
        before, now = _flat(read_json(file)), _flat(settings)
    except (OSError, ValueError) as problem:
        raise ConfigError(f"{file}: malformed ({problem}); choose another --output") from problem
    for key, value in now.items():
        if key != "command" and before.get(key) != value:
            raise ConfigError(
                f"{folder}: its media were made with {key} = {before.get(key)!r}, not {value!r}; choose another "
                "--output, or use the same settings"
            )


def _refuse_other_prompts(options: Options, folder: Path) -> None:
    if options.prompts is not None:
        prompts, have = read_prompts(options.prompts), read_settings(folder)["prompts"]
        if prompts.digest != have["digest"]:
            raise ConfigError(
                f"--prompts {options.prompts}: {folder} holds media of other prompts, from {have['name']}; leave out "
                "--prompts or run the command without --only"
            )


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def _require_disk(folder: Path, settings: Mapping[str, Any], models: int) -> None:
    """Says how much space the media will take; raises CheckpointError if the disk has less."""
    items, protocol = settings["prompts"]["count"] * settings["samples"], settings["protocol"]
    need = disk_need(items, models, protocol["frames"] or 1, protocol["resolution"])
    have = sum(file.stat().st_size for file in folder.glob("media/*/[!.]*"))
    free = shutil.disk_usage(next(place for place in (folder, *folder.absolute().parents) if place.exists())).free
    say(f"{items} files for each of {models} models: about {need / 2**20:.0f} MiB, {have / 2**20:.0f} MiB exist")
    if need - have > free:
        raise CheckpointError(
            f"{folder}: the media need about {(need - have) / 2**20:.0f} MiB, but only {free / 2**20:.0f} MiB are "
            "free; make room, use fewer --samples or prompts, or choose another --output"
        )


def _write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Writes `settings.json`; the models of an earlier command are kept until this one's media are complete."""
    if "models" not in settings and (folder / SETTINGS).exists():
        return
    content = json.dumps(settings, indent=1, ensure_ascii=False) + "\n"
    write_atomically(folder / SETTINGS, content.encode("utf-8", "backslashreplace"), CheckpointError)


def _loaded(subject: _Subject | None, first: _Subject, options: Options, device: torch.device) -> tuple[Family, bool]:
    """Returns the base, or a run's model, and whether its weights are the moving average."""
    if subject is not None:
        return load_trained(subject.config, subject.saved, device, raw=options.raw, instead=_INSTEAD)
    family = load_family(first.config, device)
    refuse_other_content(first.saved, {"model": (family.identity(),)}, _INSTEAD)
    return family, False


def _batches(family: Family, config: Config, prompts: PromptList, seed: int, device: torch.device) -> PromptBatches:
    family.model.to(device, memory_format=family.memory_format)  # type: ignore[call-overload]
    denoiser = Denoiser(family, DTYPES[config.model.precision])
    resolution = config.data.resolution
    sampler = family.sampler(config.sampler, family.latent_shape(resolution))
    return PromptBatches(family, denoiser, family.model, sampler, prompts.texts, resolution=resolution, seed=seed)


@contextmanager
def _explaining_memory(batch: int) -> Iterator[None]:
    """Turns running out of memory inside the block into an OutOfMemoryError that says what to change."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(f"out of memory while generating; set --batch below {batch}") from error


def _place() -> tuple[int, int]:
    """Returns this process's rank and the number of processes, as launchers such as torchrun set them."""
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    set_rank(rank, world, rank == 0)
    return rank, world


def _device() -> torch.device:
    if not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def _tell(tree: Mapping[str, Any], folder: Path) -> None:
    for key, row in tree["scorers"].items():
        for run, found in row["runs"].items():
            means = f"{row['means'][BASE]:.4g} -> {row['means'][run]:.4g}" if found["base"] is not None else "no score"
            interval = f", difference {found['difference']:+.4g}" if found["difference"] is not None else ""
            ends = f" [{found['low']:+.4g}, {found['high']:+.4g}]" if found["low"] is not None else ""
            say(f"{key}: base -> {run}: {means}{interval}{ends}")
    say(f"tables: {folder / TABLE}, picture: {folder / GRID}")
