"""`python -m benchmarks.demos [--clips]`: a demo's gains under three training seeds; stills also with SFT to compare.

Each run writes a file when it is finished, so rerunning the command continues with the missing ones. The README shows
the picture of the first seed.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import statistics
import sys
import time
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.harness.provenance import commit, provenance
from seppo_fast.commands.demo import RECIPES, compare, demo, judged_prompts
from seppo_fast.config.load import parse_config, read_config
from seppo_fast.config.schema import Config
from seppo_fast.data.sources import open_source
from seppo_fast.evaluation.judged import prompt_sets
from seppo_fast.runs.journal import read_journal
from seppo_fast.runs.watch import intervals
from seppo_fast.train import train
from seppo_fast.utils.logging import quiet_libraries

RESULTS = Path(__file__).parent / "results"
TITLES = {"demo": "the demo", "sft": "SFT, same winners and updates"}


def settings(recipe: str, kind: str, seed: int, folder: Path) -> Config:
    """Returns a run's configuration: the demo recipe with a training seed, or SFT on the same winners, times and noise.

    Args:
        recipe: the demo's recipe.
        kind: a key of `TITLES`.
        seed: the training seed.
        folder: folder for the runs and the data cache.
    """
    tree = read_config(recipe).model_dump()
    tree |= {"seed": seed, "output": str(folder / f"{kind}-seed{seed}")}
    tree["data"]["cache"] = str(folder / "cache")
    if kind == "sft":
        tree["objective"] = "sft"
        tree["train"]["sft_weight"] = 0.0
        tree["log"]["sample_every"] = 0
    return parse_config(tree)


def run(kind: str, config: Config) -> dict[str, Any]:
    """Trains and judges one run from its beginning; returns its gains by guidance scale and how long it took."""
    folder = Path(config.output)
    shutil.rmtree(folder, ignore_errors=True)
    began = time.perf_counter()
    if kind == "demo":
        demo(config)
        compared = json.loads((folder / "result.json").read_text(encoding="utf-8"))["comparisons"]
        gains = {f"{entry['guidance']:g}": entry for entry in compared}
    else:
        with redirect_stdout(io.StringIO()):
            weights = train(config)
        prompts = judged_prompts(prompt_sets(open_source(config.data.source))[1])
        scales = config.evaluation.guidance or (config.sampler.guidance,)
        gains = {f"{scale:g}": asdict(compare(config, prompts, weights, scale).paired) for scale in scales}
    told = {"title": TITLES[kind], "kind": kind, "seed": config.seed, "commit": commit(), "gains": gains}
    return told | {"warnings": list(intervals(read_journal(folder))), "seconds": time.perf_counter() - began}


def summary(rows: list[dict[str, Any]], clips: bool) -> dict[str, Any]:
    """Returns the result to commit: all runs, the demo's first."""
    first = next(iter(rows[0]["gains"].values()))
    return provenance("benchmarks.demos") | {
        "command": f"python -m benchmarks.demos{' --clips' * clips}",
        "commit": ", ".join(sorted({row["commit"] for row in rows})),
        "clips": clips,
        "items": first["items"],
        "base": {scale: gain["base"] for scale, gain in rows[0]["gains"].items()},
        "seconds": rows[0]["seconds"],  # duration of the first seed's demo
        "cores": os.cpu_count(),
        "rows": sorted(rows, key=lambda row: (row["kind"] != "demo", row["seed"])),
    }


def sft_lines(result: dict[str, Any]) -> tuple[str, ...]:
    """Returns the line about SFT that a demo prints: its mean gain over the seeds, by guidance scale."""
    rows = [row for row in result["rows"] if row["kind"] == "sft"]
    gains = {scale: statistics.fmean(row["gains"][scale]["difference"] for row in rows) for scale in result["base"]}
    told = ", ".join(f"{gain:+.3f} at guidance {scale}" for scale, gain in gains.items())
    return (f"SFT alone on the same winners, at under a quarter of the compute: {told} (mean of {len(rows)} seeds)",)


def main(words: list[str] | None = None) -> int:
    """Runs the missing runs, then writes the result; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", action="store_true", help="the demo on clips")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="training seeds")
    parser.add_argument("--scratch", type=Path, default=Path("runs/demos"), help="folder for runs and their results")
    parser.add_argument("--json", type=Path, help="file to write the result to; default: among the committed results")
    arguments = parser.parse_args(words)
    quiet_libraries()
    name = "demo-video" if arguments.clips else "demo"
    folder = arguments.scratch / name
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for kind in ("demo",) if arguments.clips else TITLES:
        for seed in arguments.seeds:
            file = folder / f"{kind}-seed{seed}.json"
            if not file.exists():
                made = run(kind, settings(RECIPES[arguments.clips], kind, seed, folder))
                staging = file.with_name(f".tmp-{file.name}")
                staging.write_text(json.dumps(made) + "\n", encoding="utf-8")
                os.replace(staging, file)
                print(f"{made['title']}, seed {seed}: {made['seconds']:.0f} s", flush=True)
            rows.append(json.loads(file.read_text(encoding="utf-8")))
    result = arguments.json or RESULTS / f"{name}.json"
    result.write_text(json.dumps(summary(rows, arguments.clips), indent=1) + "\n", encoding="utf-8")
    if arguments.json is None:
        picture = "webp" if arguments.clips else "png"
        shutil.copyfile(folder / f"demo-seed{arguments.seeds[0]}" / f"demo.{picture}", RESULTS / f"{name}.{picture}")
    print(f"wrote {result}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
