"""Runs one piece of the ablation: trains it, judges it after the updates that its row names, and counts its cost."""

from __future__ import annotations

import fcntl
import io
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.ablations.rows import (
    AFTER_SFT,
    DEVELOPMENT_SEED,
    FIRST_STAGE_SEED,
    FIRST_STAGE_UPDATES,
    GUIDANCE,
    RATES,
    SFT,
    Piece,
)
from benchmarks.ablations.signs import register_signs
from benchmarks.harness.provenance import commit
from benchmarks.harness.work import write_result
from seppo_fast.config.load import parse_config, read_config
from seppo_fast.config.objectives import OBJECTIVES
from seppo_fast.config.schema import Config
from seppo_fast.data.sources import open_source
from seppo_fast.evaluation.judged import DEVELOPMENT, REPORT, judged_pictures, prompt_sets
from seppo_fast.loss import denoising_errors
from seppo_fast.shapes.world import SIZE, caption, render, scene
from seppo_fast.train import train
from seppo_fast.train.trainer import Trainer
from seppo_fast.utils.logging import quiet_libraries
from seppo_fast.utils.random import keyed_noise, keyed_rng

WINNERS, MADE = "shapes:2048:11", "shapes-made:1024"  # no held-out prompt is a caption of either
HELD_OUT_STREAM, ERROR_DRAWS = 13, 4
WRONG_SHARE = 0.2


@dataclass(frozen=True)
class Size:
    """How much work each run does; a smaller size serves as a smoke test.

    Attributes:
        prompts: maximum number of prompts judged at each stop; there are fewer development prompts than this.
        pictures: number of pictures on which the held-out error is computed.
        settings: settings that override those of every piece.
        stops: updates after which every piece is judged, instead of its own; None: each piece's own.
    """

    prompts: int = 600
    pictures: int = 256
    settings: tuple[tuple[str, Any], ...] = ()
    stops: tuple[int, ...] | None = None


FULL = Size()
QUICK = Size(
    prompts=4,
    pictures=4,
    settings=(
        ("data.source", "shapes:8:11"), ("train.updates", 2), ("train.updates_per_iteration", 1),
        ("train.pairs_per_update", 4), ("train.micro_batch", 4), ("sampler.steps", 2),
    ),
    stops=(1, 2),
)  # fmt: skip


