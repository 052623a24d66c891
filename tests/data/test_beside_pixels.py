"""Broken or large metadata beside an image's pixels never makes it unreadable; the orientation is still applied."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image, features

from seppo_fast.data.media.images import ImageError, bytes_ref, load_image
from tests.helpers.pictures import encoded, pixels, with_wrong_crc

SIDE = 24
PILLOW = tuple(int(part) for part in features.version("pil").split(".")[:2])
PICTURE = pixels(1, SIDE, SIDE)
PLAIN = {
    "JPEG": encoded(PICTURE, "JPEG"),
    "WEBP": encoded(PICTURE, "WEBP", lossless=True),
    "PNG": encoded(PICTURE),
    "TIFF": encoded(PICTURE, "TIFF"),
    "TIFF, packed": encoded(PICTURE, "TIFF", compression="tiff_lzw"),
}
XMP = b'<rdf:Description tiff:Orientation="6"/>'


def load(content: bytes) -> np.ndarray:
    return load_image(bytes_ref("x", lambda: content), SIDE)


def assert_used(content: bytes, kind: str, turned: bool = False) -> None:
    """Asserts the same pixels as those of the plain image, rotated by 90 degrees clockwise if `turned`."""
    np.testing.assert_array_equal(load(content), np.rot90(load(PLAIN[kind]), -1 if turned else 0))


Entry = tuple[int, int, int, bytes]
"""An entry of a TIFF's directory: tag, type, count, value."""
ORIENTATION: Entry = (0x112, 3, 1, struct.pack("<H", 6))


def directory(entries: list[Entry], place: int) -> bytes:
    """Returns a little-endian TIFF directory for this offset."""
    values, rows = b"", b""
    start = place + 2 + 12 * len(entries) + 4
    for tag, kind, count, value in sorted(entries):
        if len(value) > 4:
            value, values = struct.pack("<I", start + len(values)), values + value
        rows += struct.pack("<HHI", tag, kind, count) + value.ljust(4, b"\0")
    return struct.pack("<H", len(entries)) + rows + bytes(4) + values


def exif(*entries: Entry) -> bytes:
    return b"Exif\0\0II*\0\x08\0\0\0" + directory(list(entries), 8)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(*chunks: bytes, behind: bool = False) -> bytes:
    """Returns the plain PNG with more chunks, before or behind the pixels."""
    place = -12 if behind else 33
    return PLAIN["PNG"][:place] + b"".join(chunks) + PLAIN["PNG"][place:]


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def jpeg(*segments: bytes) -> bytes:
    return PLAIN["JPEG"][:2] + b"".join(segments) + PLAIN["JPEG"][2:]


def tiff(kind: str, *entries: Entry) -> bytes:
    """Returns the plain TIFF with more tags, in a new directory at the end."""
    content = PLAIN[kind] + bytes(len(PLAIN[kind]) % 2)
    (place,) = struct.unpack("<I", content[4:8])
    (count,) = struct.unpack("<H", content[place : place + 2])
    rows = (
        struct.unpack("<HHI4s", content[start : start + 12]) for start in range(place + 2, place + 2 + 12 * count, 12)
    )
    kept = [row for row in rows if row[0] not in [entry[0] for entry in entries]]
    return content[:4] + struct.pack("<I", len(content)) + content[8:] + directory([*kept, *entries], len(content))


ODD_TAGS: dict[str, Entry] = {
    "a double": (0x9C9B, 12, 1, struct.pack("<d", 1e300)),
    "not a number": (0x11A, 12, 1, struct.pack("<d", float("nan"))),
    "negative": (0x11A, 9, 1, struct.pack("<i", -5)),
    "by zero": (0x11A, 5, 1, bytes(8)),
    "text for a number": (0x11A, 2, 3, b"ab\0"),
    "a number for text": (0x131, 4, 1, struct.pack("<I", 7)),
    "a directory nowhere": (0x8769, 4, 1, struct.pack("<I", 0x7FFFFFFF)),
    "a directory in a loop": (0x8769, 4, 1, struct.pack("<I", 8)),
    "text for a directory": (0x8769, 2, 4, b"abc\0"),
    "a short directory": (0x8825, 3, 1, struct.pack("<H", 3)),
    "an unknown type": (0x9999, 99, 1, b"1234"),
    "a huge count": (0x9999, 2, 0x7FFFFFFF, b"1234"),
    "a maker's note": (0x927C, 7, 10, bytes(10)),
}
WIDTH: Entry = (0x100, 12, 1, struct.pack("<d", 24.0))  # an image's size does not belong in EXIF; writing it back fails


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", [*ODD_TAGS, "a width"])
def test_an_odd_tag_does_not_hide_the_orientation(case):
    told = exif(ORIENTATION, ODD_TAGS.get(case, WIDTH))
    assert_used(jpeg(segment(0xE1, told)), "JPEG", turned=True)
    assert_used(encoded(PICTURE, "WEBP", lossless=True, exif=told), "WEBP", turned=True)
    for behind in (False, True):
        assert_used(png(chunk(b"eXIf", told[6:]), behind=behind), "PNG", turned=True)
    for kind in ("TIFF", "TIFF, packed") if case in ODD_TAGS else ():
        assert_used(tiff(kind, ORIENTATION, ODD_TAGS[case]), kind, turned=True)


