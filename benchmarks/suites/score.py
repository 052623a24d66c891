"""Suite `score`: pictures per second of `seppo-fast score`, by phase.

- `generating`: one prompt at a time, and batches as the command makes them, with text encoder and decoder.
- `decoding`: PNG files of noise over smooth colours, with 1 thread and with 4, as many as the command uses.
- `resizing`: to the scorer's size, with 1 thread and with 4: PIL's bicubic filter (`shorter side`, all CLIP scorers but
  HPSv2), and torch's on the float tensor (`longest side`, HPSv2).
- `towers`: CLIP's image and text towers on pictures of its own size, one picture at a time and in batches.
- `score phase`: `score_media`, from hashing the files to writing the scores, with loading the scorer; its baseline
  reads and scores one picture at a time. Its FLOP are those of the towers.

On a GPU the scorer is CLIP ViT-H/14 with random weights in float16 (986 M parameters; PickScore and HPSv2 have this
network) and the generating model SD-1.5 with random weights; on a CPU both are tiny and float32. Decoding and resizing
run on the CPU in either case. Their limit is a copy in host memory and their byte model what must be read and written
at least: file and pixels. The limit of the other phases is a matrix product.

Checked before anything is timed: pixels exactly; embeddings and scores against those of one picture at a time, within
1e-4 (relative RMS) in float32 and 1e-2 in float16; generated pictures within 1e-2 in float32 and 0.25 in bfloat16.
"""

from __future__ import annotations

import io
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from benchmarks.harness import cases as suites
from benchmarks.harness.cases import Shared
from benchmarks.harness.counters import count_flops
from benchmarks.harness.estimates import PICTURE, h200
from benchmarks.harness.measure import Bench, Machine, Provider, agrees, copy_limit
from benchmarks.harness.models import Workplace, shared_workplace
from benchmarks.harness.rows import Row
from seppo_fast import shapes
from seppo_fast.evaluation.media.files import decode_media, encode_media
from seppo_fast.evaluation.media.items import Media, media_of
from seppo_fast.evaluation.media.prompts import Prompt, PromptList
from seppo_fast.evaluation.media.subjects import batches_of
from seppo_fast.evaluation.scoring.score_files import SCORES, score_media
from seppo_fast.models.registry import load_family
from seppo_fast.scorers import registry
from seppo_fast.scorers.clip import VIT_H_14, ClipTowers, hub_towers
from seppo_fast.scorers.resize import longest_side_padded, shorter_side
from seppo_fast.shapes.world import caption, scene

