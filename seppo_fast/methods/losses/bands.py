"""Statistics by noise level: where along the forward process pairs reject, and how certain the anchor test is.

Sums are taken on the device, and their means are logged. A band is a quarter of the forward process; band 1 has the
least noise. At low noise a small share of the pairs can make up most of |logit| (SD-like models, sampled losers), which
a mean over all pairs hides.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from seppo_fast.loss import PreferenceLoss

BANDS = 4
_IN_BAND = {"winner_difference": "difference", "logit_abs": "logit", "aaf_rate": "reject"}
"""Maps the logged name of a band's mean to the name of its sum."""
_COUNTS = [f"band{band}_pairs" for band in range(1, BANDS + 1)]
_UNTIED = ("untied_pairs", "untied_sum", "untied_squares")
BAND_SUMS = frozenset(
    [*_UNTIED, *_COUNTS, *(f"band{band}_{name}" for band in range(1, BANDS + 1) for name in _IN_BAND.values())]
)
"""Names of the sums; dividing these by the number of all pairs would not give the means to log."""


def band_sums(result: PreferenceLoss, progress: Tensor | None) -> dict[str, Tensor]:
    """Returns sums of D_w, |logit| and rejects over each band's pairs, and of D_w and its square over untied pairs.

    Args:
        result: the loss of b pairs.
        progress: `(b,)` float32 in [0, 1], how far along the forward process each pair is; None: no bands.

    Returns:
        Float32 scalars on the device, with the number of pairs of each kind. A non-finite value affects no band but its
        own.
    """
    winner, ref_winner = result.model_error.chunk(2)[0], result.ref_error.chunk(2)[0]
    difference = winner - ref_winner
    # Only an exact zero counts as a tie here, whatever train.tie_tol: equal weights give exactly 0.
    untied = (difference != 0).float()
    sums = dict(zip(_UNTIED, (untied.sum(), difference.sum(), difference.square().sum()), strict=True))
    if progress is None:
        return sums
    band = (progress * BANDS).long().clamp(0, BANDS - 1)
    inside = band == torch.arange(BANDS, device=band.device)[:, None]
    rows = {"difference": difference, "logit": result.logit.abs(), "reject": result.reject.float()}
    for name, values in {"pairs": torch.ones_like(difference), **rows}.items():
        # Not a product with the mask: 0 times NaN is NaN, which would reach every band.
        totals = torch.where(inside, values, 0.0).sum(1)
        sums |= {f"band{number}_{name}": total for number, total in enumerate(totals.unbind(), 1)}
    return sums


def band_averages(sums: Mapping[str, float]) -> dict[str, float]:
    """Returns the values to log, from the sums of `band_sums`.

    These are `winner_difference_band1` (mean D_w), `logit_abs_band1` and `aaf_rate_band1` up to `_band4`, except for
    bands without pairs; and the number of pairs whose D_w is not exactly 0 (`untied_pairs`), their mean D_w
    (`untied_difference`) and its sample standard deviation (`untied_difference_sd`, if there are at least two).
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
        # Rounding can make the variance negative. NaN stays NaN only because it is the first argument of max().
        means["untied_difference_sd"] = max((squares - total * total / pairs) / (pairs - 1), 0.0) ** 0.5
    return means
