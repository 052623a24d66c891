"""Scores the base model, with which every piece is compared."""

from __future__ import annotations

import time
from pathlib import Path

from benchmarks.ablations.piece import FULL, Size, held_out, prepare
from benchmarks.ablations.rows import GUIDANCE
from benchmarks.harness.provenance import commit
from benchmarks.harness.work import write_result
from seppo_fast.config.load import read_config
from seppo_fast.evaluation.judged import REPORT, judged_model

BASE = "base"


def run_base(results: str, size: Size = FULL) -> None:
    """Judges the base on the report prompts, in this process and on one thread, and writes the result."""
    began = time.perf_counter()
    prepare()
    config, prompts = read_config("demo.yaml"), held_out(selecting=False)[: size.prompts]
    judged = {f"{scale:g}": judged_model(config, prompts, REPORT, guidance=scale)[1] for scale in GUIDANCE}
    scores = {scale: [round(float(score), 4) for score in found] for scale, found in judged.items()}
    made = {"commit": commit(), "usual": False, "seconds": round(time.perf_counter() - began), "scores": scores}
    write_result(Path(results), BASE, made)
