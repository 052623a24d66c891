"""Paired confidence intervals, judged pictures and grids of pictures."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from seppo_fast.config.load import parse_config
from seppo_fast.data.sources import open_source
from seppo_fast.evaluation.grids import animate, side_by_side
from seppo_fast.evaluation.judged import CLIPS_PER_PROMPT, held_out_prompts, judged_model, prompt_sets
from seppo_fast.evaluation.statistics import cluster, paired_difference
from seppo_fast.shapes.judge import score
from seppo_fast.shapes.motion import all_captions


def test_paired_difference_by_hand():
    result = paired_difference([0.0, 1.0, 0.5, 0.5], [1.0, 1.0, 0.5, 1.0])
    differences = [1.0, 0.0, 0.0, 0.5]
    half = 3.182446305284263 * np.std(differences, ddof=1) / 2  # t table: 97.5 %, 3 degrees of freedom
    assert (result.base, result.other, result.difference, result.items) == (0.5, 0.875, 0.375, 4)
    assert (result.low, result.high) == pytest.approx((0.375 - half, 0.375 + half), rel=1e-12)
    assert str(result) == "0.500 -> 0.875, difference +0.375 [-0.387, +1.137] (95 %, 4 pairs)"


@pytest.mark.parametrize("items", [2, 5, 200])
def test_the_interval_covers_as_often_as_it_says(items):
    """For normal differences it is exact for any number of items; 1.96 standard errors of 2 cover 70 %, of 5 88 %."""
    rng = np.random.default_rng(items)
    covered = 0
    for _ in range(2000):
        base = rng.uniform(size=items)
        result = paired_difference(base, base + rng.normal(0.1, 0.5, items))
        covered += result.low <= 0.1 <= result.high
    assert 0.935 < covered / 2000 < 0.965  # three standard deviations of 2000 draws are 0.015


@pytest.mark.parametrize(("base", "other"), [([1.0], [1.0]), ([1.0, 2.0], [1.0]), ([[1.0], [2.0]], [[1.0], [2.0]])])
def test_what_cannot_be_paired_is_refused(base, other):
    with pytest.raises(ValueError, match="equally long"):
        paired_difference(base, other)


@pytest.mark.parametrize("none", [np.nan, np.inf])
def test_an_item_without_a_score_is_left_out_and_said_and_never_a_zero(none):
    base, other = [0.2, none, 0.4, 0.9, 0.5], [0.3, 1.0, 0.8, 0.7, none]
    result = paired_difference(base, other)
    assert dataclasses.replace(result, left_out=0) == paired_difference([0.2, 0.4, 0.9], [0.3, 0.8, 0.7])
    assert (result.items, result.left_out) == (3, 2)
    assert str(result).endswith("(95 %, 3 pairs, 2 without a score left out)")
    with pytest.raises(ValueError, match="1 of 3 items have a score from both models"):
        paired_difference([0.2, none, 0.4], [0.3, 0.5, none])


def test_prompts_are_held_out_from_winners_and_from_each_other():
    source = open_source("shapes:2048:11")
    development, report = prompt_sets(source)
    winners = {example.prompt for example in source}
    assert len(set(development)) == 400 and len(set(report)) == 1200
    assert not winners & {*development, *report} and not set(development) & set(report)
    assert prompt_sets(source) == (development, report)


def test_more_prompts_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="are left"):
        held_out_prompts(1, 100, held_out_prompts(1, 2000, ()))


def test_pictures_are_paired_by_seed_and_scored():
    config = parse_config({"model": {"path": "shapes"}, "sampler": {"steps": 2, "guidance": 2.0, "batch": 4}})
    prompts = held_out_prompts(5, 6, ())
    pictures, scores = judged_model(config, prompts, seed=1)
    assert pictures.shape == (6, 32, 32, 3) and pictures.dtype == np.uint8
    assert scores.tolist() == [score(prompt, picture) for prompt, picture in zip(prompts, pictures, strict=True)]
    again, _ = judged_model(config, prompts[:5], seed=1)
    assert np.abs(again.astype(int) - pictures[:5]).max() <= 1
    other, _ = judged_model(config, prompts, seed=2)
    assert np.abs(other.astype(int) - pictures).max() > 50


def test_grids_show_the_pictures_unsmoothed():
    pictures = np.zeros((2, 2, 2, 3), dtype=np.uint8)
    pictures[1] = [255, 0, 0]
    grid = np.asarray(
        side_by_side(["one", "two"], {"base": pictures, "new": pictures[::-1]}, cell=20, caption_width=50)
    )
    assert grid.shape == (24 + 40, 50 + 40, 3)
    assert (grid[24 + 10, 60] == 0).all() and (grid[24 + 30, 60] == [255, 0, 0]).all()
    assert (grid[24 + 10, 80] == [255, 0, 0]).all() and (grid[24 + 30, 80] == 0).all()


def test_prompts_of_clips_are_held_out_from_the_winners_of_any_seed():
    source = open_source("shapes-motion:300:11")
    development, report = prompt_sets(source)
    winners = {example.prompt for example in source} | {example.prompt for example in open_source("shapes-motion:99:4")}
    assert not winners & set(report) and not set(development) & set(report)
    assert set(development) | set(report) == set(all_captions())
    assert len(report) == CLIPS_PER_PROMPT * len(set(report)) and report[0] == report[CLIPS_PER_PROMPT - 1]
    assert len({source[index].id for index in range(300)}) == 300


def test_a_prompt_counts_once_however_many_clips_it_has():
    prompts = ["b", "b", "a", "c", "a", "b"]
    assert cluster(prompts, np.array([1.0, 0.0, 0.5, 0.25, 0.7, 0.5])).tolist() == pytest.approx([0.6, 0.5, 0.25])


def test_clips_are_animated_side_by_side(tmp_path):
    rng = np.random.default_rng(0)
    clips = {name: rng.integers(0, 256, (2, 5, 8, 8, 3)).astype(np.uint8) for name in ("base", "aligned")}
    animate(tmp_path / "clips.webp", ["first", "second"], clips, cell=16, milliseconds=70)
    with Image.open(tmp_path / "clips.webp") as film:
        assert film.n_frames == 5 and film.info["loop"] == 0
        for frame in range(5):
            film.seek(frame)
            wanted = side_by_side(["first", "second"], {name: clip[:, frame] for name, clip in clips.items()}, cell=16)
            shown = np.asarray(film.convert("RGB")).astype(int)
            assert film.size == wanted.size and film.info["duration"] == 70
            assert np.abs(shown - np.asarray(wanted).astype(int)).mean() < 8  # WebP is lossy


def test_a_picture_of_clips_shows_their_frames_in_order():
    clip = np.stack([np.full((1, 4, 4, 3), 20 * frame, np.uint8) for frame in range(8)], axis=1)
    picture = np.asarray(side_by_side(["grey"], {"base": clip}, cell=10, caption_width=30))
    assert [picture[24 + 5, 30 + 10 * frame + 5, 0] for frame in range(8)] == [20 * frame for frame in range(8)]
