"""The objectives as a table: where negatives come from, which past policy is the reference, and which flipper is used.

With D = m - r (policy error minus reference error, per sample), the loss `preference` is
`mean softplus((beta/2) (D_w - a D_l))`; its rows differ in the sign `a` and in where the losers `x_l` and the reference
errors `r` come from. The other losses are those of `seppo_fast.methods.losses`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from seppo_fast.config.vocabulary import Draw, Flipper

SCORER: Literal["scorer"] = "scorer"
"""The flipper of objectives whose sign is a scorer's verdict, not the anchor test's."""
OFFSET_ROWS = 64
"""Rows of an update, over all processes, from which KTO's offset z_0 is estimated. The public code takes 8."""


@dataclass(frozen=True)
class Objective:
    """One objective, a row of the table.

    Attributes:
        flipper: the values of the sign `a`: `adaptive` (+1 rejects the loser, -1 learns from it), `indicator` (+1, or 0
            drops the loser), `never` (always +1), `scorer` (+1 unless a scorer finds the loser better, then -1).
        draw: which past policy is the reference: `uniform` over all so far, `newest`, `initial` (checkpoint 0);
            None: no reference at all.
        negatives: `generated` by the drawn reference, the `labelled` losers of the data, or None.
        winners: the `preferred` image of each example (SePPO-w), or a `random` one of its two images (SePPO-r).
        source: the publication that the row comes from.
        loss: the loss, `preference` as above (or SFT's), or one of its own.
        reward: which samples a scorer rewards: `final` ones, or candidates at each of the sampler's `steps`; None:
            the method learns from no reward.
        process: the method trains on noised data (`forward`), or on steps of the sampler (`reverse`).
        samples_per_prompt: the default of `rl.samples_per_prompt`.
        replay: whether samples of all iterations are kept and compared (DITTO); the drawn past policy then only
            generates, and the reference is checkpoint 0.
    """

    flipper: Flipper | Literal["scorer"]
    draw: Draw | None
    negatives: Literal["generated", "labelled"] | None
    winners: Literal["preferred", "random"]
    source: str
    loss: Literal["preference", "mapo", "kto", "rpo", "policy-gradient", "step-preference", "nft"] = "preference"
    reward: Literal["final", "steps"] | None = None
    process: Literal["forward", "reverse"] = "forward"
    samples_per_prompt: int = 1
    replay: bool = False

    @property
    def needs_pairs(self) -> bool:
        """Whether the data must contain two images per prompt."""
        return self.negatives == "labelled" or self.winners == "random"

    @property
    def needs_labels(self) -> bool:
        """Whether each example must be labelled as liked or disliked."""
        return self.loss == "kto"


def _rewarded(
    source: str,
    loss: Literal["policy-gradient", "step-preference", "nft"],
    *,
    reward: Literal["final", "steps"] = "final",
    process: Literal["forward", "reverse"] = "reverse",
    samples: int = 1,
) -> Objective:
    """Returns a row that learns from a reward of the newest past policy's own samples."""
    return Objective("never", "newest", None, "preferred", source, loss, reward, process, samples)


OBJECTIVES: dict[str, Objective] = {
    "seppo": Objective("adaptive", "uniform", "generated", "preferred", "SePPO (SePPO-w), eq. 8-10 and Algorithm 1"),
    "seppo-r": Objective("adaptive", "uniform", "generated", "random", "SePPO-r: a random one of the two images"),
    "seppo-indicator": Objective("indicator", "uniform", "generated", "preferred", "SePPO table 4: flip to 0, not -1"),
    "seppo-never": Objective("never", "uniform", "generated", "preferred", "SePPO table 4: without the anchor test"),
    "seppo-initial": Objective("adaptive", "initial", "generated", "preferred", "SePPO table 4: ref = 0"),
    "seppo-newest": Objective("adaptive", "newest", "generated", "preferred", "SePPO table 4: ref = k-1"),
    "seppo-judged": Objective(SCORER, "uniform", "generated", "preferred", "SePPO, its sign a scorer's (this project)"),
    "spin": Objective("never", "newest", "generated", "preferred", "SPIN-Diffusion"),
    "ditto": Objective("never", "newest", "generated", "preferred", "DITTO, for pictures", replay=True),
    "diffusion-dpo": Objective("never", "initial", "labelled", "preferred", "Diffusion-DPO, eq. 14"),
    "diffusion-rpo": Objective("never", "initial", "labelled", "preferred", "Diffusion-RPO (no code is public)", "rpo"),
    "mapo": Objective("never", None, "labelled", "preferred", "MaPO: margin-aware, without a reference", "mapo"),
    "kto": Objective("never", "initial", None, "preferred", "Diffusion-KTO: liked and disliked examples", "kto"),
    "ddpo": _rewarded("DDPO: the clipped policy gradient on the sampler's steps", "policy-gradient"),
    "grpo": _rewarded("GRPO on an SDE (Flow-GRPO, DanceGRPO)", "policy-gradient", samples=8),
    "nft": _rewarded("DiffusionNFT", "nft", process="forward", samples=8),
    "d3po": _rewarded("D3PO: pairs of samples, compared by reward", "step-preference", samples=2),
    "spo": _rewarded("SPO: candidates compared at each step", "step-preference", reward="steps"),
    "sft": Objective("never", None, None, "preferred", "supervised fine-tuning on the winners"),
}
