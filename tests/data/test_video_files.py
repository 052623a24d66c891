"""Clips as cameras and programs write them: non-square pixels, HDR, cover images, sound, and decoding threads."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from seppo_fast.cli import main
from seppo_fast.data.media.images import fit_square
from seppo_fast.data.media.video_file import VideoFile
from seppo_fast.data.remarks import Remarks
from seppo_fast.data.scan import scan
from seppo_fast.data.sources import open_source
from tests.helpers.clips import frame_numbers, load, loaded, numbered_frames, set_display_matrix, write_clip
from tests.helpers.hostile import run_config

# Twelve `numbered_frames` of 64 x 64 by libx265 in a compressed mp4: libx265 itself crashes on some small frames.
HEVC = zlib.decompress(base64.b85decode(
    b"c-muNV30{GsVvAW&d+6FU}6B#Kx~v-U}DI?z`&7Kl$r{ppXR0{mH=r!4aW5kel$(6|G%8WS1}(bBFw~iK`^|<@WSiOIn&P1&2PO?cmOEO$-w"
    b"wPWq+H`?gdaaidSo03~K(iIVsQMU+%!Q4Jgb7RFk&#ubT^4kqA(c!PL<20tagToT!kfuoVjk*#H#h0jgT08~$BV;PHY6AYTBe&S7h4e6a@8!"
    b"R-!zmI*-BJVH{#4^-o^H?;OdhQRg%5G5d?h^<#^&o|fz*T8i>bkdK%li~o@#UhxSpI-(P&&e&zNMS$$%r6)i7$-0=GJp^QFrunL=Q}Xq1x!G"
    b"5txJj$vw`fGl5DV@%$TMD?Pb7k4_12};0{npO(`h`(lV(z#U%(GAahxudYLxorer1p849^6=zg~WVkw5uBVdkhMoLZ*Or|U|B^6m^7?7Xuk("
    b"if~lL}J96qlQsmj;U3vRtsC$j($rfyl|E6s4vid4s34C`SRpW|Au|Ny-7T-xZe>ry!}hmyud#h$ARKo_1jH0MZ^fRiFcj|NntxNk&<+Gb3XH"
    b"kO>KKxep9~{{Hv@Ogqd9KvN_f7<m}~{|6~x2B}~MA-Sm&I2D1C>Q0P|Xfg{F8d;}>d8(Xx*3bYF022HxN<g*jE{q3@wkUxjM<l7F2pT1VE-="
    b">=mw=-S9wOkB0#pkO1!QqXu-cT80+4`$fCLl@NC3G7$p|xeAZl5l`q-c}6PbLh=EwlumW<{$sJ#p>K)EWU&<2SM0kJp`^FnDpkY7NV8{|(YE"
    b"eyp15WgqqBbl!Q#7U(oC7>i5m75BtK|m2Xc><GkQDQ+s4sulMW<v6S>dKOQkb$zmaxD>-NPH5@(#(wX41vhN2mk>V#h?"
))  # fmt: skip


def circle(width: int, height: int, aspect: Fraction) -> np.ndarray:
    """Returns four frames of a disc that is round if pixels are displayed `aspect` times as wide as high."""
    rows, columns = np.mgrid[:height, :width]
    distance = np.hypot((columns - (width - 1) / 2) * float(aspect), rows - (height - 1) / 2)
    bright = distance < 0.4 * min(width * aspect, height)
    return np.where(bright[None, ..., None], 230, 20).astype(np.uint8).repeat(4, 0).repeat(3, 3)


def extent(square: np.ndarray) -> tuple[int, int]:
    """Returns the width and height of the bright area."""
    bright = square[..., 1] > 125
    return int(bright.any(0).sum()), int(bright.any(1).sum())


SHAPES = [(128, 64, Fraction(1, 2)), (64, 128, Fraction(2)), (96, 96, Fraction(64, 45)), (80, 48, Fraction(8, 9))]
KINDS = [("libx264", ".mp4"), ("libx264", ".mov"), ("libx264", ".mkv"), ("mpeg4", ".mp4"), ("mpeg4", ".avi"),
         ("libx264", ".avi")]  # fmt: skip


@pytest.mark.parametrize(("codec", "suffix"), KINDS)
@pytest.mark.parametrize(("width", "height", "aspect"), SHAPES)
def test_circles_are_round(tmp_path, codec, suffix, width, height, aspect):
    path = write_clip(tmp_path / f"clip{suffix}", circle(width, height, aspect), codec, aspect=aspect)
    wide, high = extent(load(path, 2, resolution=128).pixels[0])
    assert abs(wide - high) <= 2
    assert abs(wide - 0.8 * 128) <= 3


def test_circles_stay_round_when_they_are_turned(tmp_path):
    for suffix in (".mp4", ".mov"):
        path = write_clip(tmp_path / f"clip{suffix}", circle(128, 64, Fraction(2, 3)), "libx264", aspect=Fraction(2, 3))
        upright, content = load(path, 2, resolution=64).pixels, path.read_bytes()
        for turn, quarters in (((0, 1, -1, 0), -1), ((0, -1, 1, 0), 1), ((-1, 0, 0, -1), 2)):
            path.write_bytes(content)
            turned = load(set_display_matrix(path, turn), 2, resolution=64).pixels
            expected = np.rot90(upright, quarters, axes=(1, 2)).astype(int)
            np.testing.assert_allclose(turned, expected, atol=2)  # the filter's two passes swap their order
            wide, high = extent(turned[0])
            assert abs(wide - high) <= 2


@pytest.mark.parametrize("aspect", [Fraction(1, 2), Fraction(3, 2), Fraction(5, 4)])
@pytest.mark.parametrize(("width", "height"), [(60, 40), (40, 60)])
def test_the_square_is_that_of_the_picture_scaled_first(width, height, aspect):
    wave = np.sin(np.arange(height)[:, None, None] / 5 + np.arange(width)[None, :, None] / 7 + np.arange(3))
    image = Image.fromarray((128 + 90 * wave).astype(np.uint8))
    shown = image.resize((round(width * aspect), height), Image.Resampling.BICUBIC)
    inner = slice(2, -2)  # at the border the filter has no neighbours
    direct, scaled = (
        square[inner, inner].astype(int) for square in (fit_square(image, 24, aspect), fit_square(shown, 24))
    )
    assert np.abs(direct - scaled).max() <= 4


def test_absurd_pixels_take_no_memory():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (1080, 1920, 3), dtype=np.uint8))
    wide, tall = fit_square(image, 32, Fraction(2**31)), fit_square(image, 32, Fraction(1, 2**31))
    # all pixels come from the column, or row, in the middle
    assert (wide == wide[:, :1]).all() and wide.std(0).max() > 3
    assert (tall == tall[:1]).all() and tall.std(1).max() > 3


@pytest.mark.parametrize("aspect", [None, Fraction(0), Fraction(1)])
def test_no_aspect_is_square(tmp_path, aspect):
    path = write_clip(tmp_path / "clip.mp4", circle(64, 64, Fraction(1)), "libx264", aspect=aspect)
    plain = write_clip(tmp_path / "plain.mp4", circle(64, 64, Fraction(1)), "libx264")
    np.testing.assert_array_equal(loaded(path, frames=2), loaded(plain, frames=2))


# colours


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("transfer", ["pq", "hlg"])
def test_hdr_clips_are_counted_and_decoded_as_they_are(tmp_path, suffix, transfer):
    code = {"pq": 16, "hlg": 18}[transfer]
    for name, trc in (("plain", 1), ("hdr", code), ("another", code)):
        path = tmp_path / "d" / f"{name}{suffix}"
        write_clip(path, numbered_frames(20), "libx264", transfer=trc)
        path.with_suffix(".txt").write_text("a clip")
    source = open_source(str(tmp_path / "d"))
    clips = [load(Path(example.image.name), 4) for example in source]
    assert [clip.remarks for clip in clips] == [(transfer,), (transfer,), ()]
    for clip in clips:
        np.testing.assert_array_equal(clip.pixels, clips[0].pixels)
    remarks = Remarks(16)
    assert scan(source, frames=4, remarks=remarks) == []
    assert remarks.of([example.id for example in source]) == {transfer: [f"another{suffix}", f"hdr{suffix}"]}


def test_check_names_hdr_clips(tmp_path, tiny, adapter, capsys):
    for name, transfer in (("plain", 1), ("hdr", 16), ("another", 18)):
        write_clip(tmp_path / "d" / f"{name}.mp4", numbered_frames(20), "libx264", transfer=transfer)
        (tmp_path / "d" / f"{name}.txt").write_text("a clip")
    data = {"source": str(tmp_path / "d"), "resolution": 16, "frames": 4}
    model = {"path": str(tiny), "motion_adapter": str(adapter), "precision": "fp32"}
    assert main(["check", str(run_config(tmp_path, tiny, data=data, model=model))]) == 0
    out = capsys.readouterr().out.splitlines()
    for kind, name in (("PQ", "hdr"), ("HLG", "another")):
        said = (
            f"1 of 3 clips is HDR ({kind}) but decoded without conversion to SDR, so its colours are pale; convert it "
        )
        assert f"{said}to avoid that: {name}.mp4" in out


# streams


def boxes(content: bytes) -> list[bytes]:
    """Returns the boxes of an mp4 file, or of the content of one of its boxes."""
    found = []
    while content:
        (size,) = struct.unpack(">I", content[:4])
        found.append(content[:size])
        content = content[size:]
    return found


def box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", 8 + len(content)) + kind + content


def test_a_cover_before_the_clip_is_passed_over(tmp_path):
    cover = io.BytesIO()
    Image.new("RGB", (16, 16), (255, 0, 0)).save(cover, "JPEG")
    plain = write_clip(tmp_path / "plain.mp4", numbered_frames(20), "libx264", audio=True)
    *others, movie = boxes(plain.read_bytes())
    header, *tracks = [part for part in boxes(movie[8:]) if part[4:8] != b"udta"]
    handler = box(b"hdlr", bytes(8) + b"mdirappl" + bytes(9))
    picture = box(b"covr", box(b"data", struct.pack(">II", 13, 0) + cover.getvalue()))
    tags = box(b"udta", box(b"meta", bytes(4) + handler + box(b"ilst", picture)))
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"".join(others) + box(b"moov", header + tags + b"".join(tracks)))
    with av.open(str(path)) as container:
        first = container.streams[0]
        assert (first.codec_context.name, first.type) == ("mjpeg", "video")
    np.testing.assert_array_equal(loaded(path), loaded(plain))


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_sound_that_is_broken_costs_no_clip(tmp_path, suffix):
    silent = write_clip(tmp_path / f"silent{suffix}", numbered_frames(20), "libx264")
    with_sound = write_clip(tmp_path / f"sound{suffix}", numbered_frames(20), "libx264", audio=True)
    np.testing.assert_array_equal(loaded(with_sound), loaded(silent))
    with av.open(str(with_sound)) as source, av.open(str(tmp_path / f"odd{suffix}"), "w") as target:
        copies = {stream.index: target.add_stream_from_template(stream) for stream in source.streams}
        for number, packet in enumerate(source.demux()):
            stream, sounds = copies[packet.stream.index], packet.stream.type == "audio"
            if not packet.size or (sounds and number % 3 == 0):
                continue  # a gap
            if sounds:
                noise = av.Packet(b"U" * packet.size)
                noise.pts, noise.dts, noise.time_base = packet.pts, packet.dts, packet.time_base
                packet = noise
            packet.stream = stream
            target.mux(packet)
    np.testing.assert_array_equal(loaded(tmp_path / f"odd{suffix}"), loaded(silent))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_hevc_is_decoded_by_one_thread(tmp_path):
    """With several threads FFmpeg 7.1.0 hangs in some clips, and clips are decoded in parallel anyway."""
    path = tmp_path / "clip.mp4"
    path.write_bytes(HEVC)
    with open(path, "rb") as stream:
        file = VideoFile("clip", stream)
        container, video = file._open()
        with container:
            assert (video.codec_context.name, video.codec_context.thread_count) == ("hevc", 1)
        before = threads()
        assert max(threads() for _ in file.frames()) == before
    assert frame_numbers(load(path, 12, time_lapse=True).pixels) == list(range(12))


def threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))
