"""Formats are known by their content, and metadata that nobody can read costs no picture."""

import io
import re
import struct
import sys
import warnings
import zlib

import numpy
import pytest
from picture_files import FILES, drawing, exif_of, heic, png_with, psd, save, tiff
from PIL import ExifTags, Image

from minigpt4_runtime.errors import ImageError
from minigpt4_runtime.images.formats import (
    IMAGE_SUFFIXES,
    MOST_PARTS,
    UNREADABLE_SUFFIXES,
    find_format,
)
from minigpt4_runtime.images.pixels import ImageLimits, open_rgb
from minigpt4_runtime.messages import ImageSource


def levels_of(content, **limits):
    return numpy.asarray(open_rgb(ImageSource(content), ImageLimits(**limits)))


def error_of(content, **limits):
    with pytest.raises(ImageError) as caught:
        levels_of(content, **limits)
    return str(caught.value)


def test_every_suffix_of_pillow_for_a_format_that_is_read_is_a_pictures():
    Image.init()
    read = {"JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "ICO",
            "ICNS", "TGA", "PSD"}  # fmt: skip
    suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in read}
    assert suffixes <= IMAGE_SUFFIXES
    assert {".heic", ".heif", ".ppm", ".pgm", ".pbm"} <= IMAGE_SUFFIXES
    assert {".svg", ".jxl", ".nef", ".cr2", ".dng", ".eps"} <= UNREADABLE_SUFFIXES
    assert not IMAGE_SUFFIXES & UNREADABLE_SUFFIXES
    assert all(re.fullmatch(r"\.[a-z0-9]+", each) for each in IMAGE_SUFFIXES | UNREADABLE_SUFFIXES)


def test_formats_are_known_by_their_content():
    for name, content in FILES.items():
        known = find_format(content, "a picture").name
        assert known.upper().replace(" ", "") == name.split()[0], name


def test_a_heic_is_upright_as_its_camera_says():
    upright = drawing("RGB", (64, 48))
    levels = levels_of(heic(upright, exif=exif_of(6).tobytes())).astype(int)
    # The library turns the picture itself and takes the orientation out of the EXIF.
    expected = numpy.rot90(numpy.asarray(upright), k=-1)
    assert levels.shape == (64, 48, 3)
    assert abs(levels - expected).mean() < 12


def test_what_a_heic_needs_is_said_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    message = error_of(FILES["HEIC RGB"])
    assert message.startswith("the picture given as bytes is a picture in HEIC, which this install")
    assert message.endswith("Convert it to JPEG, or run: pip install 'minigpt4-runtime[heif]'")


@pytest.mark.parametrize(
    "content",
    [
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"\xef\xbb\xbf<?xml version='1.0'?>\n<!-- drawn -->\n<svg width='3'>",
        b"<?xml version='1.0'?><!DOCTYPE svg PUBLIC '-//W3C//DTD SVG 1.1//EN'><svg>",
        b"\n<!-- drawn by hand -->\n<SVG>",
    ],
)
def test_an_svg_is_refused_in_words(content):
    assert "a drawing in SVG, which is not read here. Export it as PNG." in error_of(content)


@pytest.mark.parametrize(
    "content",
    [b"<html><svg></html>", b"\0\0\0\x20ftypisom\0\0\2\0isomiso2", b"\xff\x0a jxl", b"%!PS-Adobe",
     b"P7\nWIDTH 2", b"svg is a format", b"<?xml version='1.0'?><note>svg</note>",
     b"plain text of some length", bytes(40)],
)  # fmt: skip
def test_what_is_no_picture_here_is_said_to_be_none(content):
    assert "is not a picture that can be read here; it begins with" in error_of(content)


def test_a_cameras_raw_file_is_not_taken_for_its_preview():
    preview = tiff(4, 3, entries=[(254, 4, 1, 1), (330, 4, 1, 8)])
    assert "camera's raw file, of which only a small preview" in error_of(preview)
    assert levels_of(tiff(4, 3, entries=[(254, 4, 1, 1)])).shape == (3, 4, 3)


