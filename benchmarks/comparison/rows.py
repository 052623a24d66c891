"""The methods that are compared, their settings, and the training runs that this takes.

Every run trains the embedded pipeline. What is not set here is as in `demo.yaml`, with `sft_weight` 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.ablations.rows import DEVELOPMENT_SEED, GUIDANCE, MADE, REPORT_SEEDS

BUDGETS = {"pairs": 5120, "samples": 1280, "rows": 71_680}
"""Where a run is read: SePPO's 40 updates of 128 pairs, their samples, and the rows they pass through the network."""
ENOUGH = 0.98  # share of a budget from which it counts as reached: updates are whole
PROMPTS = 600  # as in the ablation, so that its rows can stand beside these
RATE_SHARE = 0.5  # share of the rows after which learning rates are compared
STUDIES = ("rates", "table")
OFF_POLICY_RATES, ON_POLICY_RATES = (3e-5, 1e-4, 3e-4), (1e-5, 3e-5, 1e-4)
FIRST_STAGE_UPDATES = 40  # of fine-tuning before DITTO; their rows count as its own, and use up the pairs
MOST_UPDATES = 2000  # a run ends by the rows it has used, long before


@dataclass(frozen=True)
class Row:
    """A method in the tables.

    Attributes:
        title: the title in the tables.
        objective: the training objective.
        sees: what it learns from: winners, labels, or the judge as reward.
        settings: settings that differ from the recipe's, `section.key` to value.
        rates: the learning rates to try.
        by_judge: whether the judge scores its own samples in training; its scores are then no evidence.
        second_stage: whether it starts from fine-tuned weights.
    """

    title: str
    objective: str
    sees: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    rates: tuple[float, ...] = OFF_POLICY_RATES
    by_judge: bool = False
    second_stage: bool = False

    @property
    def guidance(self) -> tuple[float, ...]:
        """The guidance scales at which its pictures are judged: those of all rows, and the one it samples with."""
        own = self.settings.get("sampler.guidance")
        return GUIDANCE if own is None or own in GUIDANCE else (*GUIDANCE, own)


_LABELS = MADE | {"reference.uses": 1}
_REWARD = {
    "rl.reward": "shapes",
    "data.prompt_dropout": 0.0,
    "reference.uses": 1,
    "sampler.steps": 8,
    "sampler.guidance": 1.0,
}


def _on_policy(title: str, objective: str, settings: Mapping[str, Any]) -> Row:
    return Row(title, objective, "the judge", _REWARD | dict(settings), ON_POLICY_RATES, by_judge=True)


_GROUPS = {"rl.samples_per_prompt": 8, "train.pairs_per_update": 64, "train.updates_per_iteration": 2}
ROWS = {
    "sft-labels": Row("SFT on the labelled winners", "sft", "winners that the judge chose", _LABELS),
    # With as many demonstrations as an iteration has pairs each is sampled again in every iteration, and is replayed.
    "ditto": Row(
        "DITTO, after SFT", "ditto", "winners",
        {"data.source": "shapes:256:11", "reference.uses": 1, "train.updates_per_iteration": 2}, second_stage=True,
    ),
    "diffusion-dpo": Row("Diffusion-DPO", "diffusion-dpo", "the judge's labels", _LABELS),
    "diffusion-rpo": Row("Diffusion-RPO", "diffusion-rpo", "the judge's labels", _LABELS),
    "mapo": Row("MaPO", "mapo", "the judge's labels", _LABELS | {"train.beta": 0.1}),
    # Half of the others' beta, as KTO's has no factor 1/2.
    "kto": Row("Diffusion-KTO", "kto", "the judge's labels", _LABELS | {"train.beta": 250.0}),
    "seppo-judged": Row(
        "SePPO, signs by the judge", "seppo-judged", "winners, the judge", {"reference.judge": "shapes"}, by_judge=True
    ),
    "ddpo": _on_policy("DDPO", "ddpo", _GROUPS | {"rl.prompt_count": 8}),
    "grpo": _on_policy("GRPO", "grpo", _GROUPS | {"rl.window": (1, 6)}),
    "nft": _on_policy("DiffusionNFT", "nft", _GROUPS | {"reference.uses": 8, "train.pairs_per_update": 512}),
    "d3po": _on_policy("D3PO", "d3po", {"train.updates_per_iteration": 1, "train.beta": 0.1}),
    "spo": _on_policy(
        "SPO, candidates judged as predicted",
        "spo",
        {
            "train.updates_per_iteration": 1, "train.pairs_per_update": 32, "train.beta": 10.0, "rl.plain_steps": 1,
            "rl.gap": 0.1,
        },
    ),
}  # fmt: skip
FROM_ABLATION = {"sft": "SFT", "seppo": "SePPO", "spin": "SPIN-Diffusion"}
"""Rows that `benchmarks.ablation` trained, with their titles; all of them see winners."""


@dataclass(frozen=True)
class Piece:
    """One training run and its judgements.

    Attributes:
        study: one of `STUDIES`.
        row: a key of `ROWS`.
        rate: the learning rate.
        seed: the training seed.
    """

    study: str
    row: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """The name of the piece's result file, without suffix."""
        return f"{self.study}-{self.row}-{self.rate:g}-seed{self.seed}"

    def settings(self) -> dict[str, Any]:
        """Returns the settings that differ from the recipe's, `section.key` to value."""
        row = ROWS[self.row]
        return {
            "objective": row.objective,
            "seed": self.seed,
            "train.learning_rate": self.rate,
            "train.updates": MOST_UPDATES,
            "train.sft_weight": 0.0,
            **row.settings,
        }


def pieces(study: str, rates: Mapping[str, float]) -> Iterator[Piece]:
    """Yields the pieces of a study; those of the table seed by seed, so that partial results cover all rows.

    Args:
        study: one of `STUDIES`.
        rates: the learning rate of each row; not needed for the study `rates`, which finds them.
    """
    if study == "rates":
        for row, method in ROWS.items():
            yield from (Piece(study, row, rate, DEVELOPMENT_SEED) for rate in method.rates)
    else:
        for seed in REPORT_SEEDS:
            yield from (Piece(study, row, rates[row], seed) for row in ROWS)
