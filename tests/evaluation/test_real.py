"""Real clips in a folder: the order of their frames, and how many of them are in memory."""

import tracemalloc

import numpy as np
import pytest
from PIL import Image

from seppo_fast.data.media.images import ImageError
from seppo_fast.evaluation.real.folder import RealFolder
from seppo_fast.evaluation.real.sets import Wanted


def wanted(resolution: int, frames: int) -> Wanted:
    return Wanted((("own", "a prompt"),), 1, resolution, frames)


def flat(value: int, side: int = 8) -> Image.Image:
    return Image.new("RGB", (side, side), (value, value, value))


@pytest.mark.parametrize("name", ["{}.png", "frame-{}.png", "2_{}_of_16.png", "{:03}.png"])
def test_frames_of_a_folder_are_in_the_order_of_their_numbers(tmp_path, name):
    (tmp_path / "own").mkdir()
    for number in range(1, 17):
        flat(10 * number).save(tmp_path / "own" / name.format(number))
    clip = RealFolder(str(tmp_path), wanted(8, 16)).load(0)
    assert [frame[0, 0, 0] for frame in clip] == [10 * number for number in range(1, 17)]


def test_only_the_chosen_frames_of_an_animation_are_kept_in_memory(tmp_path):
    side, count = 256, 40
    first, *others = [flat(6 * number, side) for number in range(count)]
    first.save(tmp_path / "own.webp", save_all=True, append_images=others, duration=40, lossless=True, method=0)
    real = RealFolder(str(tmp_path), wanted(side, 4))
    tracemalloc.start()
    try:
        clip = real.load(0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [frame[0, 0, 0] for frame in clip] == [0, 78, 156, 234]
    assert peak < count // 2 * 3 * side**2
    with pytest.raises(ImageError, match=f"has {count} frames, fewer than the 41"):
        RealFolder(str(tmp_path), wanted(side, 41)).load(0)
