"""Data sets of clips: the frames chosen, both folder layouts, and every kind of damage with its reason."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from seppo_fast.data.examples import Example
from seppo_fast.data.media.clips import load_clip
from seppo_fast.data.media.frames import choose_frames, keyed_choice
from seppo_fast.data.media.images import ImageError, file_ref
from seppo_fast.data.scan import scan
from seppo_fast.data.sources import open_source
from seppo_fast.utils.errors import DataError
from tests.helpers.clips import (
    frame_numbers,
    loaded,
    numbered_frames,
    set_display_matrix,
    write_audio,
    write_changing_clip,
    write_clip,
)


def reason(path: Path, **options: object) -> str:
    with pytest.raises(ImageError) as caught:
        loaded(path, **options)
    assert caught.value.name == str(path)
    assert caught.value.exit_code == 3
    return caught.value.reason


# which frames


def test_a_time_lapse_is_taken_from_first_to_last():
    assert choose_frames(31, 16, whole=True, key="x") == list(range(0, 31, 2))
    assert choose_frames(16, 16, whole=True, key="x") == list(range(16))
    for length in (17, 50, 61, 1000, 12345):
        chosen = choose_frames(length, 16, whole=True, key="x")
        np.testing.assert_allclose(chosen, np.linspace(0, length - 1, 16), atol=0.5)
        assert (chosen[0], chosen[-1]) == (0, length - 1)
    assert choose_frames(9, 1, whole=True, key="x") == [0]


@pytest.mark.parametrize(
    ("length", "stride"), [(61, 4), (400, 4), (60, 3), (46, 3), (45, 2), (31, 2), (30, 1), (16, 1)]
)
def test_a_window_has_stride_four_or_what_fits(length, stride):
    for key in map(str, range(20)):
        chosen = choose_frames(length, 16, whole=False, key=key)
        assert set(np.diff(chosen)) == {stride}
        assert 0 <= chosen[0] and chosen[-1] < length


def test_windows_start_anywhere_and_by_the_id_alone():
    starts = [choose_frames(70, 16, whole=False, key=f"clip {i}")[0] for i in range(400)]
    assert np.bincount(starts, minlength=10).min() > 20  # 40 each on average
    assert starts == [choose_frames(70, 16, whole=False, key=f"clip {i}")[0] for i in range(400)]
    assert {choose_frames(5, 1, whole=False, key=str(i))[0] for i in range(50)} == set(range(5))


def test_windows_stay_what_they_were():
    # Keys do not include these numbers: if they changed, old caches would hold other frames under the same key.
    assert [choose_frames(400, 16, whole=False, key=key)[0] for key in ("a", "b", "clips/c.mp4")] == [286, 91, 141]
    assert [keyed_choice("flip", key, 2) for key in "abcdefgh"] == [0, 1, 1, 0, 1, 0, 1, 1]


def test_short_clips_repeat_evenly():
    for whole in (True, False):
        assert choose_frames(8, 16, whole=whole, key="x") == [i // 2 for i in range(16)]
        assert choose_frames(1, 16, whole=whole, key="x") == [0] * 16
        for length in range(2, 16):
            chosen = choose_frames(length, 16, whole=whole, key="x")
            assert chosen == sorted(chosen)
            counts = np.bincount(chosen, minlength=length)
            assert counts.min() >= 1 and counts.max() - counts.min() <= 1


# decoding

KINDS = [
    ("mpeg4", ".mp4"),
    ("libx264", ".mp4"),
    ("libx264", ".mkv"),
    ("libvpx-vp9", ".webm"),
    ("mjpeg", ".mov"),
    ("mjpeg", ".avi"),
    ("mpeg4", ".m4v"),
]


@pytest.mark.parametrize(("codec", "suffix"), KINDS)
def test_the_frames_that_were_chosen_are_decoded(tmp_path, codec, suffix):
    path = write_clip(tmp_path / f"clip{suffix}", numbered_frames(70), codec, 30, audio=suffix in (".mp4", ".mkv"))
    assert frame_numbers(loaded(path, whole=True)) == [round(i * 69 / 15) for i in range(16)]
    for name in ("a", "b", "c"):
        start = keyed_choice("window", name, 70 - 60)
        assert frame_numbers(loaded(path, name=name)) == list(range(start, start + 61, 4))
    assert frame_numbers(loaded(path, whole=True, frames=70)) == list(range(70))


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
def test_fewer_frames_than_asked_for(tmp_path, codec):
    path = write_clip(tmp_path / "clip.mp4", numbered_frames(5), codec)
    assert frame_numbers(loaded(path)) == [int(i * 4 / 15 + 0.5) for i in range(16)]  # the nearest frames in time
    for by_number, numbers in ((False, [0, 0, 1, 1, 1, 1]), (True, [0, 0, 0, 0, 1, 1])):
        example = Example("x", "y", file_ref(path), by_number=by_number)
        with open(path, "rb") as stream:
            clip = load_clip(example, "x", stream, 8, 16)
        assert (frame_numbers(clip.pixels)[:6], clip.remarks) == (numbers, ("repeating",))
    single = write_clip(tmp_path / "single.mp4", numbered_frames(1), codec)
    assert frame_numbers(loaded(single)) == [0] * 16


def test_hidden_frames_are_not_counted(tmp_path):
    """An mp4 that begins within a group of pictures, as cutting without re-encoding produces."""
    whole = write_clip(tmp_path / "whole.mp4", numbered_frames(60), "libx264", gop=30)
    with av.open(str(whole)) as source, av.open(str(tmp_path / "cut.mp4"), "w") as target:
        video = source.streams.video[0]
        copy = target.add_stream_from_template(video)
        for packet in source.demux(video):
            if packet.dts is None:
                continue
            shift = 10 * 512  # frames 0 to 9 get negative times; an edit list hides them
            packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
            target.mux(packet)
    shown = frame_numbers(loaded(tmp_path / "cut.mp4", whole=True, frames=50))
    assert shown == list(range(10, 60))


def test_squares_are_cut_from_the_middle(tmp_path):
    columns = np.repeat(np.linspace(30, 220, 12).astype(np.uint8), 8)  # 96 wide, in bands of 8
    picture = np.broadcast_to(columns[None, :, None], (32, 96, 3))
    path = write_clip(tmp_path / "wide.mp4", np.stack([picture] * 3))
    np.testing.assert_allclose(loaded(path, frames=2).astype(int)[0], np.asarray(picture[:, 32:64], int), atol=6)
    small = loaded(path, frames=2, resolution=8)
    assert small.shape == (2, 8, 8, 3) and small.dtype == np.uint8


def side_by_side(count: int) -> np.ndarray:
    frames = numbered_frames(count, 48, 48)
    frames[:, :, :24] = 230
    return frames


def test_flip_mirrors_whole_clips_of_half_the_ids(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", side_by_side(20))
    plain = loaded(path, name="a")
    mirrored = []
    for name in map(str, range(30)):
        pixels = loaded(path, name=name, flip=True)
        upright = loaded(path, name=name)
        if (pixels == upright).all():
            continue
        np.testing.assert_array_equal(pixels, upright[:, :, ::-1])
        mirrored.append(name)
    assert 8 <= len(mirrored) <= 22
    assert plain[:, :, :14].min() > 220 > plain[:, :, 18:].max()


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        ((0, 1, -1, 0), lambda clip: np.rot90(clip, -1, axes=(1, 2))),  # from a phone held upright
        ((0, -1, 1, 0), lambda clip: np.rot90(clip, 1, axes=(1, 2))),
        ((-1, 0, 0, -1), lambda clip: clip[:, ::-1, ::-1]),
        ((-1, 0, 0, 1), lambda clip: clip[:, :, ::-1]),  # from a front camera
        ((1, 0, 0, -1), lambda clip: clip[:, ::-1]),
        ((0, 1, 1, 0), lambda clip: clip.swapaxes(1, 2)),
        ((0, -1, -1, 0), lambda clip: clip[:, ::-1, ::-1].swapaxes(1, 2)),
    ],
)
def test_the_display_matrix_turns_and_mirrors_frames(tmp_path, turn, expected):
    clip = side_by_side(4)
    clip[:, : clip.shape[1] // 2] //= 2  # the four quarters differ
    path = write_clip(tmp_path / "clip.mp4", clip, "libx264")
    before = loaded(path, frames=4, resolution=48)
    np.testing.assert_array_equal(loaded(set_display_matrix(path, turn), frames=4, resolution=48), expected(before))


@pytest.mark.parametrize("suffix", ["webm", "mkv", "mp4", "mov"])
def test_a_clip_that_begins_late_is_whole(tmp_path, suffix):
    path = tmp_path / f"clip.{suffix}"
    write_clip(path, numbered_frames(24), "libvpx-vp9" if suffix in ("webm", "mkv") else "mpeg4", begin=30)
    assert frame_numbers(loaded(path, frames=24, resolution=32)) == list(range(24))


def test_alpha_is_ignored(tmp_path):
    frames = np.zeros((4, 32, 32, 4), np.uint8)
    frames[..., :3] = (200, 100, 50)
    with av.open(str(tmp_path / "clip.mov"), "w") as container:
        stream = container.add_stream("qtrle", rate=24)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "argb"
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgba").reformat(format="argb")))
        container.mux(stream.encode())
    np.testing.assert_array_equal(loaded(tmp_path / "clip.mov", frames=4), frames[..., :3])


def test_pixels_need_no_file():
    frames = numbered_frames(40)
    example = Example("x", "y", file_ref(Path("none")), time_lapse=True)
    assert frame_numbers(load_clip(example, "x", frames, 8, 14).pixels) == list(range(0, 40, 3))
    for wrong in (frames[0], frames.astype(float), frames[..., :2]):
        with pytest.raises(ImageError, match=r"uint8 \(F, H, W, 3\)"):
            load_clip(example, "x", wrong, 8, 14)
    with pytest.raises(ImageError, match="no frames"):
        load_clip(example, "x", frames[:0], 8, 14)


def test_only_squares_of_chosen_frames_are_kept(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "clip.mp4", numbered_frames(90))
    converted = []
    convert = Image.fromarray
    monkeypatch.setattr(Image, "fromarray", lambda pixels: (converted.append(pixels.shape), convert(pixels))[1])
    loaded(path, frames=4)
    assert len(converted) == 4


# damage


def test_clips_that_are_none(tmp_path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("this is no clip, but long enough to look at")
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXTINF:1,\nother.ts\n")
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    (tmp_path / "picture.png").rename(tmp_path / "picture.mp4")
    for name, expected in {
        "empty": "zero bytes",
        "text": "not a video (supported: mp4, mov, m4v, webm, mkv, avi)",
        "list": "not a video (supported: mp4, mov, m4v, webm, mkv, avi)",
        "picture": "not a video (supported: mp4, mov, m4v, webm, mkv, avi)",
    }.items():
        assert reason(tmp_path / f"{name}.mp4") == expected
    assert reason(write_audio(tmp_path / "audio.mp4")) == "audio only: no video stream"
    assert reason(write_audio(tmp_path / "audio.mkv")) == "audio only: no video stream"


def test_a_video_stream_without_frames(tmp_path):
    for name in ("none.mkv", "none.avi"):
        assert reason(write_clip(tmp_path / name, numbered_frames(0), audio=True)) == "no frames"


def test_a_cover_picture_is_no_clip(tmp_path):
    cover = io.BytesIO()
    Image.new("RGB", (16, 16)).save(cover, "JPEG")
    path = tmp_path / "song.mp4"
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=8000)
        picture = container.add_stream("mjpeg", rate=1)
        picture.height, picture.width, picture.pix_fmt = 16, 16, "yuvj420p"
        picture.disposition = av.stream.Disposition.attached_pic.value
        packet = av.Packet(cover.getvalue())
        packet.stream, packet.pts, packet.dts, packet.is_keyframe = picture, 0, 0, True
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux([packet, *sound.encode(frame), *sound.encode()])
    assert reason(path) == "audio only: no video stream"


@pytest.mark.parametrize(("codec", "suffix"), [kind for kind in KINDS if kind[1] != ".m4v"])
def test_truncated_files(tmp_path, codec, suffix):
    content = write_clip(tmp_path / f"clip{suffix}", numbered_frames(70), codec).read_bytes()
    cut = tmp_path / f"cut{suffix}"
    for share in (0.02, 0.3, 0.6, 0.85):
        cut.write_bytes(content[: int(len(content) * share)])
        assert reason(cut).startswith("truncated"), share


def test_a_truncated_file_with_its_header_in_front(tmp_path):
    path = tmp_path / "fast.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("mpeg4", rate=24)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        for picture in numbered_frames(70):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")
    assert loaded(path).shape == (16, 32, 32, 3)
    for lost in (10, 400, 2000):
        path.write_bytes(content[:-lost])
        assert reason(path).startswith("truncated"), lost


def test_size_that_changes_in_mid_stream(tmp_path):
    path = write_changing_clip(tmp_path / "clip.mov", numbered_frames(10), numbered_frames(10, 24, 40))
    assert reason(path) == "the frame size changes from 48 x 32 to 40 x 24 at frame 10"


def test_too_many_pixels_are_refused_before_decoding(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "clip.mp4", numbered_frames(3))
    monkeypatch.setattr("seppo_fast.data.media.video_file.MAX_PIXELS", 48 * 32 - 1)
    monkeypatch.setattr(Image, "fromarray", lambda *_: pytest.fail("decoded"))
    assert reason(path).startswith("too large: 48 x 32")
    monkeypatch.setattr("seppo_fast.data.media.video_file.MAX_PIXELS", 48 * 32 // 4)  # libavcodec reports no size
    assert "megapixels" in reason(path)


def test_random_damage_is_always_a_reason(tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    frames = np.stack([np.roll(pictures, 3 * i, 1) for i in range(20)])
    rng = np.random.default_rng(1)
    # VP9 has no checksums: damage shows as wrong pixels, not as an error
    for codec, suffix, least in (("libx264", ".mp4", 4), ("libvpx-vp9", ".webm", 0), ("mpeg4", ".avi", 4)):
        content = write_clip(tmp_path / f"clip{suffix}", frames, codec).read_bytes()
        found = 0
        for _ in range(8):
            damaged = bytearray(content)
            place = int(rng.integers(0, len(content) - 64))
            damaged[place : place + 64] = rng.bytes(64)
            path = tmp_path / f"bad{suffix}"
            path.write_bytes(damaged)
            try:
                assert loaded(path, whole=True).shape == (16, 32, 32, 3)
            except ImageError:
                found += 1
        assert found >= least, codec


# sources


def make_csv(folder: Path, rows: list[str], clips: list[str], columns: str = "videoid,name,is_transmit") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in clips:
        write_clip(folder / name, numbered_frames(20))
    table = folder / "list.csv"
    table.write_text("\n".join([columns, *rows]) + "\n", encoding="utf-8")
    return table


def test_csv_beside_its_clips(tmp_path):
    rows = ['a,"a bud, opening",0', "b.mp4, ice melts ,1", 'deep,"it says ""hello""",', "-Xy_1.z,dots,0.0"]
    table = make_csv(tmp_path / "d", rows, ["a.mp4", "b.mp4", "part/deep.mp4", "-Xy_1.z.mp4", "spare.mp4"])
    for spec in (str(table), str(tmp_path / "d")):
        source = open_source(spec)
        assert source.clips and not source.has_losers
        assert [(e.id, e.prompt, e.time_lapse) for e in source] == [
            ("a", "a bud, opening", True),
            ("b.mp4", "ice melts", False),
            ("deep", 'it says "hello"', False),
            ("-Xy_1.z", "dots", True),
        ]
        assert source.problems == []
        assert source.notes == [f"1 clip in {tmp_path / 'd'} is not listed in list.csv and not used"]
        assert source[2].image.name == str(tmp_path / "d/part/deep.mp4")
        assert scan(source, frames=16) == []
    pixels = load_clip(source[0], "a", source[0].image.open(), 32, 16).pixels
    assert frame_numbers(pixels) == [round(i * 19 / 15) for i in range(16)]


