"""`seppo-fast score RUN ...`: generates media with base and runs at the same seeds, scores and compares them.

The three phases (generate, score, statistics) exchange nothing but files in one folder. Each can be interrupted and
resumed, and any number of processes may work on the first two at once.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from seppo_fast.config.schema import did_you_mean
from seppo_fast.data.cache.opening import truncation
from seppo_fast.diffusion.protocols import PROTOCOLS
from seppo_fast.evaluation.media.batch import (
    SETTINGS,
    SmallerBatch,
    follow_batch,
    halve_batch,
    recorded_batch,
    write_settings,
)
from seppo_fast.evaluation.media.items import BASE, ITEMS, media_of, model_digest, read_media
from seppo_fast.evaluation.media.layout import LAYOUTS, export_layout, require_layout
from seppo_fast.evaluation.media.making import make_media, require_disk
from seppo_fast.evaluation.media.prompts import PromptList, read_prompts
from seppo_fast.evaluation.media.subjects import Subject, batches_of, load_subject, subjects_of
from seppo_fast.evaluation.media.work import alone
from seppo_fast.evaluation.real.command import Comparison, tables
from seppo_fast.evaluation.real.text import metrics_lines
from seppo_fast.evaluation.scores import SCORE_FOLDER
from seppo_fast.evaluation.scoring.markdown import score_lines
from seppo_fast.evaluation.scoring.score_files import require_scorers, score_media
from seppo_fast.evaluation.scoring.table import GRID, TABLE, read_scored, write_results
from seppo_fast.utils.errors import ConfigError, DataError, OutOfMemoryError
from seppo_fast.utils.files import read_json
from seppo_fast.utils.logging import say, set_rank
from seppo_fast.utils.memory import is_out_of_memory

Phase = Literal["generate", "score", "statistics"]
DEFAULT_SCORERS = ("pickscore", "hpsv2.1", "imagereward", "aesthetic")
_TEXTS = ("command", "protocol.source", "prompts.name")  # settings that do not affect the media


@dataclass(frozen=True)
class Options:
    """The options of the command line; None if one was not given.

    Attributes:
        runs: the runs' folders.
        prompts: the prompt file.
        scorers: the scorers' names; empty: all that have scores, or the default ones if any has to be run.
        samples: samples per prompt.
        seed: the seed of the starting noise.
        guidance: the guidance scale instead of the protocol's.
        protocol: the name of the sampling settings; see `PROTOCOLS`.
        batch: the number of samples generated at once; None: the folder's, if it has media, else the runs'.
        update: the update whose saved state is scored; None: the newest state.
        raw: whether to score the raw weights even if a run keeps their moving average.
        only: the only phase to run; None: all three.
        output: the folder; None: `score` in the first run's.
        weights: the folder with the scorers' weights.
        real: the folder of real pictures or clips, or `shapes`.
        metrics: the metrics' names.
        features: the features of the metrics `frechet` and `kernel`.
        layout: the folder layout in which clips are exported, too: one of `LAYOUTS`.
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
    real: str | None = None
    metrics: tuple[str, ...] = ()
    features: str | None = None
    layout: str | None = None

    @property
    def folder(self) -> Path:
        """The folder that the command writes."""
        if self.output is None and not self.runs:
            raise ConfigError("score: name at least one RUN, or with --only score or statistics an --output folder")
        return self.output or self.runs[0] / SCORE_FOLDER


