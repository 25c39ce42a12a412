"""Pixels are the original's, every kind of source gives the same, and only ImageError gets out."""

import base64
import io
import os
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import numpy
import pillow_heif
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from picture_files import (
    DEEP_MODES,
    FILES,
    ODD_FILES,
    drawing,
    exif_of,
    save,
)
from PIL import ExifTags, Image, UnidentifiedImageError

from minigpt4_runtime.config import VisionConfig
from minigpt4_runtime.errors import ConfigError, ImageError
from minigpt4_runtime.images.formats import IMAGE_SUFFIXES
from minigpt4_runtime.images.pixels import ImageLimits, load, open_rgb
from minigpt4_runtime.messages import ImageSource

GOLDENS = Path(__file__).parents[1] / "goldens"
PHOTO = GOLDENS / "vicuna/images/photo_rgb.jpg"


def vision(size, **changes):
    return VisionConfig(
        image_size=size, patch_size=1, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
        intermediate_size=8, **changes,
    )  # fmt: skip


def levels_of(value, limits=None):
    """What `open_rgb` gives for a path, bytes, …: (H, W, 3) uint8."""
    rgb = open_rgb(ImageSource(value), limits) if limits else open_rgb(ImageSource(value))
    assert rgb.mode == "RGB"
    return numpy.asarray(rgb)


def error_of(value, limits=None):
    """The message of the ImageError that this value must lead to."""
    with pytest.raises(ImageError) as caught:
        levels_of(value, limits)
    return str(caught.value)


