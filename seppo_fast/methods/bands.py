"""Where along the forward process pairs reject, and how sure the anchor test is: sums on the device, means in the log.

A band is a quarter of the forward process, the first with the least noise. At low noise a small share of the pairs can
make up most of |logit| (SD-like models, sampled losers), which a mean over all of them hides.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from seppo_fast.loss import PreferenceLoss

BANDS = 4
_IN_BAND = {"winner_difference": "difference", "logit_abs": "logit", "aaf_rate": "reject"}
"""Mean of a band in the log, and the name of its sum."""
_COUNTS = [f"band{band}_pairs" for band in range(1, BANDS + 1)]
_UNTIED = ("untied_pairs", "untied_sum", "untied_squares")
BAND_SUMS = frozenset(
    [*_UNTIED, *_COUNTS, *(f"band{band}_{name}" for band in range(1, BANDS + 1) for name in _IN_BAND.values())]
)
"""Names of the sums, which are not means of all pairs when divided by their number."""


def band_sums(result: PreferenceLoss, progress: Tensor | None) -> dict[str, Tensor]:
    """Sums of D_w, |logit| and rejects over the pairs of each band, and of D_w and its square over untied pairs.

    Args:
        result: the loss of b pairs.
        progress: `(b,)` float32 in [0, 1]; None: no bands.

    Returns:
        Scalars on the device, float32; a value that is not finite is in the sums of its own band alone.
    """
    winner, ref_winner = result.model_error.chunk(2)[0], result.ref_error.chunk(2)[0]
    difference = winner - ref_winner
    # The exact zeros, and not those within train.tie_tol: at equal weights nothing but they tell of no difference.
    untied = (difference != 0).float()
    sums = dict(zip(_UNTIED, (untied.sum(), difference.sum(), difference.square().sum()), strict=True))
    if progress is None:
        return sums
    band = (progress * BANDS).long().clamp(0, BANDS - 1)
    inside = band == torch.arange(BANDS, device=band.device)[:, None]
    rows = {"difference": difference, "logit": result.logit.abs(), "reject": result.reject.float()}
    for name, values in {"pairs": torch.ones_like(difference), **rows}.items():
        # Not by a product with the mask: 0 times NaN is NaN.
        totals = torch.where(inside, values, 0.0).sum(1)
        sums |= {f"band{number}_{name}": total for number, total in enumerate(totals.unbind(), 1)}
    return sums


def band_averages(sums: Mapping[str, float]) -> dict[str, float]:
    """Returns what the log shows of the sums of `band_sums`.

    That is `winner_difference_band1` (mean D_w), `logit_abs_band1` and `aaf_rate_band1` up to `_band4`, without bands
    that have no pairs; and the number of pairs whose D_w is not exactly 0 (`untied_pairs`), their mean D_w
    (`untied_difference`) and its sample standard deviation (`untied_difference_sd`, from two such pairs on).
    """
    means: dict[str, float] = {}
    for number in range(1, BANDS + 1):
        if pairs := sums.get(f"band{number}_pairs"):
            means |= {f"{mean}_band{number}": sums[f"band{number}_{name}"] / pairs for mean, name in _IN_BAND.items()}
    if "untied_pairs" not in sums:
        return means
    pairs, total, squares = (sums[name] for name in _UNTIED)
    means["untied_pairs"] = pairs
    if pairs:
        means["untied_difference"] = total / pairs
    if pairs > 1:
        # Rounding can leave less than nothing; NaN stays NaN, which the order of the arguments decides.
        means["untied_difference_sd"] = max((squares - total * total / pairs) / (pairs - 1), 0.0) ** 0.5
    return means