def test_csv_without_is_transmit_and_with_more_columns(tmp_path):
    table = make_csv(tmp_path, ["3.5,a,first", "4,b,second"], ["a.mp4", "b.webm"][:1], " score, videoid ,name")
    table.write_bytes(b"\xef\xbb\xbf" + table.read_bytes().replace(b"\n", b"\r\n"))
    source = open_source(str(table))
    assert [(e.id, e.prompt, e.time_lapse) for e in source] == [("a", "first", False)]
    assert [problem.id for problem in source.problems] == ["b"]


def test_csv_problems_are_named(tmp_path):
    rows = [
        "good,a caption,0",
        "gone,a caption,0",
        "good,,0",
        ",a caption,0",
        "good,a caption,1",
        "good.mp4,another caption,1",
        "good,a third caption,1",
        "comma,a caption, with a comma,1",
        "twin,which one,1",
        "good,what is this,2",
        "../list,outside,0",
        "",
        f"good,{'x' * 70_000},1",
        "good,a third caption,1",
        "Good,a caption,0",
        ".\\one\\twin.mp4,by its path,0",
    ]
    source = open_source(str(make_csv(tmp_path, rows, ["good.mp4", "one/twin.mp4", "two/twin.mp4"])))
    assert [(e.id, e.prompt) for e in source] == [
        ("good", "a caption"),
        ("good.mp4", "another caption"),
        ("good#8", "a third caption"),
        (".\\one\\twin.mp4", "by its path"),
    ]
    repeats = "1 row of list.csv repeats an earlier row's clip and caption and is not used: line 15"
    assert source.notes[0] == repeats
    found = [(problem.id, problem.reason) for problem in source.problems]
    expected = [
        ("gone", "the file is missing"),
        ("good", "the caption, is empty"),
        ("list.csv:5", "videoid is empty"),
        ("list.csv:6", "is_transmit is another one than in line 2"),
        ("list.csv:9", "4 fields in 3 columns: a caption with a comma needs quotes"),
        ("twin", "several clips have that name: one/twin.mp4, two/twin.mp4"),
        ("good", "is_transmit must be 0 or 1, got '2'"),
        ("../list", "the file is missing"),
        ("good", "not a caption"),
        ("Good", "there is 'good'"),
    ]
    assert [name for name, _ in found] == [name for name, _ in expected]
    for (_, told), (_, part) in zip(found, expected, strict=True):
        assert part in told


