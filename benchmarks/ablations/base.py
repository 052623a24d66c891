"""The base's own scores, which every piece is compared with."""

from __future__ import annotations

from typing import Any

from benchmarks.ablations.piece import FULL, Size, held_out, prepare
from benchmarks.ablations.rows import GUIDANCE
from benchmarks.harness.provenance import commit
from seppo_fast.config.load import read_config
from seppo_fast.evaluation.judged import DEVELOPMENT, REPORT, judged_model


def run_base(size: Size = FULL) -> dict[str, Any]:
    """Judges the base in this process, on one thread, on development and on report prompts."""
    prepare()
    config, made = read_config("demo.yaml"), dict[str, Any](commit=commit())
    for name, selecting, seed in (("development", True, DEVELOPMENT), ("report", False, REPORT)):
        prompts = held_out(selecting)[: size.prompts]
        judged = {f"{scale:g}": judged_model(config, prompts, seed, guidance=scale)[1] for scale in GUIDANCE}
        made[name] = {scale: [round(float(score), 4) for score in scores] for scale, scores in judged.items()}
    return made