def score(options: Options) -> None:
    """Runs the requested phases; see the module.

    Raises:
        ConfigError: an option is invalid, weights of a scorer are missing (checked before anything is generated), the
            runs cannot be compared, or the folder holds media of other settings.
        DataError: the prompt file, `items.json` or a media file cannot be used, or every scorer failed.
        CheckpointError: a state cannot be read, the disk is too small, or a file cannot be written.
        OutOfMemoryError: a model does not fit.
    """
    rank, world = _place()
    folder = options.folder
    _check(options)
    names = options.scorers or DEFAULT_SCORERS
    if options.only in (None, "score"):
        require_scorers(names, options.weights)
    comparison = None
    if options.only in (None, "score"):
        comparison = Comparison.chosen(options.real, options.metrics, options.features, options.weights)
    if options.only in (None, "generate"):
        _generate(options, folder, rank, world, comparison)
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
        if comparison is not None:
            comparison.measure(folder, media, read_settings(folder)["protocol"], device, rank, world)
    if options.only in (None, "statistics") and rank == 0:
        chosen = options.scorers or (names if options.only is None else None)
        scored = read_scored(folder, read_settings(folder), chosen)
        metrics = options.metrics or (() if options.only is None else None)
        more, columns, text = tables(scored, metrics)
        tree = write_results(scored, options.weights, more, columns, text)
        for line in (*score_lines(tree["scorers"]), *metrics_lines(tree.get("metrics"))):
            say(line)
        say(f"tables: {folder / TABLE}, picture: {folder / GRID}")


def read_settings(folder: Path) -> dict[str, Any]:
    """Reads `settings.json`: how the media in a folder were made.

    Raises:
        ConfigError: it is missing or malformed, or belongs to other media than `items.json`.
    """
    file = folder / SETTINGS
    try:
        settings = dict(read_json(file))
        if "models" not in settings:
            raise ConfigError(f"{folder}: not all media are generated yet; run the command without --only")
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
    if options.layout is not None and options.layout not in LAYOUTS:
        raise ConfigError(f"--layout {options.layout!r} is unknown{did_you_mean(options.layout, LAYOUTS)}")
    if options.layout is not None and options.only not in (None, "generate"):
        raise ConfigError(f"--layout {options.layout}: belongs to the phase generate; leave out --only {options.only}")
    if options.only in (None, "generate") and (options.prompts is None or not options.runs):
        raise ConfigError("score: --prompts FILE and at least one RUN are needed to generate")


def _generate(options: Options, folder: Path, rank: int, world: int, comparison: Comparison | None) -> None:
    """Makes the media; starts over in the smaller batches that `settings.json` states if a batch does not fit."""
    assert options.prompts is not None
    prompts = read_prompts(options.prompts)
    while True:
        batch = options.batch or recorded_batch(folder)
        try:
            return _generate_in_batches(options, prompts, batch, folder, rank, world, comparison)
        except SmallerBatch:
            pass
        _free_memory()  # only here, because the exception refers to the model


def _generate_in_batches(
    options: Options,
    prompts: PromptList,
    batch: int | None,
    folder: Path,
    rank: int,
    world: int,
    comparison: Comparison | None,
) -> None:
    """Makes the media of base and runs, model by model, then lists them in `items.json`; raises SmallerBatch."""
    protocol, device = PROTOCOLS[options.protocol], _device()
    subjects = subjects_of(options.runs, options.update, protocol, options.guidance, batch)
    first, clips = subjects[0], subjects[0].clips
    settings = _settings(options, prompts, first, device)
    if options.batch is None:
        follow_batch(folder, settings["protocol"]["sampler"]["batch"])  # another process may have halved it
    _refuse_other_settings(folder, settings)
    if comparison is not None:
        comparison.require(prompts, options.samples, settings["protocol"])
    if options.layout is not None:
        names = [BASE, *(subject.name for subject in subjects)]
        require_layout(names, [prompt.id for prompt in prompts.prompts], options.samples, clips=clips)
    resolution, frames = settings["protocol"]["resolution"], settings["protocol"]["frames"]
    updates = {BASE: 0, **{subject.name: subject.saved.update for subject in subjects}}
    require_disk(folder, len(prompts.prompts) * options.samples, updates, frames or 1, resolution)
    with alone(folder, {SETTINGS, ITEMS}):
        if not (folder / SETTINGS).exists():
            write_settings(folder, settings)
    models: dict[str, Any] = {}
    encoders: dict[str, str] = {}
    for name, subject in {BASE: first, **{subject.name: subject for subject in subjects}}.items():
        family, average = load_subject(subject, device, raw=options.raw, base=name == BASE)
        if encoders and family.fingerprint() != encoders:
            raise ConfigError(f"{name}: its text encoder or VAE differs from the base's; score it separately")
        encoders = family.fingerprint()
        sampling = {key: value for key, value in settings["protocol"].items() if key not in ("name", "source")}
        digest = model_digest({"weights": family.identity(), "encoders": encoders, "sampling": sampling})
        models[name] = {"digest": digest, "update": 0 if name == BASE else subject.saved.update, "average": average}
        if name == BASE:
            distinct = sorted(set(prompts.texts))
            for line in truncation(family.too_long(distinct), len(distinct)):
                say(line)
        media = media_of(prompts, {name: digest}, options.samples, options.seed, clips=clips)
        with _halving_batch(options, folder, settings, models):
            made = batches_of(family, subject.config, prompts.texts, options.seed)
            make_media(folder, name, media.items, made, rank, world)
        del family, made
        _free_memory()
    digests = {name: row["digest"] for name, row in models.items()}
    media = media_of(prompts, digests, options.samples, options.seed, clips=clips)
    with alone(folder, {SETTINGS, ITEMS}):
        follow_batch(folder, settings["protocol"]["sampler"]["batch"])
        write_settings(folder, settings | {"models": models})
        media.write(folder)
    if options.layout is not None:
        say(f"clips for the official scripts: {export_layout(folder, media, rank, world)}")