def test_unreadable_csv(tmp_path):
    table = make_csv(tmp_path, ["a,b"], ["a.mp4"], "id,caption")
    with pytest.raises(DataError, match="columns found: id, caption. Required are videoid and name"):
        open_source(str(table))
    table.write_text("videoid;name\na;b\n")
    with pytest.raises(DataError, match="columns found: videoid;name. Required are .* separated by commas"):
        open_source(str(table))
    table.write_text("")
    with pytest.raises(DataError, match="columns found: none"):
        open_source(str(table))
    table.write_bytes("videoid,name\na,café\n".encode("latin-1"))
    with pytest.raises(DataError, match="list.csv: cannot be read as UTF-8 text"):
        open_source(str(table))
    table.write_text('videoid,name\na,"no end\nb,c\n')
    with pytest.raises(DataError, match="list.csv: the row that begins in line 2 has an unclosed quote"):
        open_source(str(tmp_path))
    table.write_text('videoid,name\na,"an end" too soon\n')
    with pytest.raises(DataError, match="list.csv: line 2 is not csv"):
        open_source(str(tmp_path))
    table.write_text("videoid,name,name\na,b,c\n")
    with pytest.raises(DataError, match="list.csv: the column name appears twice"):
        open_source(str(tmp_path))
    (tmp_path / "other.csv").touch()
    with pytest.raises(DataError, match=r"2 csv files \(list.csv, other.csv\); give the path of the one to use"):
        open_source(str(tmp_path))


