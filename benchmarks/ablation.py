"""`make ablation`: the rows of the paper's table 4 on the embedded world, at equal updates and data.

Every method trains from `demo.yaml` with nothing changed but the objective and the learning rate. The learning rate of
each is the better of two on development prompts and a training seed of its own; the table comes from other
prompts and other training seeds. About half an hour on two cores.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness.provenance import provenance
from seppo_fast.config.load import parse_config, read_config
from seppo_fast.config.schema import Config
from seppo_fast.data.sources import open_source
from seppo_fast.evaluation.judged import DEVELOPMENT, REPORT, judged_model, prompt_sets
from seppo_fast.evaluation.statistics import given, paired_difference
from seppo_fast.train import train
from seppo_fast.utils.files import free_name
from seppo_fast.utils.logging import quiet_libraries

METHODS = ("sft", "seppo", "seppo-indicator", "seppo-never", "seppo-initial", "seppo-newest")
LEARNING_RATES = (1e-4, 3e-4)
SELECTION_SEED, REPORT_SEEDS = 100, (1, 2)
RESULT = Path(__file__).parent / "results" / "ablation.json"


def one_run(method: str, learning_rate: float, seed: int, folder: str, updates: int, selecting: bool) -> list[float]:
    """Trains one method in a process of its own and returns its score on each prompt."""
    quiet_libraries()
    torch.set_num_threads(1)
    config = demo_config(folder, updates, method, learning_rate, seed)
    with redirect_stdout(io.StringIO()):  # two dozen runs at once would be unreadable; each has its log.jsonl
        weights = train(config)
    return scores_of(weights, config, selecting)


def scores_of(weights: Path | None, config: Config, selecting: bool) -> list[float]:
    """The judge's score of a run's weights, or of its base, on each development or report prompt."""
    development, report = prompt_sets(open_source(config.data.source))
    chosen = (development, DEVELOPMENT) if selecting else (report, REPORT)
    return judged_model(config, *chosen, weights)[1].tolist()


def demo_config(folder: str, updates: int, method: str, learning_rate: float, seed: int) -> Config:
    """`demo.yaml` with another objective, learning rate, seed and folder, and no pictures."""
    tree = read_config("demo.yaml").model_dump()
    tree |= {"objective": method, "seed": seed, "output": f"{folder}/{method}-{learning_rate:g}-seed{seed}"}
    tree["train"] |= {"learning_rate": learning_rate, "updates": updates or tree["train"]["updates"]}
    tree["log"]["sample_every"] = 0
    return parse_config(tree)


def ablation(folder: str, updates: int, workers: int) -> dict[str, object]:
    """Selects learning rates, runs every method on the report seeds, and compares each with the base."""
    started, origin = time.perf_counter(), provenance("benchmarks.ablation")
    demo = read_config("demo.yaml")
    base = scores_of(None, demo, selecting=False)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        trials = {
            (method, rate): pool.submit(one_run, method, rate, SELECTION_SEED, folder, updates, True)
            for method in METHODS
            for rate in LEARNING_RATES
        }
        selection = {key: _announce("selection", *key, trial.result()) for key, trial in trials.items()}
        best = {method: max(LEARNING_RATES, key=lambda rate: selection[method, rate]) for method in METHODS}
        runs = {
            (method, seed): pool.submit(one_run, method, best[method], seed, folder, updates, False)
            for method in METHODS
            for seed in REPORT_SEEDS
        }
        scores = {key: run.result() for key, run in runs.items()}
    rows: list[dict[str, object]] = []
    for method in METHODS:
        seeds = [scores[method, seed] for seed in REPORT_SEEDS]
        # One item a prompt: its scores under the training seeds start from one noise and are no two observations.
        difference = paired_difference(base, np.mean(seeds, axis=0))
        rows.append(
            {"method": method, "learning_rate": best[method], "seed_means": [float(given(s).mean()) for s in seeds]}
            | {"selection": {f"{rate:g}": selection[method, rate] for rate in LEARNING_RATES}}
            | asdict(difference)
        )
    return origin | {
        "cores": os.cpu_count(),
        "seconds": time.perf_counter() - started,
        "updates": updates or demo.train.updates,
        "pairs_per_update": demo.train.pairs_per_update,
        "base": float(given(base).mean()),
        "prompts": len(base),
        "training_seeds": REPORT_SEEDS,
        "rows": rows,
    }


def _announce(stage: str, method: str, learning_rate: float, scores: list[float]) -> float:
    mean = float(given(scores).mean())
    print(f"{stage}: {method} at {learning_rate:g}: {mean:.3f}", flush=True)
    return mean


def main() -> None:
    """Runs everything and writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", help="folder of the runs; runs/ablation, or the next free runs/ablation-N")
    parser.add_argument("--updates", type=int, default=0, help="optimizer updates of each run; 0: as demo.yaml says")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time, one thread each")
    parser.add_argument("--json", type=Path, default=RESULT, help="where to write the result")
    arguments = parser.parse_args()
    quiet_libraries()
    output = arguments.output or str(free_name(Path("runs/ablation")))
    result = ablation(output, arguments.updates, arguments.workers)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"base {result['base']:.3f}; wrote {arguments.json} after {result['seconds']:.0f} s")
    for row in result["rows"]:  # type: ignore[attr-defined]
        print(
            f"{row['method']:16s} lr {row['learning_rate']:g}  {row['other']:.3f}  difference {row['difference']:+.3f}"
        )


if __name__ == "__main__":
    main()
