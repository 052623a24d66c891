"""The rows and regimes of the ablation, and the training runs they need, each an independent piece of work.

Every run uses `demo.yaml` with `sft_weight` 0 and the settings of its row and regime. Learning rates are chosen on
development prompts and a separate training seed; the reported results come from other prompts and seeds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.ablations.signs import LOSER_SIGN, RANDOM_SIGN

UPDATES = 40
FIRST_STAGE_SEED = 1000  # added to a run's seed, so that the two stages draw different examples, times and noise
EQUAL_COMPUTE = 187  # updates of SFT that run as many rows through the network as 40 of SePPO; `row_forwards` shows it
RATES = (3e-5, 1e-4)
DEVELOPMENT_SEED, REPORT_SEEDS, REGIME_SEEDS = 100, (1, 2, 3), (1, 2)
GUIDANCE = (3.0, 1.5)
SEPPO, SFT = "seppo", "sft"
FIRST_STAGE_UPDATES = 120  # SFT updates before the regime that starts from SFT

STUDIES = ("rates", "table", "regimes")


@dataclass(frozen=True)
class Row:
    """A method in the tables.

    Attributes:
        title: the title in the tables.
        objective: the training objective.
        settings: settings that differ from the recipe's, `section.key` to value.
        stops: updates after which it is judged.
    """

    title: str
    objective: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    stops: tuple[int, ...] = (UPDATES,)


ROWS = {
    SFT: Row("SFT on the same winners, times and noises", SFT, stops=(UPDATES, EQUAL_COMPUTE)),
    "sft-once": Row("SFT, each winner once (four times as many)", SFT, {"reference.uses": 1}, (UPDATES, EQUAL_COMPUTE)),
    SEPPO: Row("SePPO", SEPPO),
    "seppo-sft-4": Row("SePPO, sft_weight 4 (the demo)", SEPPO, {"train.sft_weight": 4.0}),
    "random-sign": Row("SePPO, its signs dealt at random", RANDOM_SIGN),
    "seppo-never": Row("SePPO without the anchor test", "seppo-never"),
    "seppo-indicator": Row("SePPO, indicator flipper", "seppo-indicator"),
    "spin": Row("SPIN-Diffusion", "spin"),
    "spin-safeguard": Row("SPIN-Diffusion, safeguard", "spin", {"train.safeguard": True}),
    "seppo-initial": Row("SePPO, ref = 0", "seppo-initial"),
    "seppo-newest": Row("SePPO, ref = k-1", "seppo-newest"),
    "loser-sign": Row("SePPO, reject where m_l > m_w", LOSER_SIGN),
}

AFTER_SFT = "after-sft"
MADE = {"data.source": "shapes-made:1024"}
REGIMES: dict[str, dict[str, Any]] = {
    AFTER_SFT: {},  # starts from the weights of the first stage, see `piece.first_stage`
    "64-winners": {"data.source": "shapes:64:11"},
    "wrong-captions": {},  # its data is written first, see `piece.wrong_captions`
    "model-made": MADE,
}
REGIME_ROWS = (SFT, SEPPO, "random-sign", "seppo-sft-4")
# Further rows for model-made winners: labelled losers exist there, and SFT on a random picture is the control.
MADE_ROWS = {
    "diffusion-dpo": Row("Diffusion-DPO on the labels", "diffusion-dpo"),
    "sft-random": Row("SFT on a random picture", SFT, {"data.source": "shapes-made:1024:random"}),
}
ALL_ROWS = ROWS | MADE_ROWS


@dataclass(frozen=True)
class Piece:
    """One training run and its judgements.

    Attributes:
        study: one of `STUDIES`.
        row: a key of `ALL_ROWS`.
        rate: the learning rate.
        seed: the training seed.
        regime: a key of `REGIMES`; empty for rendered winners.
    """

    study: str
    row: str
    rate: float
    seed: int
    regime: str = ""

    @property
    def name(self) -> str:
        """The name of the piece's result file, without suffix."""
        where = f"{self.regime}-" if self.regime else ""
        return f"{self.study}-{where}{self.row}-{self.rate:g}-seed{self.seed}"

    @property
    def stops(self) -> tuple[int, ...]:
        """The updates after which the run is judged.

        In the study `table` these are its row's, elsewhere only `UPDATES`. A run that starts from SFT is also judged
        before its first update, as its gain is measured from there.
        """
        if self.study == "table":
            return ALL_ROWS[self.row].stops
        return (0, UPDATES) if self.regime == AFTER_SFT else (UPDATES,)

    def settings(self) -> dict[str, Any]:
        """Returns the settings that differ from the recipe's, `section.key` to value."""
        row = ALL_ROWS[self.row]
        regime = REGIMES[self.regime] if self.regime else {}
        trip = {"sampler.round_trip": True} if self.regime == "model-made" and row.objective in _GENERATE else {}
        return {
            "objective": row.objective,
            "seed": self.seed,
            "train.learning_rate": self.rate,
            "train.updates": max(self.stops),
            "train.sft_weight": 0.0,
            **regime,
            **trip,
            **row.settings,
        }


_GENERATE = {SEPPO, RANDOM_SIGN}


def pieces(study: str, rates: Mapping[str, float]) -> Iterator[Piece]:
    """Yields the pieces of a study, seed by seed, so that partial results cover all rows.

    Args:
        study: one of `STUDIES`.
        rates: the learning rate of each row; not needed for the study `rates`, which finds them.
    """
    if study == "rates":
        for row in ROWS:
            yield from (Piece(study, row, rate, DEVELOPMENT_SEED) for rate in RATES)
    elif study == "table":
        for seed in REPORT_SEEDS:
            yield from (Piece(study, row, rates[row], seed) for row in ROWS)
    else:
        for seed in REGIME_SEEDS:
            for regime in REGIMES:
                more = tuple(MADE_ROWS) if regime == "model-made" else ()
                for row in REGIME_ROWS + more:
                    yield Piece(study, row, rates.get(row, rates[SFT if row == "sft-random" else SEPPO]), seed, regime)