@pytest.mark.parametrize("name", ["ICO", "ICNS"])
def test_the_image_within_an_icon_is_limited_too(name):
    large = save(Image.new("RGBA", (1200, 1000)), "PNG")
    if name == "ICO":
        head = struct.pack("<HHHBBBBHHLL", 0, 1, 1, 32, 32, 0, 0, 1, 32, len(large), 22)
    else:
        head = struct.pack(">4sL4sL", b"icns", len(large) + 16, b"ic08", len(large) + 8)
    assert "is 1200×1000 = 1,200,000 pixels; the limit is" in error_of(
        head + large, max_pixels=10**6
    )
    assert levels_of(head + large).shape == (1000, 1200, 3)


# ── Metadata ───────────────────────────────────────────────────────────────────────────────────

JUNK = [
    b"", b"\1", bytes(20), b"\xff" * 40, bytes(range(256)), b"Exif\0\0", b"ICC_PROFILE\0",
    b"ICC_PROFILE\0\1\5xx", b"Exif\0\0II*\0\xff\xff\xff\xff", b"JFIF\0", b"Adobe", b"MPF\0II*\0",
    b"Photoshop 3.0\x008BIM\x04\x04\0", b"k\0\5abc", b"k\0\0\0\0\0\xff\xfe",
    b"Raw profile type exif\0nonsense", exif_of(6).tobytes()[:30],
]  # fmt: skip
PACKED = zlib.compress(b"a" * 2 * 2**20)
CHUNKS = [
    "tEXt", "zTXt", "iTXt", "iCCP", "eXIf", "pHYs", "cHRM", "tIME", "sRGB", "gAMA", "sBIT", "bKGD",
    "tRNS", "acTL", "fcTL", "abCd",
]  # fmt: skip


@pytest.mark.parametrize(
    ("chunk", "content"),
    [
        (b"zTXt", b"k\0\0" + PACKED),
        (b"iTXt", b"k\0\1\0\0\0" + PACKED),
        (b"iCCP", b"k\0\0" + PACKED),
    ],
)
def test_text_and_profiles_beyond_pillows_limit_are_left_out(chunk, content):
    odd = png_with(chunk, content)
    with pytest.raises((ValueError, OSError)), Image.open(io.BytesIO(odd)) as image:
        image.load()
    numpy.testing.assert_array_equal(levels_of(odd), levels_of(FILES["PNG RGB"]))


def test_much_text_in_all_is_left_out_and_the_orientation_stays():
    text = b"zTXt" + b"k\0\0" + zlib.compress(bytes(10**6))
    texts = [struct.pack(">L", len(text) - 4) + text + struct.pack(">L", zlib.crc32(text))] * 70
    turned = save(drawing("RGB"), "PNG", exif=exif_of(6))
    odd = turned[:33] + b"".join(texts) + turned[33:]
    numpy.testing.assert_array_equal(levels_of(odd), levels_of(turned))
    assert levels_of(odd).shape == (13, 9, 3)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("is_last", [False, True])
def test_no_chunk_of_metadata_costs_a_png(chunk, is_last):
    whole = FILES["PNG RGB"]
    for junk in JUNK:
        for fault in (0, 1):
            crc = struct.pack(">L", zlib.crc32(chunk.encode() + junk) ^ fault)
            odd = struct.pack(">L", len(junk)) + chunk.encode() + junk + crc
            at = whole.index(b"IEND") - 4 if is_last else 33
            numpy.testing.assert_array_equal(
                levels_of(whole[:at] + odd + whole[at:]), levels_of(whole)
            )


@pytest.mark.parametrize("marker", [*range(0xE0, 0xF0), 0xFE])
def test_no_segment_of_metadata_costs_a_jpeg(marker):
    whole = FILES["JPEG RGB"]
    for junk in JUNK:
        odd = b"\xff" + bytes([marker]) + struct.pack(">H", len(junk) + 2) + junk
        numpy.testing.assert_array_equal(levels_of(whole[:2] + odd + whole[2:]), levels_of(whole))