ONE_THREAD, FOUR_THREADS = "1 thread", "4 threads"
ALONE, BATCHES, PHASE = "one at a time", "in batches", "score phase"
SCORER = "clip"
_TINY = {
    "projection_dim": 32,
    "text_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    "vision_config": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "patch_size": 32, "image_size": 224,
    },
}  # fmt: skip
FLOPS = {"image": 0.335, "text": 0.047}  # TFLOP of ViT-H/14 per picture and per prompt, for the estimates
_WRITE_SCORER, _LOAD_SCORER = 25.0, 4.0  # assumed seconds on an H200: random weights, 2.0 GB in float16
_DECODE = _RESIZE = 0.012  # assumed seconds per picture of 512 px and thread


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        pictures: the number of scored pictures.
        side: their side in pixels.
        generated: the number of generated pictures.
        batch: the number of them generated at once.
        steps: the number of solver steps.
        rounds: the number of rounds of timing.
    """

    pictures: int
    side: int
    generated: int
    batch: int
    steps: int
    rounds: int


SIZES = {
    "gpu": Size(pictures=256, side=512, generated=16, batch=16, steps=20, rounds=3),
    "cpu": Size(pictures=64, side=512, generated=32, batch=16, steps=20, rounds=5),
    "quick": Size(pictures=8, side=256, generated=4, batch=4, steps=2, rounds=2),
}


class Pictures:
    """Files as `seppo-fast score` writes them, of one model, with a scorer of random weights.

    Args:
        machine: the machine that scores them.
        size: how many there are.
        folder: an empty folder.

    Attributes:
        pictures: their pixels `(N, H, W, 3)` uint8.
        prompts: their prompts.
        media: what `items.json` would list.
        folder: the folder with the files.
        weights: the folder with the scorer's files.
        dtype: the dtype in which the scorer computes.
    """

    def __init__(self, machine: Machine, size: Size, folder: Path) -> None:
        self.machine, self.folder, self.weights = machine, folder / "media", folder / "weights"
        self.dtype = torch.float16 if machine.device.type == "cuda" else torch.float32
        self.pictures = _drawn(size.pictures, size.side)
        self.prompts = [f"{caption(scene(5, index))}, number {index}" for index in range(size.pictures)]
        prompts = PromptList("p.txt", tuple(Prompt(str(i), text) for i, text in enumerate(self.prompts)))
        self.media: Media = media_of(prompts, {"base": "0" * 16}, 1, 0, clips=False)
        self.files = [self.folder / item.files["base"] for item in self.media.items]
        self.files[0].parent.mkdir(parents=True)
        for file, picture in zip(self.files, self.pictures, strict=True):
            file.write_bytes(encode_media(picture))
        self._write_scorer(VIT_H_14 if machine.device.type == "cuda" else _TINY)

    def _write_scorer(self, tree: dict[str, object]) -> None:
        """Writes a CLIP with random weights as the hub has it, with the vocabulary of the embedded pipeline."""
        words, place = shapes.PIPELINE / "tokenizer", self.weights / SCORER
        end = CLIPTokenizer.from_pretrained(str(words), local_files_only=True).eos_token_id
        config = CLIPConfig(**tree)
        config.text_config.eos_token_id = end
        torch.manual_seed(0)
        with self.machine.device:
            CLIPModel(config).to(self.dtype).save_pretrained(place)
        for name in ("vocab.json", "merges.txt"):
            shutil.copyfile(words / name, place / name)

    def towers(self) -> ClipTowers:
        """Loads the scorer's towers, with PIL's resizing."""
        files = {file.name: file for file in (self.weights / SCORER).iterdir()}
        return hub_towers(files, shorter_side, self.machine.device, self.dtype)

    def score_phase(self) -> np.ndarray:
        """Scores all files from the beginning, as the command does; returns their scores."""
        shutil.rmtree(self.folder / SCORES, ignore_errors=True)
        with redirect_stdout(io.StringIO()):
            problems = score_media(
                self.folder, self.media, [SCORER], device=self.machine.device, dtype=self.dtype, weights=self.weights
            )
        if problems:
            raise RuntimeError("; ".join(problems))
        (file,) = (self.folder / SCORES).glob("*.jsonl")
        rows = {row["file"]: row["score"] for row in map(json.loads, file.read_text(encoding="utf-8").splitlines())}
        return np.array([rows[item.files["base"]] for item in self.media.items], dtype=np.float64)

    def one_at_a_time(self) -> np.ndarray:
        """Loads the scorer, then reads and scores one file after another; returns their scores."""
        scorer = registry.load_scorer(SCORER, self.machine.device, self.dtype, self.weights)
        scores = [
            scorer([prompt], np.array(Image.open(file).convert("RGB"))[None])
            for prompt, file in zip(self.prompts, self.files, strict=True)
        ]
        return np.concatenate(scores)


def _drawn(count: int, side: int) -> np.ndarray:
    """Returns pictures `(N, side, side, 3)` uint8 whose PNG files are about as large as those of photographs."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (count, 8, 8, 3)).astype(np.uint8)
    smooth = [np.asarray(Image.fromarray(one).resize((side, side), Image.Resampling.BICUBIC)) for one in small]
    noise = rng.integers(-6, 7, (count, side, side, 3))
    return (np.stack(smooth) + noise).clip(0, 255).astype(np.uint8)


def estimate(size: Size) -> dict[str, float]:
    """Returns the estimated seconds of each kind of case on an H200, for its check and its rounds."""
    calls, count = 1 + size.rounds, size.pictures
    alone = h200(bf16=count * sum(FLOPS.values()), launches=2000 * count) + count * (_DECODE + _RESIZE)
    generated = h200(bf16=2 * size.steps * size.generated * PICTURE.forward)
    single = h200(launches=1000 * size.steps * size.generated)
    return {
        "phase": calls * (2 * _LOAD_SCORER + 1.5 * alone),
        "decoding": calls * 1.5 * count * _DECODE,
        "resizing": calls * 1.5 * count * _RESIZE,
        **{kind: _LOAD_SCORER + calls * h200(bf16=count * FLOPS[kind], launches=1500 * count) for kind in FLOPS},
        "generating": calls * (generated + single) + PICTURE.pipeline,
    }


def cases(machine: Machine) -> list[suites.Case]:
    """Returns the suite's cases: the whole phase first, then its parts, then generating."""
    size, host = SIZES[machine.size], Machine(torch.device("cpu"), machine.quick)
    seconds = estimate(size)
    bench = Shared(lambda _: Bench(machine, "score"))
    copies = Shared(lambda _: Bench(host, "score", replace(copy_limit(host), case="copy in host memory")))
    place = shared_workplace(machine)
    made = Shared(lambda stack: _pictures(machine, size, stack), _WRITE_SCORER + size.pictures * _DECODE)

    def case(title: str, kind: str, rows: Callable[..., list[Row]], *needs: Shared[Any]) -> suites.Case:
        return suites.Case(title, lambda: rows(*(need() for need in needs), size, title), seconds[kind], needs)

    side = f"{size.side} px"
    return [
        suites.limit_case("matmul", bench),
        case(f"scoring {size.pictures} pictures of {side}", "phase", phase_rows, bench, made),
        suites.limit_case("copy", copies),
        case(f"decoding {side}", "decoding", decoding_rows, copies, made),
        *(
            case(f"resizing {side} to 224 px, {name}", "resizing", partial(resizing_rows, resize), copies, made)
            for name, resize in (("shorter side", shorter_side), ("longest side", longest_side_padded))
        ),
        *(case(f"towers: {kind}", kind, partial(tower_rows, kind), bench, made) for kind in FLOPS),
        case(f"generating, {size.steps} steps", "generating", generating_rows, bench, place),
    ]


