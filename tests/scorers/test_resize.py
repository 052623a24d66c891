"""Resizing, cropping and padding against boxes computed by hand and filters written here in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from seppo_fast.scorers.resize import longest_side_padded, normalized, shorter_side

WIDE, HIGH = 300, 200


def ramp(high: int, wide: int) -> np.ndarray:
    """Returns a picture whose red grows from left to right, green from top to bottom, and blue is 255."""
    picture = np.full((high, wide, 3), 255, np.uint8)
    picture[..., 0] = np.linspace(0, 255, wide).round()
    picture[..., 1] = np.linspace(0, 255, high).round()[:, None]
    return picture


def bicubic(values: np.ndarray, size: int, a: float = -0.5) -> np.ndarray:
    """Resizes along the first axis with the antialiased cubic filter, whose support grows with the reduction."""
    scale = len(values) / size
    support = max(scale, 1.0)
    result = []
    for index in range(size):
        center = (index + 0.5) * scale
        places = np.arange(max(0, int(center - 2 * support + 0.5)), min(len(values), int(center + 2 * support + 0.5)))
        x = np.abs((places - center + 0.5) / support)
        near, far = ((a + 2) * x - (a + 3)) * x * x + 1, (((x - 5) * x + 8) * x - 4) * a
        weights = np.where(x < 1, near, np.where(x < 2, far, 0))
        result.append(np.tensordot(weights / weights.sum(), values[places].astype(np.float64), 1))
    return np.stack(result)


def resized(picture: np.ndarray, high: int, wide: int) -> np.ndarray:
    return bicubic(bicubic(picture, high).swapaxes(0, 1), wide).swapaxes(0, 1)


def test_the_shorter_side_is_resized_and_the_center_is_cropped():
    """300 x 200 becomes 336 x 224, and columns 56 to 279 remain; on its side, rows 56 to 279."""
    picture = ramp(HIGH, WIDE)
    whole = resized(picture, 224, 336)
    out = shorter_side(np.stack([picture, picture]), 224)
    assert out.dtype == torch.float32 and out.shape == (2, 3, 224, 224) and torch.equal(out[0], out[1])
    shown = out[0].permute(1, 2, 0).numpy() * 255
    assert np.abs(shown - whole[:, 56:280].clip(0, 255)).max() <= 1.01  # PIL rounds after each of the two directions
    assert np.abs(shown - whole[:, 55:279].clip(0, 255)).mean() > 0.2  # a column beside it is noticed
    turned = shorter_side(picture.swapaxes(0, 1)[None], 224)
    assert torch.equal(turned[0], out[0].transpose(1, 2))


@pytest.mark.parametrize(
    ("wide", "down", "even"),
    [(30, 1, 1), (31, 1, 2), (29, 0, 0), (33, 2, 2), (28, 0, 0)],
)
def test_half_pixels_of_the_crop_are_rounded_as_the_library_does(wide, down, even):
    """Margins 2, 3, 1 and 5: transformers rounds down, torchvision to even."""
    picture = np.random.default_rng(0).integers(0, 256, (28, wide, 3), dtype=np.uint8)
    for rounded, left in ((False, down), (True, even)):
        out = shorter_side(picture[None], 28, rounded=rounded)[0].permute(1, 2, 0).numpy() * 255
        assert np.array_equal(out.round().astype(np.uint8), picture[:, left : left + 28])


def test_the_longer_side_is_truncated():
    """101 x 67 to 28 in height: 42.2 columns become 42, so 7 are cut at either side."""
    picture = np.random.default_rng(1).integers(100, 156, (67, 101, 3), dtype=np.uint8)
    shown = shorter_side(picture[None], 28)[0].permute(1, 2, 0).numpy() * 255
    assert np.abs(shown - resized(picture, 28, 42)[:, 7:35]).max() <= 1.01


def test_the_longest_side_is_resized_and_padded_with_black():
    """300 x 200 becomes 224 x 149 (149.33 rounded); 75 rows are left: 37 above, 38 below."""
    picture = ramp(HIGH, WIDE)
    out = longest_side_padded(picture[None], 224)
    assert out.dtype == torch.float32 and out.shape == (1, 3, 224, 224)
    shown = out[0].permute(1, 2, 0).double().numpy() * 255
    assert not shown[:37].any() and not shown[186:].any() and shown[37:186].any(axis=(1, 2)).all()
    assert np.abs(shown[37:186] - resized(picture, 149, 224)).max() < 2e-3  # not rounded to whole values
    turned = longest_side_padded(picture.swapaxes(0, 1)[None], 224)
    assert torch.allclose(turned[0], out[0].transpose(1, 2), atol=1e-6)


def test_overshoots_of_the_filter_are_not_clipped():
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:, 32:] = 255
    padded, cropped = longest_side_padded(picture[None], 28), shorter_side(picture[None], 28)
    assert padded.max() > 1.01 and padded.min() < -0.01
    assert cropped.max() == 1 and cropped.min() == 0


def test_a_picture_of_the_right_size_is_not_changed_but_padded():
    picture = np.random.default_rng(2).integers(0, 256, (11, 28, 3), dtype=np.uint8)
    out = longest_side_padded(picture[None], 28)[0].permute(1, 2, 0).numpy() * 255
    assert np.array_equal(out.round().astype(np.uint8)[8:19], picture)
    assert not out[:8].any() and not out[19:].any()


def test_a_thin_picture_keeps_a_row():
    assert longest_side_padded(np.full((1, 900, 3), 255, np.uint8)[None], 28).sum(dim=(1, 2, 3)) > 0


def test_the_mean_picture_is_zero_after_normalization():
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    assert torch.equal(normalized(mean), torch.zeros(1, 3, 2, 2))
    whole = normalized(torch.ones(1, 3, 2, 2))[0, :, 0, 0].tolist()
    assert whole == pytest.approx([0.51854534 / 0.26862954, 0.5421725 / 0.26130258, 0.59178927 / 0.27577711])


@pytest.mark.parametrize("resize", [shorter_side, longest_side_padded])
def test_threads_do_not_change_pixels_or_order(resize):
    pictures = np.random.default_rng(5).integers(0, 256, (5, 40, 33, 3), dtype=np.uint8)
    one_by_one = torch.cat([resize(picture[None], 28) for picture in pictures])
    for threads in (1, 3, 8):
        assert torch.equal(resize(pictures, 28, threads=threads), one_by_one)