@pytest.mark.parametrize("turn", range(2, 9))
def test_every_orientation(turn):
    """Follows the drawings of EXIF 2.3: where the stored image's first row and column are displayed."""
    shown = {
        2: PICTURE[:, ::-1], 3: PICTURE[::-1, ::-1], 4: PICTURE[::-1], 5: PICTURE.swapaxes(0, 1),
        6: np.rot90(PICTURE, -1), 7: PICTURE[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(PICTURE),
    }  # fmt: skip
    entry = (0x112, 3, 1, struct.pack("<H", turn))
    for content in (png(chunk(b"eXIf", exif(entry)[6:])), tiff("TIFF", entry), tiff("TIFF, packed", entry)):
        np.testing.assert_array_equal(load(content), shown[turn])


GARBAGE = [
    b"",
    b"garbage",
    b"II*\0",
    b"II*\0\xff\xff\xff\x7f",
    b"MM\0*\0\0\0\x08\xff\xff" + bytes(30),
    b"II+\0" + bytes(20),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("garbage", GARBAGE)
def test_exif_that_is_none(garbage):
    assert_used(jpeg(segment(0xE1, b"Exif\0\0" + garbage)), "JPEG")
    assert_used(png(chunk(b"eXIf", garbage)), "PNG")
    assert_used(png(chunk(b"eXIf", garbage), behind=True), "PNG")
    if garbage:
        assert_used(encoded(PICTURE, "WEBP", lossless=True, exif=b"Exif\0\0" + garbage), "WEBP")
        turned = encoded(PICTURE, "WEBP", lossless=True, exif=b"Exif\0\0" + garbage, xmp=XMP)
        assert_used(turned, "WEBP", turned=True)


def test_orientation_in_xmp_alone():
    assert_used(encoded(PICTURE, "WEBP", lossless=True, xmp=XMP), "WEBP", turned=True)
    assert_used(encoded(PICTURE, "WEBP", lossless=True, xmp=bytes(range(256))), "WEBP")
    if PILLOW >= (11, 0):  # older versions drop a JPEG's XMP
        assert_used(jpeg(segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP)), "JPEG", turned=True)
    for behind in (False, True):
        for head, body in ((b"\0\0", XMP), (b"\1\0", zlib.compress(XMP))):
            assert_used(
                png(chunk(b"iTXt", b"XML:com.adobe.xmp\0" + head + b"\0\0" + body), behind=behind), "PNG", turned=True
            )


def test_orientation_as_imagemagick_writes_it():
    written = exif(ORIENTATION)
    text = b"\nexif\n%8d\n%s\n" % (len(written), written.hex().encode())
    for kind, body in ((b"zTXt", b"\0" + zlib.compress(text)), (b"tEXt", text)):
        assert_used(png(chunk(kind, b"Raw profile type exif\0" + body)), "PNG", turned=True)


LARGE = b"a " * 700_000
CHUNKS = {
    "large XMP": (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(LARGE)),
    "large XMP, not packed": (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + LARGE),
    "large packed text": (b"zTXt", b"a\0\0" + zlib.compress(LARGE)),
    "much text": (b"tEXt", b"a\0" + bytes(70_000_000)),
    "a large profile": (b"iCCP", b"a\0\0" + zlib.compress(np.random.default_rng(0).bytes(1_500_000))),
    "a profile packed otherwise": (b"iCCP", b"a\0\1abc"),
    "no profile": (b"iCCP", b""),
    "text packed otherwise": (b"zTXt", b"a\0\7abc"),
    "no text": (b"tEXt", b""),
    "no hexadecimals": (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n  3\nzz\n")),
    "text of no encoding": (b"iTXt", b"\xff\xfe\0\0\0\0\0\xff"),
    "a short gamma": (b"gAMA", b"1"),
    "no primaries": (b"cHRM", b""),
    "no intent": (b"sRGB", b""),
    "a short density": (b"pHYs", b"1"),
    "an unknown one": (b"abCd", bytes(2_000_000)),
}  # fmt: skip


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("case", CHUNKS)
def test_chunks_that_only_inform(case, behind):
    content = png(chunk(*CHUNKS[case]), behind=behind)
    assert_used(content, "PNG")
    assert_used(with_wrong_crc(content, CHUNKS[case][0]), "PNG")


def test_a_chunk_of_pixels_that_is_broken_is_refused():
    for kind in (b"PLTE", b"tRNS"):
        content = encoded(Image.fromarray(PICTURE).quantize(16), transparency=3)
        with pytest.raises(ImageError):
            load(with_wrong_crc(content, kind))


@pytest.mark.parametrize("kind", [b"iTXt", b"zTXt"])
def test_a_text_that_is_a_bomb_takes_no_memory(kind):
    head = {b"iTXt": b"XML:com.adobe.xmp\0\1\0\0\0", b"zTXt": b"Raw profile type exif\0\0"}[kind]
    content = png(chunk(kind, head + zlib.compress(bytes(200_000_000), 9)))
    tracemalloc.start()
    assert_used(content, "PNG")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6


SEGMENTS = [
    (0xE0, b"JFIF"), (0xE0, b"JFIF\0\1"), (0xE0, b""), (0xE1, b""), (0xE1, b"http://ns.adobe.com/xap/1.0/\0\xff"),
    (0xE2, b"ICC_PROFILE\0"), (0xE2, b"ICC_PROFILE\0\1"), (0xE2, b"ICC_PROFILE\0\1\2abc"),
    (0xE2, b"ICC_PROFILE\0\0\0abc"), (0xE2, b"MPF\0"), (0xE2, b"MPF\0garbage"), (0xE2, b"FPXR\0"), (0xE2, b""),
    (0xE2, b"MPF\0II*\0\x08\0\0\0\xff\xff"),
    (0xED, b"Photoshop 3.0\0"), (0xED, b"Photoshop 3.0\x008BIM\x03\xed"), (0xED, b"Photoshop 3.0\x008BIM\x04\x04\xff"),
    (0xED, b""), (0xEE, b"Adobe"), (0xEE, b"Adobe\0"), (0xEE, b""), (0xFE, b""), (0xFE, bytes(60_000)), (0xEF, b"x"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", range(len(SEGMENTS)))
def test_segments_that_only_inform(number):
    assert_used(jpeg(segment(*SEGMENTS[number])), "JPEG")
    turned = jpeg(segment(*SEGMENTS[number]), b"\xff\xff", segment(0xE1, exif(ORIENTATION))[1:])  # a fill byte
    assert_used(turned, "JPEG", turned=True)


def test_segments_that_tell_colours_are_kept():
    """Without Adobe's segment, RGB would be decoded as YCbCr, and CMYK would not be inverted."""
    planes = Image.fromarray(PICTURE)
    told = encoded(planes, "JPEG", keep_rgb=True, quality=100) if PILLOW >= (10, 2) else None
    for content in filter(None, (told, encoded(Image.new("CMYK", (SIDE, SIDE), (0, 255, 255, 0)), "JPEG"))):
        with Image.open(io.BytesIO(content)) as image:
            np.testing.assert_array_equal(load(content), np.asarray(image.convert("RGB")))


def test_pictures_of_several_pictures():
    kinds = {"save_all": True, "append_images": [Image.fromarray(pixels(2, SIDE, SIDE))]}
    content = encoded(PICTURE, "MPO", **kinds)
    assert_used(content, "JPEG")
    place = content.index(b"MPF\0") + 4
    assert_used(content[:place] + b"\xff" * 20 + content[place + 20 :], "JPEG")
    assert_used(encoded(PICTURE, "MPO", exif=exif(ORIENTATION), **kinds), "JPEG", turned=True)


def test_a_gif_with_a_long_comment():
    palette = Image.fromarray(PICTURE).quantize(16)
    np.testing.assert_array_equal(
        load(encoded(palette, "GIF", comment=bytes(200_000))), np.asarray(palette.convert("RGB"))
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", PLAIN)
def test_half_a_file_is_refused(kind):
    remarks = {"JPEG": jpeg(segment(0xED, b"Photoshop 3.0\0")), "PNG": png(chunk(*CHUNKS["large packed text"]))}
    for content in filter(None, (PLAIN[kind], remarks.get(kind))):
        for lost in (len(content) // 2, 40):
            with pytest.raises(ImageError, match="truncated or damaged|not an image"):
                load(content[:-lost])