def test_folder_of_clips_and_captions(tmp_path):
    for name in ("a.mp4", "sub/b.MOV", "c.webm", "quiet.mkv"):
        codec = "libvpx-vp9" if name == "c.webm" else "mpeg4"
        write_clip(tmp_path / name, numbered_frames(20), codec)
        (tmp_path / name).with_suffix(".txt").write_text(f" {name} \n")
    (tmp_path / "quiet.txt").unlink()
    (tmp_path / "alone.txt").write_text("no clip")
    source = open_source(str(tmp_path))
    assert source.clips
    assert [(e.id, e.prompt, e.time_lapse) for e in source] == [
        (name, name, False) for name in ("a.mp4", "c.webm", "sub/b.MOV")
    ]
    assert {problem.id: problem.reason for problem in source.problems} == {
        "quiet.mkv": "no caption: quiet.txt is missing",
        "alone.txt": "a caption without a clip",
    }
    assert [problem.id for problem in scan(source, frames=4)] == ["quiet.mkv", "alone.txt"]
    Image.new("RGB", (8, 8)).save(tmp_path / "cover.png")
    with pytest.raises(DataError, match="holds both images and clips"):
        open_source(str(tmp_path))


def test_scan_names_every_bad_clip(tmp_path):
    rows = [f"{name},a caption,0" for name in ("good", "cut", "text", "sound", "gone")]
    table = make_csv(tmp_path, rows, ["good.mp4", "cut.mp4"])
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "cut.mp4").read_bytes()[:900])
    (tmp_path / "text.mp4").write_text("words and words")
    write_audio(tmp_path / "sound.mp4")
    found = {problem.id: problem.reason for problem in scan(open_source(str(table)), frames=16)}
    assert list(found) == ["gone", "cut", "text", "sound"]
    assert found["cut"].startswith("truncated or damaged")
    assert found["text"].startswith("not a video")
    assert found["sound"].startswith("audio only")
    with pytest.raises(DataError, match="holds clips"):
        scan(open_source(str(table)))
    with pytest.raises(DataError, match="holds images"):
        scan(open_source("shapes:3"), frames=16)


