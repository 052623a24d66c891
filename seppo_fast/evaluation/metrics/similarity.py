"""PSNR and SSIM of pictures or clips with their references, pair by pair."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

_WINDOW, _SIGMA = 11, 1.5  # pixels
_K1, _K2 = 0.01, 0.03
_PERFECT = 100.0  # dB, for a frame with a mean squared error below 1e-10


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Computes the peak signal-to-noise ratio, 20 log10(1 / sqrt(mse)) with values in [0, 1].

    The error is averaged over all pixels and channels of a frame, the ratio over the frames of a clip. A frame with an
    error below 1e-10 counts as 100 dB. (JunyaoHu/common_metrics_on_video_quality, commit 5f75173.)

    Args:
        a: pictures `(N, H, W, 3)` or clips `(N, F, H, W, 3)`, uint8.
        b: their references, of the same shape.

    Returns:
        `(N,)` float64 in dB.

    Raises:
        ValueError: the shapes differ or are others, or the dtype is not uint8.
    """
    return _per_frame(a, b, _psnr_frame)


def ssim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Computes the structural similarity (Wang et al. 2004), averaged over pixels, channels and frames.

    Window: an 11 x 11 Gaussian with sigma 1.5; K1 = 0.01, K2 = 0.03, population covariance. Only windows that lie
    inside the picture count. Each channel is compared by itself. (JunyaoHu/common_metrics_on_video_quality, commit
    5f75173; equals scikit-image with `gaussian_weights=True, sigma=1.5, use_sample_covariance=False`.)

    Args:
        a: pictures `(N, H, W, 3)` or clips `(N, F, H, W, 3)`, uint8, H and W at least 11.
        b: their references, of the same shape.

    Returns:
        `(N,)` float64, at most 1.

    Raises:
        ValueError: as `psnr`, or a side is shorter than 11 pixels.
    """
    if min(np.shape(a)[-3:-1], default=0) < _WINDOW:
        raise ValueError(f"a: pictures must have at least {_WINDOW} x {_WINDOW} pixels, got shape {np.shape(a)}")
    return _per_frame(a, b, _ssim_frame)


def _per_frame(a: np.ndarray, b: np.ndarray, compare: Callable[[np.ndarray, np.ndarray], float]) -> np.ndarray:
    """Averages `compare` of two frames (H, W, 3) in [0, 1] over each clip; one frame at a time is in float64."""
    first, second = np.asarray(a), np.asarray(b)
    if first.ndim not in (4, 5) or first.shape[-1] != 3 or first.shape != second.shape or first.size == 0:
        raise ValueError(
            f"a, b: expected two arrays of the same shape (N, H, W, 3) or (N, F, H, W, 3), got {first.shape} and "
            f"{second.shape}"
        )
    if first.dtype != np.uint8 or second.dtype != np.uint8:
        raise ValueError(f"a, b: expected uint8, got {first.dtype} and {second.dtype}")
    height, width = first.shape[-3:-1]
    clips = zip(first.reshape(len(first), -1, height, width, 3), second.reshape(len(first), -1, height, width, 3))
    return np.array([np.mean([compare(x / 255, y / 255) for x, y in zip(*pair)]) for pair in clips])


def _psnr_frame(x: np.ndarray, y: np.ndarray) -> float:
    error = float(np.mean((x - y) ** 2))
    return _PERFECT if error < 1e-10 else -10 * float(np.log10(error))


def _ssim_frame(x: np.ndarray, y: np.ndarray) -> float:
    mean_x, mean_y = _smoothed(x), _smoothed(y)
    variance_x, variance_y = _smoothed(x * x) - mean_x**2, _smoothed(y * y) - mean_y**2
    covariance = _smoothed(x * y) - mean_x * mean_y
    c1, c2 = _K1**2, _K2**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return float(np.mean(luminance * (2 * covariance + c2) / (variance_x + variance_y + c2)))


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Filters (H, W, C) along both axes with the Gaussian; the result lacks half a window at each border."""
    ticks = np.arange(_WINDOW) - _WINDOW // 2
    weights = np.exp(-(ticks**2) / (2 * _SIGMA**2))
    weights /= weights.sum()
    for axis in (0, 1):
        values = np.lib.stride_tricks.sliding_window_view(values, _WINDOW, axis=axis) @ weights
    return values