@pytest.mark.parametrize(
    ("name", "start", "part"),
    [
        ("JPEG RGB", 2, b"\xff\xfe\0\2"),
        ("PNG RGB", 33, b"\0\0\0\0tEXt" + struct.pack(">L", zlib.crc32(b"tEXt"))),
    ],
)
def test_of_very_many_parts_the_rest_is_left_as_it_is(name, start, part):
    head, rest = FILES[name][:start], FILES[name][start:]
    few = head + part * (MOST_PARTS // 2) + rest
    assert part not in find_format(few, name).without_metadata(few)
    many = head + part * (3 * MOST_PARTS) + rest
    plain = find_format(many, name).without_metadata(many)
    assert plain.startswith(head)
    assert plain.endswith(rest)
    assert plain.count(part) in (2 * MOST_PARTS, 2 * MOST_PARTS + 1)  # IHDR is a part too.


def test_a_jpeg_is_left_as_it_is_from_what_is_no_marker_on():
    whole, comment = FILES["JPEG RGB"], b"\xff\xfe\0\2"
    odd = whole[:2] + comment + b"\0\0\0\2" + comment + whole[2:]
    plain = find_format(odd, "a picture").without_metadata(odd)
    assert plain == whole[:2] + b"\0\0\0\2" + comment + whole[2:]


@pytest.mark.parametrize("tag", [263, 269, 270, 271, 282, 296, 305, 306, 318, 700, 33723, 34377,
                                 34665, 34675, 34853, 37724, 40965, 65000])  # fmt: skip
def test_no_tag_of_metadata_costs_a_tiff(tag):
    for kind in (1, 2, 3, 4, 5, 7, 9, 10, 12, 13, 16, 99):
        for count, value in ((0, 0), (1, 900), (5, 50), (1000, 50), (1, 0xFFFFFFFF)):
            odd = tiff(4, 3, entries=[(tag, kind, count, value)])
            assert levels_of(odd).tolist() == [[[0] * 3] * 4] * 3, (kind, count, value)


@pytest.mark.parametrize("big", [False, True])
def test_a_tiff_keeps_its_colours_and_orientation_where_metadata_is_left_out(big):
    for mode in ("P", "RGB", "CMYK", "I;16"):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6
        exif[700] = b"<xmp>" * 20
        whole = save(drawing(mode), "TIFF", exif=exif, big_tiff=big, compression="tiff_lzw")
        # XMP as a number, at which Pillow stops.
        entry = struct.pack("<HH", 700, 1)
        odd = whole.replace(entry, struct.pack("<HH", 700, 9))
        assert odd != whole
        numpy.testing.assert_array_equal(levels_of(odd), levels_of(whole))


@pytest.mark.parametrize("file_format", ["AVIF", "WEBP", "HEIC", "JPEG2000", "PSD"])
def test_no_odd_metadata_costs_a_picture_in_another_format(file_format):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for whole, odd in odd_pairs(file_format):
            assert odd != whole
            numpy.testing.assert_array_equal(levels_of(odd), levels_of(whole))


def odd_pairs(file_format):
    rgb = drawing("RGB", (64, 48))
    if file_format == "PSD":
        whole = psd(rgb)
        for junk in filter(None, JUNK):
            length = struct.pack(">L", len(junk))
            yield whole, whole[:30] + length + junk + whole[34:]
            yield whole, whole[:34] + length + junk + whole[38:]
    elif file_format == "JPEG2000":
        whole = save(rgb, "JPEG2000")
        at = whole.index(b"jp2h") - 4
        length = int.from_bytes(whole[at : at + 4])
        for junk in JUNK:
            box = struct.pack(">L", length + 8 + len(junk)) + whole[at + 4 : at + length]
            box += struct.pack(">L4s", 8 + len(junk), b"res ") + junk
            yield whole, whole[:at] + box + whole[at + length :]
    else:
        exif = exif_of(1).tobytes()
        options = {"exif": exif, "icc_profile": bytes(200)}
        whole = heic(rgb, **options) if file_format == "HEIC" else save(rgb, file_format, **options)
        at = whole.index(exif[6:14])  # Past its name: the head of the TIFF within.
        for junk in (each[:60] for each in JUNK if each):
            yield whole, whole[:at] + junk + whole[at + len(junk) :]
