"""Frames chosen by time: a motion looks the same whatever the file's frame rate, constant or variable."""

from __future__ import annotations

import struct
from fractions import Fraction

import numpy as np
import pytest

from seppo_fast.data.media.clips import load_clip
from seppo_fast.data.media.frames import STEP, choose_frames, choose_times, is_short
from seppo_fast.data.sources import open_source
from tests.helpers.clips import frame_numbers, load, numbered_frames, write_clip

SPEED, SIDE = 32, 96
"""The dot's speed in pixels per second, and the side of a frame."""
RATES = (12, 24, 25, 30, 50, 60)


def dots(seconds: np.ndarray) -> np.ndarray:
    """Returns frames of a round dot that moves to the right, at these seconds; uint8 (F, 96, 96, 3)."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    distances = np.hypot(columns - (8 + SPEED * seconds[:, None, None]), rows - SIDE / 2)
    return (16 + 220 * np.clip(7 - distances, 0, 1)[..., None].repeat(3, axis=3)).astype(np.uint8)


def seconds_of(pixels: np.ndarray) -> np.ndarray:
    """Returns the second of each frame of the dot, from its centre of brightness."""
    light = np.clip(pixels[..., 1].astype(float) - 60, 0, None).sum(1)
    return ((light * np.arange(SIDE)).sum(1) / light.sum(1) - 8) / SPEED


def uneven_ticks(count: int, seed: int = 0) -> np.ndarray:
    """Returns `count` times in units of 1/60 s, one to four units apart, as if frames were dropped."""
    return np.cumsum([0, *np.random.default_rng(seed).integers(1, 5, count - 1)])


def test_one_motion_is_as_fast_at_every_rate(tmp_path):
    """Measured in the pixels; if chosen by number, it would be a fifth as fast at 60 frames per second as at 12."""
    ticks = {rate: np.arange(round(2.4 * rate)) for rate in RATES}
    ticks["uneven"] = uneven_ticks(57)
    windows, lapses = {}, {}
    for name, clip in ticks.items():
        rate, gap = (60, 4) if name == "uneven" else (name, 1)
        path = write_clip(tmp_path / f"{name}.mp4", dots(clip / rate), "libx264", rate, times=clip.tolist())
        taken = seconds_of(load(path, 12, resolution=SIDE).pixels)
        wanted = taken[0] + np.arange(12) * 4 / 30
        np.testing.assert_allclose(taken, wanted, atol=0.5 * gap / rate + 0.01)
        windows[name] = np.polyfit(wanted, taken, 1)[0]
        taken = seconds_of(load(path, 12, resolution=SIDE, time_lapse=True).pixels)
        np.testing.assert_allclose(taken, np.linspace(0, clip[-1] / rate, 12), atol=0.5 * gap / rate + 0.01)
        lapses[name] = taken
    assert all(abs(speed - 1) < 0.03 for speed in windows.values()), windows
    for taken in lapses.values():
        np.testing.assert_allclose(taken, lapses[60], atol=0.1)


CONTAINERS = [("libx264", ".mp4"), ("libx264", ".mkv"), ("mpeg4", ".avi"), ("libx264", ".avi"), ("libvpx-vp9", ".webm")]


@pytest.mark.parametrize(("codec", "suffix"), CONTAINERS)
@pytest.mark.parametrize("rate", [12, 30, 60])
def test_every_container_tells_its_times(tmp_path, codec, suffix, rate):
    """Includes frames that H.264 reorders, and AVI, which does not store display times."""
    count = round(2.6 * rate)
    path = write_clip(tmp_path / f"clip{suffix}", numbered_frames(count), codec, rate)
    starts = set()
    for name in "abcdef":
        taken = np.array(frame_numbers(load(path, name=name).pixels)) / rate
        np.testing.assert_allclose(taken, taken[0] + np.arange(16) * 4 / 30, atol=0.5 / rate + 0.002)
        starts.add(taken[0])
    assert len(starts) > 2
    whole = load(path, time_lapse=True)
    assert frame_numbers(whole.pixels) == choose_frames(count, 16, whole=True, key="x")


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_uneven_rates_count_by_time(tmp_path, suffix):
    ticks = uneven_ticks(80)
    path = write_clip(tmp_path / f"clip{suffix}", numbered_frames(80), "libx264", 60, times=ticks.tolist())
    for name in "abc":
        taken = ticks[frame_numbers(load(path, name=name).pixels)] / 60
        np.testing.assert_allclose(taken, taken[0] + np.arange(16) * 4 / 30, atol=2 / 60 + 0.002)
    taken = ticks[frame_numbers(load(path, time_lapse=True).pixels)] / 60
    np.testing.assert_allclose(taken, np.linspace(0, ticks[-1] / 60, 16), atol=2 / 60 + 0.002)
    # between two frames one second apart, each is chosen for its half of the gap
    held = [*range(30), *range(90, 120)]
    path = write_clip(tmp_path / f"held{suffix}", numbered_frames(60), "libx264", 60, times=held)
    clip = load(path, 18, time_lapse=True)
    expected = [nearest(held, Fraction(119 * place, 17)) for place in range(18)]
    assert (expected.count(29), expected.count(30)) == (4, 4)
    assert (frame_numbers(clip.pixels), clip.remarks) == (expected, ("repeating",))


def test_rows_of_a_csv_of_magictimes_are_chosen_by_number(tmp_path):
    for name, header in {"plain": "videoid,name", "magictime": "videoid,name,is_transmit"}.items():
        write_clip(tmp_path / name / "a.mp4", numbered_frames(240), "libx264", 60)
        (tmp_path / name / "list.csv").write_text(f"{header}\na.mp4,a caption{',' if name == 'magictime' else ''}\n")
    write_clip(tmp_path / "sidecar" / "a.mp4", numbered_frames(240), "libx264", 60)
    (tmp_path / "sidecar" / "a.txt").write_text("a caption")
    steps, digests = {}, {}
    for name in ("plain", "magictime", "sidecar"):
        source = open_source(str(tmp_path / name))
        pixels = load_clip(source[0], "a", source[0].image.open(), 32, 16).pixels
        steps[name], digests[name] = set(np.diff(frame_numbers(pixels))), source.digest()
    assert steps == {"plain": {8}, "magictime": {4}, "sidecar": {8}}
    assert digests["plain"] == digests["sidecar"] != digests["magictime"]


def test_short_clips_are_counted_by_time(tmp_path):
    """Windows of 4 frames last 0.4 seconds."""
    for length, remarks in ((25, ()), (24, ("closer",)), (4, ("closer",)), (3, ("repeating",))):
        path = write_clip(tmp_path / f"{length}.mp4", numbered_frames(length), rate=60)
        clip = load(path, 4)
        assert clip.remarks == remarks
        if remarks:
            numbers = [nearest(range(length), Fraction((length - 1) * place, 3)) for place in range(4)]
            assert frame_numbers(clip.pixels) == numbers
        assert load(path, 4, time_lapse=True).remarks == (remarks if remarks == ("repeating",) else ())
    slow = write_clip(tmp_path / "slow.mp4", numbered_frames(20), rate=5)  # fewer frames per second than are chosen
    clip = load(slow, 4)
    assert (len(set(frame_numbers(clip.pixels))), clip.remarks) == (3, ("repeating",))


# the choice itself


def nearest(times: object, wanted: Fraction) -> int:
    """Returns the last of the nearest times, by exhaustive search."""
    distances = [abs(time - wanted) for time in times]
    return len(distances) - 1 - distances[::-1].index(min(distances))


@pytest.mark.parametrize("unit", [Fraction(1, 30), Fraction(1, 15360), Fraction(1, 90000)])
def test_clips_of_30_frames_a_second_are_as_by_number(unit):
    for length in (1, 61, 62, 75, 400):
        times = [int(Fraction(number, 30) / unit) for number in range(length)]
        for key in map(str, range(20)):
            by_number = choose_frames(length, 16, whole=False, key=key)
            assert choose_times(times, unit, 16, whole=False, key=key) == by_number
            assert choose_times(times, unit, 1, whole=False, key=key) == choose_frames(length, 1, whole=False, key=key)


@pytest.mark.parametrize("rate", RATES)
def test_time_lapses_of_an_even_rate_are_as_by_number(rate):
    for length in (16, 17, 50, 61, 1000, 12345):
        times = range(0, 1000 * length, 1000)
        chosen = choose_times(times, Fraction(1, 1000 * rate), 16, whole=True, key="x")
        assert chosen == choose_frames(length, 16, whole=True, key="x")


def test_every_choice_is_the_nearest():
    for seed in range(40):
        times = (uneven_ticks(150, seed) + 17).tolist()
        unit = Fraction(1, 60)
        chosen = choose_times(times, unit, 16, whole=False, key=str(seed))
        assert chosen == [nearest(times, times[chosen[0]] + STEP / unit * place) for place in range(16)]
        assert times[chosen[0]] + 15 * STEP / unit <= times[-1]
        short = times[:30]
        assert is_short(short, unit, 16)
        length = Fraction(short[-1] - short[0], 15)
        expected = [nearest(short, short[0] + length * place) for place in range(16)]
        assert choose_times(short, unit, 16, whole=False, key=str(seed)) == expected
        assert (expected[0], expected[-1]) == (0, 29)


def test_of_two_frames_as_near_the_later_is_taken():
    assert choose_times([0, 2], Fraction(1), 3, whole=True, key="x") == [0, 1, 1]
    assert choose_times([0, 1, 3, 4], Fraction(1), 3, whole=True, key="x") == [0, 2, 3]
    assert choose_times([5], Fraction(1), 3, whole=True, key="x") == [0, 0, 0]


def test_windows_start_anywhere_they_fit():
    times = range(0, 70 * 512, 512)
    starts = [choose_times(times, Fraction(1, 15360), 16, whole=False, key=f"clip {i}")[0] for i in range(400)]
    assert np.bincount(starts, minlength=10).min() > 20  # 40 each on average
    assert max(starts) == 9


# files with missing or wrong metadata


def test_three_frames(tmp_path):
    for suffix in (".mp4", ".mkv", ".avi"):
        path = write_clip(tmp_path / f"clip{suffix}", numbered_frames(3), rate=24)
        assert frame_numbers(load(path, 3).pixels) == [0, 1, 2]
        assert set(frame_numbers(load(path).pixels)) == {0, 1, 2}


def test_without_a_duration(tmp_path):
    plain = write_clip(tmp_path / "plain.mkv", numbered_frames(100), "libx264", 30)
    live = write_clip(tmp_path / "live.mkv", numbered_frames(100), "libx264", 30, options={"live": "1"})
    duration = b"\x44\x89\x88"  # the element's id and length
    assert (duration in plain.read_bytes(), duration in live.read_bytes()) == (True, False)
    for whole in (False, True):
        np.testing.assert_array_equal(load(live, time_lapse=whole).pixels, load(plain, time_lapse=whole).pixels)


def test_a_wrong_number_of_frames_in_the_header(tmp_path):
    path = write_clip(tmp_path / "clip.avi", numbered_frames(100), rate=30)
    before = load(path).pixels
    content = bytearray(path.read_bytes())
    place = content.index(b"avih") + 8 + 16
    assert struct.unpack("<I", content[place : place + 4]) == (100,)
    for count in (0, 7, 10_000):
        content[place : place + 4] = struct.pack("<I", count)
        path.write_bytes(content)
        np.testing.assert_array_equal(load(path).pixels, before)


def test_times_that_do_not_tell_frames_apart(tmp_path):
    """An H.264 stream whose container stores decoding times only: the decoder's order is used."""
    path = write_clip(tmp_path / "clip.avi", numbered_frames(60), "libx264", 30)
    assert frame_numbers(load(path, 60, time_lapse=True).pixels) == list(range(60))