class Rows:
    """Counts the rows that pass through a network in forwards and backwards.

    Attributes:
        forward: rows counted in forwards.
        backward: rows counted in backwards.
        paused: set it to True to stop counting forwards.
    """

    def __init__(self, network: nn.Module) -> None:
        self.forward, self.backward, self.paused = 0, 0, False
        network.register_forward_hook(self._count)

    def _count(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self.paused:
            return
        prediction = output[0]
        rows = len(prediction)
        self.forward += rows
        if prediction.requires_grad:
            prediction.register_hook(lambda grad: self._add(rows))

    def _add(self, rows: int) -> None:
        self.backward += rows

    @property
    def equivalent(self) -> int:
        """The count in forwards of one row; a backward counts as two."""
        return self.forward + 2 * self.backward


class Stops:
    """Judges a run at its stops; pass it to `train` as `observe`.

    Args:
        stops: the updates after which the run is judged.
        prompts: held-out prompts.
        seed: seed of the starting noise.
        pictures: number of pictures on which the held-out error is computed.

    Attributes:
        found: one entry per stop.
    """

    def __init__(self, stops: Sequence[int], prompts: list[str], seed: int, pictures: int) -> None:
        self._stops, self._prompts, self._seed, self._pictures = stops, prompts, seed, pictures
        self._rows: Rows | None = None
        self._judging = 0.0
        self._began = time.perf_counter()
        self.found: list[dict[str, Any]] = []

    def __call__(self, trainer: Trainer, updates: int) -> None:
        if self._rows is None:
            self._rows = Rows(trainer.policy)
            self._began = time.perf_counter()
        if updates not in self._stops:
            return
        began, self._rows.paused = time.perf_counter(), True
        config, entry = trainer.config, dict[str, Any](update=updates, row_forwards=self._rows.equivalent)
        generates = config.row.negatives == "generated"
        entry["pairs"] = updates * config.train.pairs_per_update
        entry["samples"] = entry["pairs"] // config.reference.uses if generates else 0
        entry["seconds"] = began - self._began - self._judging
        entry["winner_error"] = held_out_error(trainer, self._pictures)
        entry["scores"] = {f"{scale:g}": self._scores(trainer, scale) for scale in GUIDANCE}
        self.found.append(entry)
        self._rows.paused = False
        self._judging += time.perf_counter() - began

    def _scores(self, trainer: Trainer, scale: float) -> list[float]:
        settings = trainer.config.sampler.model_copy(update={"guidance": scale})
        sampler = trainer.family.sampler(settings, trainer.family.latent_shape(SIZE))
        _, scores = judged_pictures(
            trainer.family, trainer.denoiser, trainer.policy, sampler, self._prompts, self._seed
        )
        return [round(float(score), 4) for score in scores]


@torch.no_grad()
def held_out_error(trainer: Trainer, pictures: int) -> float:
    """Returns the policy's mean denoising error on `pictures` rendered pictures that no run trains on."""
    family, schedule = trainer.family, trainer.family.schedule
    scenes = [scene(HELD_OUT_STREAM, index) for index in range(pictures)]
    latents = family.encode_images(torch.from_numpy(np.stack([render(one) for one in scenes])))
    rows = family.collate(family.encode_prompts([caption(one) for one in scenes]))
    family.park_encoders()
    errors: list[Tensor] = []
    for draw in range(ERROR_DRAWS):
        keys = [(draw, index) for index in range(len(latents))]
        times = torch.tensor([schedule.draw(keyed_rng(0, "held-out", *key), latents.shape[1:]) for key in keys])
        noise = keyed_noise(0, "held-out", keys, latents.shape[1:])
        noised, target = schedule.add_noise(latents, noise, times), schedule.target(latents, noise, times)
        for chosen in torch.arange(len(latents)).split(64):
            picked = rows.take(slice(int(chosen[0]), int(chosen[-1]) + 1))
            prediction = trainer.denoiser.denoise(trainer.policy, noised[chosen], times[chosen], picked)
            errors.append(denoising_errors(prediction, target[chosen]))
    return float(torch.cat(errors).double().mean())


def run_piece(piece: Piece, folder: str, results: str, size: Size = FULL) -> None:
    """Trains and judges a piece from its beginning, in this process and on one thread, and writes its result.

    Args:
        piece: the piece of work.
        folder: folder for runs, caches and written data; the run's own subfolder is removed before and afterwards.
        results: folder for the result files; each is written atomically.
        size: how much work the piece does.
    """
    began = time.perf_counter()
    prepare()
    place = Path(folder) / piece.name
    shutil.rmtree(place, ignore_errors=True)
    config = config_of(piece, Path(folder), place, size)
    selecting = piece.seed == DEVELOPMENT_SEED
    prompts = held_out(selecting)[: size.prompts]
    stops = Stops(size.stops or piece.stops, prompts, DEVELOPMENT if selecting else REPORT, size.pictures)
    with redirect_stdout(io.StringIO()):
        train(config, stops)
    shutil.rmtree(place)
    told = {"study": piece.study, "row": piece.row, "rate": piece.rate, "seed": piece.seed, "regime": piece.regime}
    told |= {"commit": commit(), "torch": torch.__version__, "seconds": round(time.perf_counter() - began)}
    write_result(Path(results), piece.name, told | {"stops": stops.found})


def prepare() -> None:
    """Prepares this process for a run: quiet libraries, one thread, and the ablation's own objectives registered."""
    quiet_libraries()
    torch.set_num_threads(1)
    if "random-sign" not in OBJECTIVES:
        register_signs()


def held_out(selecting: bool) -> list[str]:
    """Returns held-out prompts: those for choosing settings if `selecting`, else those for reporting."""
    made = {example.prompt for example in open_source(MADE)}
    return [prompt for prompt in prompt_sets(open_source(WINNERS))[0 if selecting else 1] if prompt not in made]


def config_of(piece: Piece, folder: Path, place: Path, size: Size) -> Config:
    """Returns the configuration of a piece, after preparing the weights or data that its regime needs."""
    settings = piece.settings()
    if piece.regime == AFTER_SFT:
        settings["model.path"] = str(first_stage(piece.seed, folder, size))
    elif piece.regime == "wrong-captions":
        with alone(folder):
            settings["data.source"] = str(wrong_captions(folder / "wrong-captions"))
    return changed("demo.yaml", settings | dict(size.settings), place, folder / "cache")


def changed(recipe: str, settings: dict[str, Any], output: Path, cache: Path) -> Config:
    """Returns a recipe with other settings, and with logging and saving off that would cost time or extra rows.

    Args:
        recipe: name of the recipe.
        settings: settings to change, `section.key` to value.
        output: the run's folder.
        cache: folder of data caches.
    """
    tree = read_config(recipe).model_dump()
    quiet = {
        "output": str(output), "data.cache": str(cache),
        "log.sample_every": 0, "log.health_every": 0, "save.minutes": 600.0,
    }  # fmt: skip
    for key, value in (quiet | settings).items():
        section, _, name = key.rpartition(".")
        (tree[section] if section else tree)[name] = value
    return parse_config(tree)


def first_stage(seed: int, folder: Path, size: Size) -> Path:
    """Returns the folder of the SFT weights from which the second stage starts, training them if they do not exist."""
    place = folder / f"first-stage-seed{seed}"
    with alone(folder):
        if not (place / "weights").exists():
            stage = Piece("table", SFT, RATES[0], seed + FIRST_STAGE_SEED)
            settings = stage.settings() | {"train.updates": FIRST_STAGE_UPDATES} | dict(size.settings)
            with redirect_stdout(io.StringIO()):
                train(changed("demo.yaml", settings, place, folder / "cache"))
    return place / "weights"


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Lets one process at a time run the block, which prepares files that several processes need."""
    with (folder / ".preparing").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def wrong_captions(folder: Path) -> Path:
    """Returns a folder with the recipe's winners, a fifth of them with wrong captions, writing it if it is missing.

    The wrong captions are those of other winners.
    """
    if folder.exists():
        return folder
    staging = folder.with_name(f"{folder.name}-unfinished")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    _, count, stream = WINNERS.split(":")
    scenes = [scene(int(stream), index) for index in range(int(count))]
    captions = [caption(one) for one in scenes]
    rng = keyed_rng(0, "wrong captions")
    wrong = rng.choice(len(scenes), round(WRONG_SHARE * len(scenes)), replace=False)
    for index, other in zip(wrong, np.roll(wrong, 1), strict=True):
        captions[index] = caption(scenes[other])
    for index, one in enumerate(scenes):
        Image.fromarray(render(one)).save(staging / f"{index:05d}.png")
        (staging / f"{index:05d}.txt").write_text(captions[index], encoding="utf-8")
    staging.rename(folder)
    return folder