def pillow_rgb(content):
    """What the original's `Image.open(path).convert("RGB")` gives, but deep levels scaled."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(content))
        except UnidentifiedImageError:  # Pillow alone knows no HEIC.
            image = pillow_heif.HeifImageFile(io.BytesIO(content))
        with image:
            return converted(image)


def converted(image):
    if image.mode not in DEEP_MODES:
        return numpy.asarray(image.convert("RGB"))
    levels = numpy.asarray(image)
    white = 1 if image.mode == "F" else 65_535
    grey = [[round(float(level) / white * 255) for level in row] for row in levels]
    return numpy.stack([numpy.array(grey, dtype=numpy.uint8)] * 3, axis=-1)


# ── The original's pixels ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("variant", ["vicuna", "llama2"])
@pytest.mark.parametrize("name", ["alpha.png", "grey.png", "photo_rgb.jpg"])
def test_pixels_are_the_originals(variant, name):
    expected = numpy.load(GOLDENS / variant / "arrays.npz")[f"{name}/pixels"]
    path = GOLDENS / variant / "images" / name
    pixels = load(ImageSource(path), vision(expected.shape[-1]))
    assert pixels.values.dtype == numpy.float32
    assert pixels.values.flags.c_contiguous
    assert pixels.values.shape == expected.shape
    numpy.testing.assert_allclose(pixels.values, expected, rtol=0, atol=1e-6)


def test_mean_and_std_are_the_configs():
    white = numpy.full((5, 7, 3), 255, dtype=numpy.uint8)
    config = vision(4, image_mean=(0.5, 0.0, 1.0), image_std=(0.5, 0.25, 1.0))
    values = load(ImageSource(white), config).values
    assert [values[c].tolist() for c in range(3)] == [[[level] * 4] * 4 for level in (1, 4, 0)]


@pytest.mark.parametrize("name", FILES)
def test_every_format_and_mode_is_read_as_pillow_reads_it(name):
    expected = pillow_rgb(FILES[name])
    if name in {
        "WEBP lossless",
        "JPEG progressive",
        "AVIF RGB",
    }:  # Their EXIF says 6: a quarter turn.
        expected = numpy.rot90(expected, k=-1)
    numpy.testing.assert_array_equal(levels_of(FILES[name]), expected)


@pytest.mark.parametrize(
    "mode",
    ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "LAB", "HSV", "I",
     "I;16", "I;16B", "F"],
)  # fmt: skip
def test_every_mode_of_a_given_image_becomes_rgb_as_convert_does(mode):
    given = drawing(mode)
    numpy.testing.assert_array_equal(levels_of(given), converted(given))


# ── Deep levels ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("big_endian", [False, True])
def test_16_bits_are_scaled_by_their_full_range(big_endian):
    every = numpy.arange(65_536, dtype=">u2" if big_endian else "<u2").reshape(256, 256)
    deep = Image.frombytes("I;16B" if big_endian else "I;16", (256, 256), every.tobytes())
    expected = [(level * 255 + 32_767) // 65_535 for level in range(65_536)]
    values = [deep, every, save(deep, "TIFF")]
    if not big_endian:
        values += [save(deep, "PNG"), Image.fromarray(every.astype(numpy.int32)),
                   save(Image.fromarray(every.astype(numpy.int32)), "TIFF")]  # fmt: skip
    for value in values:
        assert levels_of(value)[:, :, 1].reshape(-1).tolist() == expected


def test_8_bit_levels_survive_being_16_bits_or_floats():
    grey = numpy.arange(256, dtype=numpy.uint8).reshape(16, 16)
    values = [grey.astype(numpy.uint16) * 257, torch.from_numpy(grey) / 255]
    values += [(grey / 255).astype(kind) for kind in ("float16", "float32", "float64")]
    for value in [*values, Image.fromarray(values[-2]), save(Image.fromarray(values[-2]), "TIFF")]:
        assert (levels_of(value)[:, :, 0] == grey).all()


def test_a_tiff_of_12_bits_is_scaled_by_its_own_range():
    packed = bytes([0xFF, 0xF0, 0x00, 0x7F, 0xF0, 0x10])  # The levels 4095, 0, 2047 and 16.
    entries = [(256, 4, 4), (257, 4, 1), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 1000),
               (277, 3, 1), (278, 4, 1), (279, 4, 6)]  # fmt: skip
    head = b"II*\0" + struct.pack("<LH", 8, len(entries))
    directory = b"".join(struct.pack("<HHLL", tag, kind, 1, value) for tag, kind, value in entries)
    content = (head + directory + bytes(4)).ljust(1000, b"\0") + packed
    assert levels_of(content)[0, :, 0].tolist() == [255, 0, 127, 1]


@pytest.mark.parametrize(
    ("levels", "words"),
    [
        (numpy.full((2, 2), 255, dtype=numpy.float32), "from 255 to 255; floats from 0 to 1"),
        (numpy.array([[-0.5, 1]], dtype=numpy.float64), "from -0.5 to 1; floats"),
        (numpy.array([[0, numpy.nan]], dtype=numpy.float16), "from nan to nan; floats"),
        (Image.new("F", (2, 2), 1.5), "from 1.5 to 1.5; floats"),
        (Image.new("I", (2, 2), -1), "from -1 to -1; 16-bit levels from 0 to 65,535"),
        (Image.new("I", (2, 2), 65_536), "from 65536 to 65536; 16-bit"),
        (save(Image.new("I", (2, 2), 70_000), "TIFF"), "as bytes has levels from 70000 to 70000"),
    ],
)
def test_levels_beyond_their_range_are_refused_in_one_sentence(levels, words):
    assert words in error_of(levels)


@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("num_channels", [1, 3, 4])
def test_arrays_and_tensors_may_have_channels_first_or_last(kind, num_channels):
    levels = numpy.random.default_rng(1).integers(0, 256, (6, 8, num_channels))
    factors = {"uint8": 1, "uint16": 257, "float32": 1 / 255}
    last = (levels * factors[kind]).astype(kind)
    expected = numpy.repeat(levels, 3, axis=2)[:, :, :3] if num_channels == 1 else levels[:, :, :3]
    for array in (last, last.transpose(2, 0, 1), numpy.asfortranarray(last)):
        numpy.testing.assert_array_equal(levels_of(array), expected)
        tensor = torch.from_numpy(array.copy())
        numpy.testing.assert_array_equal(levels_of(tensor), expected)
    flat = torch.from_numpy(last[:, :, 0].copy())
    numpy.testing.assert_array_equal(levels_of(flat), numpy.stack([levels[:, :, 0]] * 3, axis=-1))


def test_tensors_may_be_of_any_float_and_on_the_way_to_a_gradient():
    halves = torch.full((3, 6, 8), 0.5)
    for tensor in (halves.bfloat16(), halves.half(), halves.double(), halves.requires_grad_()):
        assert numpy.ptp(levels_of(tensor)) == 0
        assert levels_of(tensor)[0, 0, 0] == 128


def test_tensors_without_plain_values_are_refused():
    for tensor in (torch.zeros(3, 6, 8).to_sparse(), torch.zeros(3, 6, 8, device="meta")):
        assert "cannot become an array" in error_of(tensor)


def test_a_tensor_whose_channels_could_be_either_end_is_refused():
    assert "(3, 8, 3), of which either end" in error_of(torch.zeros(3, 8, 3))
    assert levels_of(numpy.zeros((3, 8, 3), dtype=numpy.uint8)).shape == (3, 8, 3)


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1)])
def test_thin_pictures_work(size):
    pixels = load(ImageSource(save(Image.new("RGB", size, "red"), "PNG")), vision(8))
    assert numpy.ptp(pixels.values, axis=(1, 2)).tolist() == [0, 0, 0]


# ── Sources ────────────────────────────────────────────────────────────────────────────────────


def test_every_kind_of_source_gives_the_same_digest(tmp_path, monkeypatch):
    content = FILES["PNG RGB"]
    path = tmp_path / "a picture #1.png"
    path.write_bytes(content)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    image = Image.open(path)
    text = base64.b64encode(content).decode()
    sources = [
        path, str(path), path.name, f"~/{path.name}", path.as_uri(),
        path.as_uri().replace("file://", "FILE://localhost"), os.fspath(path),
        content, bytearray(content), memoryview(content),
        f"data:image/png;base64,{text}", f"DATA:;base64,{text.rstrip('=')}",
        f"data:image/png;name=a.png;base64,{quote(text)}",
        f"data:image/png;base64,{text[:50]}\n {text[50:]}",
        image, image.copy(), image.convert("RGBA"), numpy.asarray(image),
        numpy.asarray(image.convert("RGBA")), numpy.asfortranarray(numpy.asarray(image)),
    ]  # fmt: skip
    loaded = [load(ImageSource(source), vision(8)) for source in sources]
    assert len({pixels.digest for pixels in loaded}) == 1
    assert len(loaded[0].digest) == 64
    assert all((pixels.values == loaded[0].values).all() for pixels in loaded)
    other = (load(ImageSource(path), vision(9)), load(ImageSource(PHOTO), vision(8)))
    assert len({pixels.digest for pixels in (loaded[0], *other)}) == 3


def test_grey_arrays_are_read_with_and_without_a_channel():
    grey = numpy.arange(48, dtype=numpy.uint8).reshape(6, 8)
    expected = numpy.stack([grey] * 3, axis=-1)
    for array in (grey, grey[:, :, None], numpy.asfortranarray(grey)):
        numpy.testing.assert_array_equal(levels_of(array), expected)
    numpy.testing.assert_array_equal(levels_of(grey[::2, ::-3]), expected[::2, ::-3])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    "file_format", ["JPEG", "MPO", "PNG", "WEBP", "TIFF", "given", "in memory"]
)
def test_pictures_are_set_upright(file_format, orientation):
    upright = drawing("L", (16, 8)).resize((32, 16)).convert("RGB")
    # For each orientation, how a camera held that way stores the picture.
    stored = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    turned = upright.transpose(stored[orientation]) if orientation > 1 else upright
    exif = exif_of(orientation)
    if file_format == "in memory":
        turned.getexif()[ExifTags.Base.Orientation] = orientation
        value = turned
    elif file_format == "given":
        value = Image.open(io.BytesIO(save(turned, "PNG", exif=exif)))
    else:
        value = save(turned, file_format, exif=exif)
    levels = levels_of(value).astype(int)
    exact = file_format not in {"JPEG", "MPO", "WEBP"}
    assert levels.shape == (16, 32, 3)
    assert abs(levels - numpy.asarray(upright)).mean() < (1e-9 if exact else 12)


def test_a_result_given_again_is_not_turned_again():
    photo = save(drawing("RGB"), "JPEG", exif=exif_of(6))
    once = open_rgb(ImageSource(photo))
    assert once.size == (9, 13)
    numpy.testing.assert_array_equal(levels_of(once), numpy.asarray(once))


def test_damaged_exif_leaves_the_picture_as_it_is():
    for exif in (b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0nothing", exif_bytes(99)):
        photo = save(drawing("RGB"), "JPEG", exif=exif)
        numpy.testing.assert_array_equal(levels_of(photo), pillow_rgb(photo))


def exif_bytes(orientation):
    return exif_of(orientation).tobytes()


@pytest.mark.parametrize("name", ["PNG transparent bytes", "GIF transparent", "JPEG progressive"])
def test_a_given_image_is_not_changed(name):
    image = Image.open(io.BytesIO(FILES[name]))
    image.load()
    before = (image.mode, image.size, image.tobytes(), dict(image.info), dict(image.getexif()))
    rgb = open_rgb(ImageSource(image))
    rgb.paste("red", (0, 0, *rgb.size))
    assert (image.mode, image.size, image.tobytes(), dict(image.info), dict(image.getexif())) == (
        before
    )


def test_a_picture_may_be_had_when_it_is_opened():
    given = []
    source = ImageSource(lambda: given.append(1) or FILES["PNG RGB"], "a label")
    assert not given
    numpy.testing.assert_array_equal(open_rgb(source), levels_of(FILES["PNG RGB"]))
    with pytest.raises(ImageError, match=r"^a label is empty"):
        open_rgb(ImageSource(bytes, "a label"))


def test_the_file_is_closed(tmp_path):
    path = tmp_path / "pages.tif"
    path.write_bytes(FILES["TIFF pages"])
    rgb = open_rgb(ImageSource(path))
    path.unlink()  # On Windows an open file cannot be removed; a leak would warn anywhere.
    assert rgb.size == (13, 9)


def test_suffixes_are_lower_case_and_cover_the_formats():
    assert {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"} <= IMAGE_SUFFIXES
    assert all(suffix == suffix.lower() and suffix[0] == "." for suffix in IMAGE_SUFFIXES)


# ── Limits ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "9"])
@pytest.mark.parametrize("name", ["max_bytes", "max_pixels", "max_side"])
def test_limits_are_whole_numbers(name, value):
    with pytest.raises(ConfigError, match=f"ImageLimits.{name} is {value!r}"):
        ImageLimits(**{name: value})


def test_bytes_are_limited_before_they_are_read(tmp_path, monkeypatch):
    content = FILES["PNG RGB"]
    path = tmp_path / "large.png"
    path.write_bytes(content)
    enough, short = (ImageLimits(max_bytes=len(content) - less) for less in (0, 1))
    text = base64.b64encode(content).decode()
    for value in (path, content, memoryview(content), f"data:;base64,{text}"):
        assert levels_of(value, enough).shape == (9, 13, 3)
        message = error_of(value, short)
        assert f"has {len(content)} bytes; the limit is {len(content) - 1}" in message
    monkeypatch.setattr(Path, "open", None)
    assert "large.png has" in error_of(path, short)


@pytest.mark.parametrize("name", ["PNG RGB", "JPEG RGB", "GIF P", "WEBP RGB", "BMP RGB", "TIFF L"])
def test_pixels_are_limited_from_the_header(name):
    whole = FILES[name]
    head = whole if name.startswith("WEBP") else whole[: len(whole) - 40]
    assert "13×9 = 117 pixels; the limit is 116" in error_of(head, ImageLimits(max_pixels=116))
    assert "the limit is 12 a side" in error_of(head, ImageLimits(max_side=12))
    assert levels_of(whole, ImageLimits(max_pixels=117, max_side=13)).shape == (9, 13, 3)


def test_a_thin_picture_is_refused_by_its_side_before_it_is_decoded():
    header = b"IHDR" + struct.pack(">LLBBBBB", 40, 999_999, 8, 2, 0, 0, 0)
    thin = FILES["PNG RGB"][:12] + header + struct.pack(">L", zlib.crc32(header))
    thin += FILES["PNG RGB"][33:]
    assert "40×999999 pixels; the limit is 65,535 a side" in error_of(thin)


def test_given_images_and_arrays_have_the_same_limit():
    image = drawing("RGB")
    for value in (image, numpy.asarray(image)):
        assert "117 pixels" in error_of(value, ImageLimits(max_pixels=116))


def test_a_bomb_is_refused_at_once():
    header = b"IHDR" + struct.pack(">LLBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    crc = struct.pack(">L", zlib.crc32(header))
    bomb = FILES["PNG RGB"][:12] + header + crc + FILES["PNG RGB"][33:]
    assert "50000×50000 = 2,500,000,000 pixels; the limit is 100,000,000" in error_of(bomb)


def test_pillows_own_limit_does_not_stand_in_the_way(monkeypatch):
    """As if every file were beyond the size at which Pillow itself refuses."""
    expected = {name: levels_of(content) for name, content in FILES.items()}
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    for name, content in FILES.items():
        if name.startswith(("WEBP", "ICO", "ICNS")):
            try:
                numpy.testing.assert_array_equal(levels_of(content), expected[name])
            except ImageError as error:  # It is applied in Pillow's own readers of these.
                assert "PIL.Image.MAX_IMAGE_PIXELS" in str(error)  # noqa: PT017
        else:
            numpy.testing.assert_array_equal(levels_of(content), expected[name])
    assert Image.MAX_IMAGE_PIXELS == 20


def test_junk_is_given_up_soon():
    for head in (b"\xff\xd8\xff", b"GIF89a" + bytes(7)):
        assert "too much of it is no picture" in error_of(head + bytes(2_000_000))


# ── Faults ─────────────────────────────────────────────────────────────────────────────────────


def test_faults_of_paths_are_named(tmp_path):
    empty, text = tmp_path / "empty.png", tmp_path / "page.png"
    empty.write_bytes(b"")
    text.write_text("<html>not found</html>")
    (tmp_path / "folder.png").mkdir()
    faults = {
        tmp_path / "no.png": "no.png does not exist",
        tmp_path / "folder.png": "folder.png is a folder",
        text / "inner.png": "inner.png cannot be read",
        tmp_path / ("long" * 100 + ".png"): "cannot be read",
        empty: "empty.png is empty",
        text: "page.png is not a picture that can be read here; it begins with b'<html>not f",
        "nul\0.png": "is not a usable path",
        "~nobody-of-this-name/a.png": "is not a usable path",
        "": "is a folder",
        (tmp_path / "no.png").as_uri(): "no.png does not exist",
        "file://elsewhere/a.png": "on another machine",
        "http://example.com/a.png": "a.png: pictures are not fetched from the network",
        "HTTPS://example.com/a.png": "Download it first",
        "s3://bucket/a.png": "not fetched",
    }
    for value, words in faults.items():
        assert words in error_of(value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    assert "pipe.png is not a regular file" in error_of(tmp_path / "pipe.png")


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    path = tmp_path / "secret.png"
    path.write_bytes(FILES["PNG RGB"])

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert "secret.png cannot be read (Permission denied)" in error_of(path)


def test_faults_of_other_sources_are_named():
    closed = Image.open(io.BytesIO(FILES["TIFF RGB"]))
    closed.close()
    text = base64.b64encode(FILES["PNG RGB"]).decode()
    faults = [
        (b"", "the picture given as bytes is empty"),
        (b"%PDF-1.4".ljust(99), "begins with b'%PDF-1.4"),
        ("data:image/png;base64", "no base64 data URL"),
        ("data:;base64," + "%" * 10**6, "is not base64"),
        ("data:image/png;base64,", "is empty"),
        ("data:image/png;base64,!!!!", "is not base64"),
        (f"data:image/png;base64,{text[: len(text) // 8 * 4]}", "is damaged or cut short"),
        (f"data:image/png;base64,é{text}", "given as a data URL is not base64"),
        ("data:image/png,hello", "no base64 data URL"),
        (closed, "the picture given as TiffImageFile of mode RGB cannot become RGB"),
        (Image.new("RGB", (0, 4)), "is 0×4 pixels"),
        (Image.new("La", (3, 4)), "of mode La cannot become RGB (conversion from La"),
        (io.BytesIO(FILES["PNG RGB"]), "Give a path, bytes"),
        (None, "Give a path, bytes"),
    ]
    for value, words in faults:
        assert words in error_of(value)


@pytest.mark.parametrize(
    "array",
    [
        numpy.zeros((4, 4, 3), dtype=numpy.complex64), numpy.zeros((4, 4), dtype=bool),
        numpy.zeros((4, 4, 3), dtype=numpy.int64), numpy.zeros((5, 4, 2), dtype=numpy.uint8),
        numpy.zeros((8, 3, 8), dtype=numpy.uint8), numpy.zeros((1, 4, 4, 3), dtype=numpy.uint8),
        numpy.zeros(4, dtype=numpy.uint8), numpy.zeros((4, 4), dtype=object),
    ],
)  # fmt: skip
def test_arrays_of_other_kinds_are_refused_with_what_is_taken(array):
    for value in (array,) if array.dtype == object else (array, torch.from_numpy(array)):
        message = error_of(value)
        assert f"is {array.dtype} of shape {array.shape}. Give uint8, uint16 or floats" in message


def test_arrays_without_pixels_are_refused():
    for shape in ((0, 4), (4, 0, 3), (0, 0, 1)):
        assert "nothing to see" in error_of(numpy.zeros(shape, dtype=numpy.uint8))


@pytest.mark.parametrize("name", FILES)
def test_truncated_files_are_refused(name, tmp_path):
    path = tmp_path / "half.img"
    path.write_bytes(FILES[name][: len(FILES[name]) // 2])
    if name in {"PNG animated", "TIFF pages", "GIF animated", "JPEG of a phone"}:
        path.write_bytes(FILES[name][: len(FILES[name]) // 5])
    message = error_of(path)
    assert "half.img is damaged or cut short" in message
    assert "Save it anew as JPEG or PNG, or download it again." in message


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(sorted(FILES)),
    changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=8),
    cut=st.just(1.0) | st.floats(0, 1),
    junk=st.binary(max_size=8),
)
def test_nothing_but_image_errors_gets_out_of_damaged_files(name, changes, cut, junk):
    content = bytearray(FILES[name])
    for place, level in changes:
        # Most of what can go wrong stands at the beginning.
        content[int(place**2 * (len(content) - 1))] = level
    middle = int(cut * len(content))
    content = bytes(content[:middle]) + junk
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            levels_of(content, ImageLimits(max_pixels=1_000_000))
        except ImageError as error:
            assert str(error).startswith("the picture given as bytes ")  # noqa: PT017
    assert not seen


# ── Warnings and threads ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("words", ODD_FILES)
@pytest.mark.parametrize("action", ["error", "always"])
def test_pillows_warnings_do_not_get_out(words, action):
    content = ODD_FILES[words]
    with pytest.warns(UserWarning, match=words), Image.open(io.BytesIO(content)) as image:
        image.convert("RGB")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter(action)
        numpy.testing.assert_array_equal(levels_of(content), pillow_rgb(content))
    assert not seen


def test_other_peoples_warnings_are_left_alone():
    levels_of(ODD_FILES["too many entries"])
    with pytest.warns(UserWarning, match="too many entries"):
        Image.open(io.BytesIO(ODD_FILES["too many entries"])).close()
    num_filters = len(warnings.filters)
    levels_of(ODD_FILES["too many entries"])
    assert len(warnings.filters) == num_filters


def test_threads_load_pictures_at_once():
    names = [name for name in FILES for _ in range(4)] + list(ODD_FILES) * 20
    files = FILES | ODD_FILES
    config = vision(16)
    alone = {name: load(ImageSource(content), config).digest for name, content in files.items()}
    filters = list(warnings.filters)

    def load_one(name):
        with pytest.raises(ImageError):
            open_rgb(ImageSource(files[name][:10]))
        return load(ImageSource(files[name]), config).digest

    with ThreadPoolExecutor(8) as pool:
        digests = list(pool.map(load_one, names))
    assert digests == [alone[name] for name in names]
    assert warnings.filters == filters


def test_threads_may_share_one_image_that_was_never_read():
    content = save(drawing("RGB", (300, 200)), "JPEG", exif=exif_of(6))
    expected = load(ImageSource(content), vision(16)).digest
    for _ in range(10):
        source = ImageSource(Image.open(io.BytesIO(content)))
        with ThreadPoolExecutor(8) as pool:
            digests = set(pool.map(lambda _, s=source: load(s, vision(16)).digest, range(8)))
        assert digests == {expected}