def _pictures(machine: Machine, size: Size, stack: ExitStack) -> Pictures:
    return Pictures(machine, size, Path(stack.enter_context(tempfile.TemporaryDirectory())))


def phase_rows(bench: Bench, made: Pictures, size: Size, title: str) -> list[Row]:
    """Returns the rows of the whole score phase."""
    expected, found = (torch.from_numpy(call()) for call in (made.one_at_a_time, made.score_phase))
    towers = made.towers()
    flops = sum(count_flops(call) for call in (lambda: towers.image(made.pictures), lambda: towers.text(made.prompts)))
    right = agrees(PHASE, [found], [expected], _tolerance(made))
    providers = [
        Provider(ALONE, made.one_at_a_time, len(made.pictures), flops=flops),
        Provider(PHASE, made.score_phase, len(made.pictures), flops=flops, value_ok=right),
    ]
    return bench.case(title, providers, size.rounds)


def decoding_rows(bench: Bench, made: Pictures, size: Size, title: str) -> list[Row]:
    """Returns the rows of reading and decoding the files."""

    def read(file: Path) -> np.ndarray:
        return decode_media(file.read_bytes(), file.name)

    def decoded(threads: int) -> list[np.ndarray]:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(read, made.files))

    moved = (sum(file.stat().st_size for file in made.files) + made.pictures.nbytes) / len(made.files)
    providers = [
        Provider(
            name,
            partial(decoded, threads),
            len(made.files),
            moved_bytes=moved,
            value_ok=np.array_equal(np.stack(decoded(threads)), made.pictures),
        )
        for name, threads in ((ONE_THREAD, 1), (FOUR_THREADS, 4))
    ]
    return bench.case(title, providers, size.rounds)


def resizing_rows(resize: Callable[..., Tensor], bench: Bench, made: Pictures, size: Size, title: str) -> list[Row]:
    """Returns the rows of resizing the pictures' pixels."""
    pictures = made.pictures
    expected = torch.cat([resize(picture[None], 224) for picture in pictures])
    moved = (pictures.nbytes + expected.nbytes) / len(pictures)
    providers = []
    for name, threads in ((ONE_THREAD, 1), (FOUR_THREADS, 4)):
        call = partial(resize, pictures, 224, threads=threads)
        right = torch.equal(call(), expected)
        providers.append(Provider(name, call, len(pictures), moved_bytes=moved, value_ok=right))
    return bench.case(title, providers, size.rounds)


def tower_rows(kind: str, bench: Bench, made: Pictures, size: Size, title: str) -> list[Row]:
    """Returns the rows of a tower: `image` on pictures that already have its size, or `text` on prompts."""
    towers, pictures = made.towers(), _drawn(size.pictures, 224)
    given: Sequence[str] | np.ndarray = pictures if kind == "image" else made.prompts

    def embedded(at_once: int) -> Tensor:
        parts = [given[start : start + at_once] for start in range(0, len(given), at_once)]
        with torch.inference_mode():
            rows = [towers.image(np.asarray(part)) if kind == "image" else towers.text(list(part))[0] for part in parts]
        return torch.cat(rows)

    flops, expected = count_flops(lambda: embedded(len(given))), embedded(1)
    right = agrees(title, [embedded(len(given))], [expected], _tolerance(made))
    providers = [
        Provider(ALONE, partial(embedded, 1), len(given), flops=flops),
        Provider(BATCHES, partial(embedded, len(given)), len(given), flops=flops, value_ok=right),
    ]
    return bench.case(title, providers, size.rounds)


def generating_rows(bench: Bench, place: Workplace, size: Size, title: str) -> list[Row]:
    """Returns the rows of generating pictures with the command's own batches."""
    prompts = [caption(scene(5, index)) for index in range(size.generated)]
    family = load_family(place.config(), place.machine.device)

    def generated(batch: int) -> Tensor:
        sampler = {"name": "ddim", "steps": size.steps, "guidance": 7.5, "batch": batch}
        made = batches_of(family, place.config(sampler=sampler), prompts, 0)
        return torch.from_numpy(np.concatenate([made.generate(places) for places in made.batches()]))

    expected, found = generated(1), generated(size.batch)
    right = agrees("generating", [found], [expected], 1e-2 if place.machine.precision == "fp32" else 0.25)
    flops, batches = place.flops() * 2 * size.steps * size.generated, partial(generated, size.batch)
    providers = [
        Provider(ALONE, partial(generated, 1), size.generated, flops=flops),
        Provider(f"batches of {size.batch}", batches, size.generated, flops=flops, value_ok=right),
    ]
    return bench.case(title, providers, size.rounds)


def _tolerance(made: Pictures) -> float:
    return 1e-4 if made.dtype == torch.float32 else 1e-2