def _settings(options: Options, prompts: PromptList, first: Subject, device: torch.device) -> dict[str, Any]:
    """Returns the content of `settings.json`, without the models."""
    config, protocol = first.config, PROTOCOLS[options.protocol]
    names = ("name", "steps", "guidance", "batch")
    return {
        "command": _command(options, config.sampler.batch),
        "protocol": {
            "name": options.protocol,
            "source": protocol.source,
            "sampler": {name: getattr(config.sampler, name) for name in names},
            "resolution": config.data.resolution,
            "frames": config.data.frames if first.clips else None,
            "precision": config.model.precision,
            "device": device.type,
        },
        "prompts": {"name": prompts.name, "digest": prompts.digest, "count": len(prompts.prompts)},
        "samples": options.samples,
        "seed": options.seed,
        "base": first.base,
    }


def _command(options: Options, batch: int | None) -> str:
    """Returns the command that gives the same results, with the folders' names instead of their paths."""
    assert options.prompts is not None
    words = ["seppo-fast score", *(run.resolve().name for run in options.runs), "--prompts", options.prompts.name]
    words += ["--scorers", ",".join(options.scorers or DEFAULT_SCORERS)]
    words += ["--samples", str(options.samples), "--seed", str(options.seed), "--protocol", options.protocol]
    words += [] if options.guidance is None else ["--guidance", f"{options.guidance:g}"]
    words += ["--batch", str(batch)]
    words += [] if options.update is None else ["--update", str(options.update)]
    words += [] if options.real is None else ["--real", Path(options.real).name]
    words += ["--metrics", ",".join(options.metrics)] if options.metrics else []
    words += [] if options.features is None else ["--features", options.features]
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
        if key not in _TEXTS and before.get(key) != value:
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


@contextmanager
def _halving_batch(
    options: Options, folder: Path, settings: Mapping[str, Any], models: Mapping[str, Any]
) -> Iterator[None]:
    """Turns running out of memory inside the block into a SmallerBatch, or into an OutOfMemoryError with the remedy."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        if options.batch is not None and options.batch > 1:
            raise OutOfMemoryError(f"out of memory while generating; set --batch below {options.batch}") from error
        halve_batch(folder, settings, [row["digest"] for row in models.values()])
        raise SmallerBatch from None


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _place() -> tuple[int, int]:
    """Returns this process's rank and the number of processes, as launchers such as torchrun set them."""
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    set_rank(rank, world, rank == 0)
    return rank, world


def _device() -> torch.device:
    if not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
