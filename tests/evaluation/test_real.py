"""Real clips in a folder: the order of their frames and what is in memory. Arrays that several commands write."""

import tracemalloc

import numpy as np
import pytest
from PIL import Image

from seppo_fast.data.media.images import ImageError
from seppo_fast.evaluation.real import measuring
from seppo_fast.evaluation.real.arrays import Rows, fill, read_array
from seppo_fast.evaluation.real.folder import RealFolder
from seppo_fast.evaluation.real.sets import Wanted
from seppo_fast.utils.errors import CheckpointError


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


def test_large_pictures_are_measured_one_at_a_time():
    sizes = []

    def features(pictures):
        sizes.append(pictures.shape[:2])
        return pictures[:, 0, 0]

    pictures = [np.full((side, 3000, 3), side % 251, np.uint8) for side in (3000, 3000, 10, 10, 10)]
    values = measuring._featured(lambda: features, [(picture,) for picture in pictures])
    assert sizes == [(1, 3000), (1, 3000), (3, 10)]
    assert values[:, 0, 0].tolist() == [3000 % 251] * 2 + [10] * 3


# Arrays


def rows(first: int) -> Rows:
    """Returns five files whose rows are their numbers, counted from `first`."""
    numbers = range(first, first + 5)
    return Rows("real", "", [str(number) for number in numbers], lambda row: (np.array([first + row]),), 2)


def numbers_of(pictures):
    return np.stack([one for (one,) in pictures])


def test_an_array_has_no_chunk_of_another_command(tmp_path):
    """Another command, with other real files, runs while the first one computes its last chunk."""
    file, calls = tmp_path / "metrics" / "a-real.safetensors", []

    def compute(pictures):
        calls.append(len(pictures))
        if len(calls) == 3:
            fill(file, rows(100), "digest", "files", numbers_of)
        return numbers_of(pictures)

    fill(file, rows(0), "digest", "files", compute)
    stamp, values = read_array(file)
    assert stamp == rows(0).stamp("digest") and values[:, 0].tolist() == [0, 1, 2, 3, 4] and calls == [2, 2, 1]


def test_a_damaged_chunk_is_not_left_out(tmp_path):
    file, calls = tmp_path / "metrics" / "a-real.safetensors", []
    parts = file.parent / ".parts" / "a-real"

    def compute(pictures):
        calls.append(len(pictures))
        if len(calls) == 3:
            first = min(parts.glob("0*"))
            first.write_bytes(first.read_bytes()[:-4])
        return numbers_of(pictures)

    with pytest.raises(CheckpointError, match="damaged while the array was assembled"):
        fill(file, rows(0), "digest", "files", compute)
    assert not file.exists()
    fill(file, rows(0), "digest", "files", compute)
    assert read_array(file)[1][:, 0].tolist() == [0, 1, 2, 3, 4] and calls == [2, 2, 1, 2]
