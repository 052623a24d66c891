"""ChronoMagic-Bench's scores by hand, its subsampling, and its layout."""

import random

import numpy as np
import pytest

from seppo_fast.evaluation.metrics.chronomagic import (
    ORDINARY,
    TIME_LAPSE,
    UMT_SEEDS,
    UMT_SIZES,
    chscore,
    chscores,
    leaderboard_entry,
    mtscore,
    mtscore_frames,
    official_path,
    umt_fvd,
)
from seppo_fast.evaluation.metrics.frechet import frechet, real_floor

# MTScore


def with_cosines(cosines: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Returns a video (1, 11) and ten texts (10, 11) with these cosines, of lengths other than 1."""
    texts = np.zeros((10, 11))
    texts[:, 0] = cosines
    texts[np.arange(10), np.arange(1, 11)] = np.sqrt(1 - np.square(cosines))
    return 3 * np.eye(1, 11), texts * np.arange(1, 11)[:, None]


def test_only_the_five_most_probable_sentences_count():
    logits = np.array([2.0, 1.5, 0.1, 0.2, 0.3, 1.9, 1.8, 0.4, 0.5, 1.7])  # top five: 0, 5, 6, 9, 1
    video, texts = with_cosines(list(logits / 100))
    shares = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(mtscore(video, texts), [shares[[5, 6, 9]].sum()], rtol=1e-12)
    assert mtscore(video, texts)[0] < shares[5:].sum()


def test_pure_cases_and_large_logits():
    assert mtscore(*with_cosines([0.9] * 5 + [-0.9] * 5))[0] == 0
    assert mtscore(*with_cosines([-0.9] * 5 + [0.9] * 5))[0] == pytest.approx(1, rel=1e-12)
    assert len(ORDINARY) == len(TIME_LAPSE) == 5


@pytest.mark.parametrize(
    ("count", "frames"), [(4, [0, 1, 2, 3]), (7, [0, 1, 2, 3]), (16, [0, 4, 8, 12]), (19, [0, 4, 8, 12])]
)
def test_the_frames_of_mtscore(count, frames):
    assert mtscore_frames(count) == frames


def test_wrong_features_of_mtscore_are_refused():
    video, texts = with_cosines([0.5] * 10)
    for bad in ((video[0], texts), (video, texts[:9]), (video[:, 1:], texts)):
        with pytest.raises(ValueError, match="video_features"):
            mtscore(*bad)
    with pytest.raises(ValueError, match="all zero"):
        mtscore(0 * video, texts)
    with pytest.raises(ValueError, match="at least 4"):
        mtscore_frames(3)


# CHScore


def still(frames: int, points: int) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((frames, points, 2)), np.ones((frames, points), bool)


def test_a_clip_that_loses_no_point_is_undefined_and_officially_zero():
    tracks, visible = still(8, 30)
    assert np.isnan(chscore(tracks, visible))
    worse = visible.copy()
    worse[3:] = False
    both = chscores([(tracks, visible), (tracks, worse)])
    assert both.undefined == 1 and both.official == both.mean / 2 and both.mean == chscore(tracks, worse)
    assert np.isinf(both.median) and np.isnan(both.scores[0])
    three = chscores([(tracks, visible), (tracks, worse), (tracks, worse)])
    assert three.median == three.mean and three.official == pytest.approx(two_thirds(three.mean))
    assert np.isnan(chscores([(tracks, visible)]).mean) and chscores([(tracks, visible)]).official == 0


def two_thirds(value: float) -> float:
    return 2 * value / 3


def test_one_jump_by_hand():
    """5 frames, 10 points, 4 of which are lost from frame 2 on: q = 0, 0, .4, .4, .4 and |dq| = 0, .4, 0, 0."""
    tracks, visible = still(5, 10)
    visible[2:, :4] = False
    spread = np.sqrt((3 * 0.1**2 + 0.3**2) / 3)
    index = 0.35 * 0.24 / 0.9368749856948853 + 0.25 * spread / 0.8997353911399841
    index += 0.15 * (1 / 5) / 0.625 + 0.15 * 1 / 20 + 0.1 * 0.4
    assert chscore(tracks, visible) == pytest.approx(1 / index, rel=1e-12)


def test_a_steady_loss_by_hand():
    """6 frames, 20 points, one more is lost per frame: q = 0, .05, .. .25; no step is above .1, none deviates."""
    tracks, visible = still(6, 20)
    for frame in range(6):
        visible[frame, :frame] = False
    index = 0.35 * 0.125 / 0.9368749856948853 + 0.1 * 0.05
    assert chscore(tracks, visible) == pytest.approx(1 / index, rel=1e-9)


def test_returning_points_count_as_steps_too():
    tracks, visible = still(3, 10)
    visible[1, :5] = False  # |dq| = .5, .5
    index = 0.35 * (0.5 / 3) / 0.9368749856948853 + 0.15 * (2 / 3) / 0.625 + 0.15 * 2 / 20 + 0.1 * 0.5
    assert chscore(tracks, visible) == pytest.approx(1 / index, rel=1e-12)


def test_points_that_leave_with_their_own_motion_are_not_missing():
    tracks, visible = still(8, 10)
    tracks[:, :, 0] = np.arange(8)[:, None] * np.where(np.arange(10) < 5, 1.0, -2.0)
    visible[5:, :] = False
    assert np.isnan(chscore(tracks, visible))  # all moved further along their first half's movement
    back = tracks.copy()
    back[5:, :3] *= -1  # three points turned back behind their start
    expected = still(8, 10)
    expected[1][5:, :3] = False
    assert chscore(back, visible) == pytest.approx(chscore(*expected), rel=1e-12)


def test_wrong_tracks_are_refused():
    tracks, visible = still(5, 4)
    for bad in ((tracks[..., :1], visible), (tracks, visible[:4]), (tracks[0], visible)):
        with pytest.raises(ValueError, match="tracks, visibility"):
            chscore(*bad)
    with pytest.raises(ValueError, match="at least 3 frames"):
        chscore(tracks[:2], visible[:2])
    with pytest.raises(ValueError, match="finite"):
        chscore(tracks * np.nan, visible)
    with pytest.raises(ValueError, match="at least one"):
        chscores([])


# UMT-FVD


def test_subsets_are_those_of_the_official_scripts():
    """`random.seed(seed); random.sample(list(range(n)), size)`, the same for both sides; population covariances."""
    rng = np.random.default_rng(1)
    real, made = rng.standard_normal((40, 6)), 0.5 + rng.standard_normal((50, 6))
    expected = []
    for seed in UMT_SEEDS:
        rows = []
        for features in (real, made):
            random.seed(seed)
            chosen = features.astype(np.float32)[random.sample(list(range(len(features))), 32)].astype(np.float64)
            rows.append(chosen)
        expected.append(frechet(*rows, ddof=0))
    values = umt_fvd([made], real)
    assert list(values) == list(UMT_SIZES)
    assert values[32] == pytest.approx(np.mean(expected), rel=1e-12)
    whole = frechet(real.astype(np.float32), made.astype(np.float32), ddof=0)
    assert all(values[size] == pytest.approx(whole, rel=1e-12) for size in UMT_SIZES[1:])


def test_samples_are_averaged():
    rng = np.random.default_rng(2)
    real, first, second = rng.standard_normal((3, 45, 5))
    both, one, two = (umt_fvd(samples, real) for samples in ([first, second], [first], [second]))
    assert both[32] == pytest.approx((one[32] + two[32]) / 2, rel=1e-12)


def test_the_same_features_are_at_zero_and_halves_at_a_floor_far_above():
    """150 draws in 768 dimensions, the shape of the official reference features."""
    real = np.random.default_rng(3).standard_normal((150, 768))
    same = umt_fvd([real], real, sizes=(32, 150), seeds=(12,))
    assert all(value == pytest.approx(0, abs=1e-8) for value in same.values())
    halves = umt_fvd([real[:75]], real[75:], sizes=(32, 128), seeds=(12,))
    assert halves[32] > halves[128] > 900
    assert halves[128] == pytest.approx(real_floor(real, 75, 0), rel=0.05)
    with pytest.raises(ValueError, match="at least one entry"):
        umt_fvd([], real)


# Layout


def test_the_official_paths():
    assert str(official_path("seppo", "3d_printing_08", 2)) == "seppo/2/3d_printing_08.mp4"
    assert str(official_path("seppo", "animal_04", None)) == "seppo/animal_04.mp4"
    assert str(official_path("sd1.5", "day2night_13.0", 1)) == "sd1.5/1/day2night_13.0.mp4"  # an official id
    for bad in (("a/b", "x", 1), ("..", "x", 1), ("a", "", 1), ("a", "x.mp4", 1), ("a", "x", 0), ("a", "x", 4)):
        with pytest.raises(ValueError):
            official_path(*bad)


def test_the_entry_of_the_leaderboard():
    entry = leaderboard_entry({"seppo": {"MTScore": 0.4, "CHScore": 70, "UMTScore": 2.5}})
    expected = {"Average_CHScore": 70, "Average_MTScore": 0.4, "UMT-FVD": -1, "UMTScore": 2.5}
    assert entry == {"seppo": expected}
    with pytest.raises(ValueError, match="FVD"):
        leaderboard_entry({"seppo": {"FVD": 1}})
