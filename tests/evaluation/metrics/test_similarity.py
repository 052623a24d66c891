"""PSNR and SSIM against scikit-image and known values."""

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from seppo_fast.evaluation.metrics.similarity import psnr, ssim


def pair(*shape: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(4)
    a = rng.integers(0, 256, shape, dtype=np.uint8)
    return a, np.clip(a + rng.integers(-60, 61, shape), 0, 255).astype(np.uint8)


def reference_ssim(x: np.ndarray, y: np.ndarray) -> float:
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    return structural_similarity(x, y, channel_axis=-1, **options)


@pytest.mark.parametrize("size", [(11, 11), (37, 53), (64, 12)])
def test_pictures_equal_scikit_image(size):
    a, b = pair(3, *size, 3)
    expected = [reference_ssim(x, y) for x, y in zip(a, b)]
    np.testing.assert_allclose(ssim(a, b), expected, rtol=1e-12)
    expected = [peak_signal_noise_ratio(x, y, data_range=255) for x, y in zip(a, b)]
    np.testing.assert_allclose(psnr(a, b), expected, rtol=1e-12)


def test_a_clip_is_the_mean_over_its_frames():
    a, b = pair(2, 5, 19, 23, 3)
    b[0, 2] = a[0, 2]
    for metric in (psnr, ssim):
        frames = np.array([metric(x, y) for x, y in zip(a, b)])
        np.testing.assert_allclose(metric(a, b), frames.mean(axis=1), rtol=1e-12)


def test_known_values():
    zeros = np.zeros((8, 3, 64, 64, 3), np.uint8)
    ones = zeros + np.uint8(255)
    # The published anchor of JunyaoHu/common_metrics_on_video_quality: zeros against ones.
    np.testing.assert_allclose(ssim(zeros, ones), 1.0e-4, rtol=1e-3)
    np.testing.assert_allclose(psnr(zeros, ones), 0, atol=1e-12)
    assert (psnr(ones, ones) == 100).all()
    np.testing.assert_allclose(ssim(ones, ones), 1, rtol=1e-12)
    grey = np.full((1, 16, 16, 3), 100, np.uint8)
    np.testing.assert_allclose(psnr(grey, grey + np.uint8(51)), 20 * np.log10(5), rtol=1e-12)


def test_wrong_pictures_are_refused():
    a, b = pair(2, 16, 16, 3)
    for metric in (psnr, ssim):
        for bad in (b[:1], b[..., :2], b[0], b[:, :, :, :, None]):
            with pytest.raises(ValueError, match="a, b"):
                metric(a, bad)
        with pytest.raises(ValueError, match="uint8"):
            metric(a, b / 255)
    with pytest.raises(ValueError, match="11 x 11"):
        ssim(a[:, :10], b[:, :10])
