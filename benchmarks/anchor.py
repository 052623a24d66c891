"""Measures SePPO's anchor test: `python -m benchmarks.anchor --config RECIPE --checkpoint RUN --judge shapes`.

SePPO rejects a pair if D_w <= 0, that is, if at one draw of (timestep, noise) the policy's denoising error on the
winner is at most the reference's. On a recipe's own model and data, with the base model as the reference, this
measures:

1. for each checkpoint, how often the sign of D_w at one draw is the sign of its mean over the pair's other draws;
2. with a judge, how well D_w and two other scores identify bad samples of the reference (area under the ROC curve,
   95 % interval by a bootstrap over pairs);
3. at policy = reference, how the mean gradients of winners and samples compare, and their denoising errors by time.
   Samples are measured as latents and after a round trip through pixels, as pictures that a model made would be.

Prompts are never dropped here, and the draws are independent of those of training. A checkpoint is the policy in a
run's newest saved state (the raw weights). Winners are judged after decoding by the VAE, like the samples. Everything
is computed by the package's own sampler, noising and forward, in the recipe's precision. Apart from the memory that the
learner's forward and backward need, 24 bytes of host memory per trained weight are needed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seppo_fast.utils.logging import quiet_libraries

quiet_libraries()

import numpy as np  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.checks.anchor_gradients import comparison, size  # noqa: E402
from benchmarks.checks.anchor_judge import Judge, Verdict, judge_of, scores_of, worse, wrong  # noqa: E402
from benchmarks.checks.anchor_model import Examples, weights_of  # noqa: E402
from benchmarks.checks.anchor_statistics import agreement, auc_of_pairs, bands, mean_by_band  # noqa: E402
from benchmarks.checks.anchor_table import anchor_table  # noqa: E402
from benchmarks.harness.provenance import provenance  # noqa: E402
from seppo_fast.config.load import read_config  # noqa: E402
from seppo_fast.distributed.processes import Processes  # noqa: E402
from seppo_fast.models.trainable import trainable  # noqa: E402
from seppo_fast.runs.checkpoint import SavedState, newest_state  # noqa: E402
from seppo_fast.runs.resume import refuse_other_content  # noqa: E402
from seppo_fast.train.setup import Setup, set_up  # noqa: E402
from seppo_fast.utils.errors import ConfigError, SeppoError  # noqa: E402
from seppo_fast.utils.logging import say, tolerant_output  # noqa: E402
from seppo_fast.utils.torch_modes import deterministic  # noqa: E402

WINNERS, SAMPLES, PIXELS = "winners", "own samples, latents", "own samples, through pixels"
WRONG, WORSE, WORSE_THAN_POLICY = "wrong", "worse than the winner", "worse than the policy's sample"
ERROR_BANDS, AGREEMENT_BANDS = 10, 4


class Anchor:
    """Measures the base first, then any number of checkpoints against it.

    Args:
        setup: model and data; the model has the base's weights.
        pairs: number of pairs, N.
        draws: draws of (timestep, noise) per pair, K.
        judge: the judge's name; None: nothing is judged.
        seed: seed of the choice of pairs and of all draws.

    Attributes:
        loser: which samples serve as losers: `SAMPLES`, or `PIXELS` if the recipe sends samples through pixels.
    """

    def __init__(self, setup: Setup, pairs: int, draws: int, judge: str | None, seed: int) -> None:
        self._setup, self._model, self._seed, self._name = setup, setup.policy, seed, judge
        self._judge: Judge | None = None if judge is None else judge_of(judge)
        self._examples = examples = Examples(setup, pairs, draws, seed)
        self._scores: dict[str, np.ndarray] = {}
        self._score("winner", examples.winners)  # first, so that an unsuitable judge fails before anything is sampled
        say(f"{pairs} samples of the base ...")
        own = examples.sampled(self._model)
        self._latents = {WINNERS: examples.winners, SAMPLES: own, PIXELS: setup.denoiser.through_pixels(own)}
        self.loser = PIXELS if setup.config.sampler.round_trip else SAMPLES  # as a rollout of the recipe makes it
        self._score("sample", self._latents[self.loser])
        say(f"denoising errors of the base, {draws} draws ...")
        self._errors = {name: examples.errors(self._model, latents) for name, latents in self._latents.items()}

    def base(self) -> dict[str, Any]:
        """Returns the measurements at policy = reference: errors by time, gradients, the AUC of m_l - m_w."""
        say("gradients at the base ...")
        bands_of = {
            name: mean_by_band(errors, self._examples.position, ERROR_BANDS) for name, errors in self._errors.items()
        }
        found: dict[str, Any] = {"errors": bands_of, "gradients": self._gradients()}
        if self._judge is not None:
            found["judged"] = self._means()
            found["auc"] = self._auc({"m_l - m_w": self._errors[self.loser] - self._errors[WINNERS]}, self._verdicts())
        return found

    def checkpoint(self, saved: SavedState, name: str) -> dict[str, Any]:
        """Returns the measurements of a run's policy against the base."""
        say(f"{name}, after update {saved.update} ...")
        with weights_of(self._model, saved) as distance:
            winner, loser = (self._examples.errors(self._model, self._latents[of]) for of in (WINNERS, self.loser))
            if self._judge is not None:
                own = self._examples.sampled(self._model)
                rolled = self._setup.denoiser.through_pixels(own) if self.loser == PIXELS else own
                self._score("policy's sample", rolled)
        d_w, d_l = winner - self._errors[WINNERS], loser - self._errors[self.loser]
        where = bands(self._examples.position, AGREEMENT_BANDS)
        found = {
            "run": name,
            "update": saved.update,
            "weight_distance": distance,
            "mean_d_w": float(d_w.mean()),
            "mean_abs_d_w": float(np.abs(d_w).mean()),
            "agreement": agreement(d_w),
            "agreement_by_band": [agreement(d_w, where == band) for band in range(AGREEMENT_BANDS)],
        }
        if self._judge is not None:
            found["judged"] = self._means()
            scores = {"-D_w": -d_w, "D_l - D_w": d_l - d_w, "m_l - m_w": loser - winner}
            better = worse(self._scores["sample"], self._scores["policy's sample"])
            found["auc"] = self._auc(scores, self._verdicts() | {WORSE_THAN_POLICY: better})
        return found

    def _gradients(self) -> dict[str, Any]:
        draws = {"draws": self._errors[WINNERS].size}
        winners = self._examples.gradients(self._model, self._latents[WINNERS])
        found = {WINNERS: size(winners) | draws}
        for name in (SAMPLES, PIXELS):
            others = self._examples.gradients(self._model, self._latents[name])
            found[name] = size(others) | draws | {"against_winners": comparison(winners, others)}
        return found

    def _score(self, what: str, latents: Tensor) -> None:
        if self._judge is not None:
            pictures = self._setup.family.decode(latents)
            self._setup.family.park_encoders()
            self._scores[what] = scores_of(self._judge, self._examples.prompts, pictures)

    def _means(self) -> dict[str, Any]:
        scored = {what: scores[np.isfinite(scores)] for what, scores in self._scores.items()}
        return {
            what: {"mean": float(scores.mean()) if len(scores) else None, "pairs": len(scores)}
            for what, scores in scored.items()
        }

    def _verdicts(self) -> dict[str, Verdict]:
        sample = self._scores["sample"]
        return {WRONG: wrong(sample, self._name or ""), WORSE: worse(sample, self._scores["winner"])}

    def _auc(self, scores: dict[str, np.ndarray], verdicts: dict[str, Verdict]) -> list[dict[str, Any]]:
        return [
            {"verdict": verdict, "score": score}
            | {
                of: auc_of_pairs(used, *answer, self._seed)
                for of, used in {"one_draw": values, "mean_of_draws": values.mean(axis=1, keepdims=True)}.items()
            }
            for verdict, answer in verdicts.items()
            for score, values in scores.items()
        ]