def test_digest_follows_content_not_place(tmp_path):
    def digest(folder: str, row: str = "a,one,0", count: int = 20) -> str:
        table = make_csv(tmp_path / folder, [row], [])
        write_clip(tmp_path / folder / "a.mp4", numbered_frames(count))
        return open_source(str(table)).digest()

    assert digest("one") == digest("two")
    others = [digest("three", "a,one,1"), digest("four", "a,two,0"), digest("five", count=21)]
    assert len({digest("one"), *others}) == 4


def test_digest_reads_the_ends_of_large_clips(tmp_path):
    (tmp_path / "a.txt").write_text("large")
    digests = set()
    for place in (None, 0, 1 << 20, (5 << 20) - 1):
        content = bytearray(5 << 20)
        if place is not None:
            content[place] = 1
        (tmp_path / "a.mp4").write_bytes(content)
        digests.add(open_source(str(tmp_path)).digest())
    assert len(digests) == 3  # the second MiB is not read


def test_without_pyav(tmp_path, monkeypatch):
    table = make_csv(tmp_path, ["a,b,0"], ["a.mp4"])
    (tmp_path / "sidecars").mkdir()
    (tmp_path / "sidecars/a.mp4").write_bytes((tmp_path / "a.mp4").read_bytes())
    monkeypatch.setitem(sys.modules, "av", None)
    for spec in (table, tmp_path / "sidecars"):
        with pytest.raises(DataError, match=r"PyAV .*pip install 'seppo_fast\[video\]'"):
            open_source(str(spec))
    with open(tmp_path / "a.mp4", "rb") as stream, pytest.raises(DataError, match="pip install"):
        load_clip(Example("x", "y", file_ref(table)), "x", stream, 8, 16)


def test_the_world_in_motion():
    source = open_source("shapes-motion:3:5")
    assert source.clips and len(source) == 3
    drawn = source[1].image.open()
    clip = load_clip(source[1], "x", drawn, 32, len(drawn))
    np.testing.assert_array_equal(clip.pixels, drawn)
    assert scan(source, frames=len(drawn)) == []
    for spec in ("shapes-motion:", "shapes-motion:0", "shapes-motion:x"):
        with pytest.raises(DataError, match="shapes-motion:2048"):
            open_source(spec)