def anchor(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures what the command line requests and returns the result.

    Raises:
        ConfigError, DataError, CheckpointError, NonFiniteError: the message says what is wrong and what to do.
    """
    started, origin = time.perf_counter(), provenance("benchmarks.anchor")
    least = {"--pairs": arguments.pairs, "--draws": arguments.draws}
    for option, value in least.items():
        if value < 2:
            raise ConfigError(f"{option} {value}: at least 2 are needed")
    if arguments.judge is not None:
        judge_of(arguments.judge)  # fails before anything is loaded
    config = read_config(arguments.config)
    runs = [(run, _state(run)) for run in arguments.checkpoint]
    if arguments.json:
        _make_room(arguments.json)
    with deterministic(config.model.deterministic), tempfile.TemporaryDirectory() as nowhere:
        # Another output, to which nothing is written: the recipe's own folder may hold a run.
        setup = set_up(config.model_copy(update={"output": f"{nowhere}/run"}), Processes(), None)
        _check_fit(setup, runs, arguments.pairs)
        measured = Anchor(setup, arguments.pairs, arguments.draws, arguments.judge, arguments.seed)
        found = {
            "base": measured.base(),
            "checkpoints": [measured.checkpoint(saved, run.resolve().name) for run, saved in runs],
        }
    return origin | {
        "config": Path(arguments.config).name,
        "precision": config.model.precision,
        "trained": config.model.train,
        "trained_weights": sum(weight.numel() for weight in trainable(setup.policy).values()),
        "sampler": f"{config.sampler.name}, {config.sampler.steps} steps, guidance {config.sampler.guidance:g}",
        "pairs": arguments.pairs,
        "draws": arguments.draws,
        "seed": arguments.seed,
        "judge": arguments.judge,
        "x_l": measured.loser,
        **found,
        "seconds": time.perf_counter() - started,
    }


def _make_room(file: Path) -> None:
    """Creates the folder of the result before hours are spent on it; refuses a path that is a folder."""
    if file.is_dir():
        raise ConfigError(f"--json {file}: is a folder; name the file to write, such as {file / 'anchor.json'}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise ConfigError(f"--json {file}: {problem}") from problem


def _state(run: Path) -> SavedState:
    saved = newest_state(run)
    if saved is None:
        raise ConfigError(f"--checkpoint {run}: not the folder of a run with a saved state")
    return saved


def _check_fit(setup: Setup, runs: Sequence[tuple[Path, SavedState]], pairs: int) -> None:
    """Refuses more pairs than the data has examples, and runs that started from another model."""
    if pairs > len(setup.cache):
        raise ConfigError(f"--pairs {pairs}: the data has only {len(setup.cache)} examples")
    for run, saved in runs:
        instead = f"--checkpoint {run} started from another model than the recipe's; give the recipe it was run with"
        refuse_other_content(saved, {"model": (setup.fingerprints["model"],)}, instead)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a YAML file, or a recipe that ships with the package")
    parser.add_argument(
        "--checkpoint", type=Path, nargs="+", default=[], metavar="RUN", help="folders of runs; default: base only"
    )
    parser.add_argument("--pairs", type=int, default=256, help="number of examples, chosen by the seed")
    parser.add_argument("--draws", type=int, default=12, help="draws of (timestep, noise) per pair")
    parser.add_argument(
        "--judge",
        help="shapes, or module:function, which is called with N prompts and N uint8 pictures and returns N scores, "
        "higher is better; a sample counts as wrong below 1 (shapes) or below the samples' median",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of pairs, draws and bootstrap; not of training")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Measures, prints the tables and writes the requested file; returns the exit code."""
    arguments = _parser().parse_args(words)
    with tolerant_output():
        try:
            result = anchor(arguments)
        except SeppoError as error:
            print(f"anchor: {error}", file=sys.stderr)
            return error.exit_code
        print(anchor_table(result))
        if arguments.json:
            arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
