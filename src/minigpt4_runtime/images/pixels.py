"""Path, bytes, data URL, PIL image, array or tensor → RGB → pixels, with a digest and limits.

Owns   the reading of images, the limits on them, and the original's resizing and normalising.
Takes  an ImageSource and the VisionConfig; gives a PixelImage. Every fault is an ImageError.
Never  fetches from a network, changes a caller's image, or touches Pillow's global settings. It
       adds one entry to Python's warning filters, which acts only while an image is read here.
"""

import base64
import hashlib
import os
import re
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import numpy
from PIL import ExifTags, Image
from PIL.TiffImagePlugin import TiffImageFile

from minigpt4_runtime.config import Range, VisionConfig
from minigpt4_runtime.errors import ImageError
from minigpt4_runtime.images.formats import Format, find_format, image_within
from minigpt4_runtime.images.levels import as_array, from_array, to_rgb
from minigpt4_runtime.messages import ImageSource

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # EXIF orientation → the turn that sets the image upright; 1 is upright already.

# Two threads may be given one PIL image, and Pillow's first reading of it is not made for that.
_READING_GIVEN_IMAGE = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """The largest image. `max_bytes` applies to files, bytes and data URLs, the others to all.

    `max_side` is that of a JPEG: resizing takes about a kilobyte for each row of the image.
    """

    max_bytes: int = 64 * 2**20
    max_pixels: int = 100_000_000
    max_side: int = 65_535

    def __post_init__(self) -> None:
        """Every limit must be a whole number of at least one."""
        for name, value in vars(self).items():
            Range(int, 1).check(f"ImageLimits.{name}", value)


DEFAULT_LIMITS = ImageLimits()


@dataclass(frozen=True, eq=False)
class PixelImage:
    """An image as the vision tower takes it: `values` is (3, S, S) float32, mean/std normalised.

    `digest` is that of the resized RGB pixels: the same for a path and for its content. `size` is
    the upright image's width and height before the resizing.
    """

    values: numpy.ndarray[Any, numpy.dtype[numpy.float32]]
    digest: str
    size: tuple[int, int]


def load(
    source: ImageSource, config: VisionConfig, limits: ImageLimits = DEFAULT_LIMITS
) -> PixelImage:
    """Open, resize to S×S and normalise, as the original does.

    Raises:
        ImageError: the image cannot be read or is beyond the limits; the message names it.
    """
    return prepare(open_rgb(source, limits), config)


def prepare(rgb: Image.Image, config: VisionConfig) -> PixelImage:
    """Resize an RGB image to S×S and normalise it, as the original does."""
    levels = resize(rgb, config.image_size)
    digest = hashlib.sha256(f"{config.image_size}:".encode() + levels.tobytes()).hexdigest()
    # In float32 and in this order, as torchvision's ToTensor and Normalize compute it.
    mean = numpy.array(config.image_mean, dtype=numpy.float32)
    std = numpy.array(config.image_std, dtype=numpy.float32)
    values = (levels.astype(numpy.float32) / numpy.float32(255) - mean) / std
    return PixelImage(numpy.ascontiguousarray(values.transpose(2, 0, 1)), digest, rgb.size)


def resize(rgb: Image.Image, size: int) -> numpy.ndarray[Any, numpy.dtype[numpy.uint8]]:
    """An RGB image → (size, size, 3) uint8 levels, bicubic."""
    # In width first, as Pillow did until 12.2, from which on it takes the height first where
    # H > 100·W and the height shrinks, from 13 on where H-S > 0 and H-S > 2·(W-S).
    wide = rgb.resize((size, rgb.height), Image.Resampling.BICUBIC)
    return numpy.asarray(wide.resize((size, size), Image.Resampling.BICUBIC))


def open_rgb(source: ImageSource, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """Read a whole image as RGB of 8 bits, and set it upright by its EXIF.

    The result is the caller's own: it shares nothing with `source`, and its file is closed.

    Raises:
        ImageError: the image cannot be read or is beyond the limits; the message names it.
    """
    value: object = source.value() if callable(source.value) else source.value
    if isinstance(value, Image.Image):
        return _open_given(value, source.name, limits)
    array = as_array(value, source.name)
    if array is not None:
        _check_size((array.shape[1], array.shape[0]), source.name, limits)
        return _open_given(from_array(array, source.name), source.name, limits)
    return _decode(_read(value, source.name, limits), source.name, limits)


def _read(value: object, name: str, limits: ImageLimits) -> bytes:
    """The content of a path, a URL or a bytes-like value, within `max_bytes`."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        num_bytes = value.nbytes if isinstance(value, memoryview) else len(value)
        _check_bytes(num_bytes, name, limits)
        content = bytes(value)
    elif isinstance(value, str) and value[:5].lower() == "data:":
        content = _read_data_url(value, name, limits)
    elif isinstance(value, (str, os.PathLike)):
        content = _read_file(value, name, limits)
    else:
        raise ImageError(
            f"{name} is not something to open. Give a path, bytes, a data URL, a PIL image, a "
            "numpy array or a torch tensor."
        )
    _check_bytes(len(content), name, limits)
    if not content:
        raise ImageError(f"{name} is empty: it has 0 bytes. Save or download it again.")
    return content


def _read_file(value: str | os.PathLike[Any], name: str, limits: ImageLimits) -> bytes:
    try:
        path = path_of(value, name)
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise ImageError(f"{name} is a folder. Name a picture inside it.")
        # A pipe or a device has no size to check, and reading it may never end.
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(f"{name} is not a regular file. Save the picture to a file first.")
        _check_bytes(status.st_size, name, limits)
        with path.open("rb") as file:
            return file.read(limits.max_bytes + 1)
    except FileNotFoundError:
        raise ImageError(f"{name} does not exist. Check the path.") from None
    except OSError as error:
        raise ImageError(
            f"{name} cannot be read ({error.strerror or error}). Check its path and permissions."
        ) from None
    except (ValueError, RuntimeError, TypeError) as error:  # A null character, or no home.
        raise ImageError(f"{name} is not a usable path ({error}). Check the path.") from None


def path_of(value: str | os.PathLike[Any], name: str) -> Path:
    """The path that is meant, also by a file: URL. `name` is for messages.

    Raises:
        ImageError: it is a URL of another kind, or of another machine.
    """
    text = os.fsdecode(value)
    if not isinstance(value, str) or not re.match(r"file:|[a-z][a-z0-9+.-]*://", text, re.I):
        return Path(text).expanduser()
    url = urlsplit(text)
    if url.scheme != "file":
        raise ImageError(
            f"{name}: pictures are not fetched from the network here. Download it first and give "
            "the path."
        )
    if url.netloc not in {"", "localhost"}:
        raise ImageError(f"{name} names a file on another machine. Copy it here first.")
    from urllib.request import url2pathname  # Imports half of http: only where it is used.

    return Path(url2pathname(url.path))


def _read_data_url(url: str, name: str, limits: ImageLimits) -> bytes:
    head, comma, payload = url[len("data:") :].partition(",")
    if not comma or head.rpartition(";")[2].strip().lower() != "base64":
        raise ImageError(f"{name} is no base64 data URL. Write data:image/png;base64,….")
    # Some senders quote base64's three odd characters; unquoting at large would cost gigabytes.
    for code, character in (("%2B", "+"), ("%2F", "/"), ("%3D", "=")):
        payload = payload.replace(code, character).replace(code.lower(), character)
    try:
        digits = payload.encode("ascii").translate(None, b" \t\r\n").rstrip(b"=")
        _check_bytes(len(digits) * 3 // 4, name, limits)
        return base64.b64decode(digits + b"=" * (-len(digits) % 4), validate=True)
    except ValueError as error:
        raise ImageError(f"{name} is not base64 ({error}). Encode the picture again.") from None


def _check_bytes(num_bytes: int, name: str, limits: ImageLimits) -> None:
    if num_bytes > limits.max_bytes:
        raise ImageError(
            f"{name} has {num_bytes:,} bytes; the limit is {limits.max_bytes:,}. Make it smaller."
        )


def _check_size(size: tuple[int, int], name: str, limits: ImageLimits) -> None:
    width, height = size
    if min(size) < 1:
        raise ImageError(f"{name} is {width}×{height} pixels: there is nothing to see.")
    if width * height > limits.max_pixels:
        raise ImageError(
            f"{name} is {width}×{height} = {width * height:,} pixels; the limit is "
            f"{limits.max_pixels:,}. Make it smaller."
        )
    if max(size) > limits.max_side:
        raise ImageError(
            f"{name} is {width}×{height} pixels; the limit is {limits.max_side:,} a side. "
            "Make it smaller."
        )


def _open_given(image: Image.Image, name: str, limits: ImageLimits) -> Image.Image:
    _check_size(image.size, name, limits)
    fault = f"{name} of mode {image.mode} cannot become RGB"
    with _reading(name, fault=fault, remedy="Load it and convert it to RGB first."):
        with _READING_GIVEN_IMAGE:
            image.load()
            turn = _turn_of(image)
        return _upright(to_rgb(image, name, top=_white_of(image)), turn)


class _Content(BytesIO):
    """An image's bytes, for a limited number of reads.

    Pillow looks for the next part of a JPEG or GIF byte by byte: much junk would take very long.
    """

    _reads_left = 1_000_000  # Twice what 64 MiB of GIF comments take.

    def read(self, size: int | None = -1, /) -> bytes:
        """Read as io.BytesIO does, until there were too many reads."""
        self._reads_left -= 1
        if self._reads_left < 0:
            raise OSError("too much of it is no picture")
        return super().read(size)


class _DamagedError(ImageError):
    """Pillow failed while it read an image."""


def _decode(content: bytes, name: str, limits: ImageLimits) -> Image.Image:
    kind = find_format(content, name)
    try:
        return _decode_as(kind, content, name, limits)
    except _DamagedError:
        plain = kind.without_metadata(content)
        if plain != content:
            with suppress(_DamagedError):
                return _decode_as(kind, plain, name, limits)
        raise


def _decode_as(kind: Format, content: bytes, name: str, limits: ImageLimits) -> Image.Image:
    reader = kind.find_reader(name)
    fault = f"{name} is damaged or cut short, or a kind of {kind.name} that is not read here"
    remedy = "Save it anew as JPEG or PNG, or download it again."
    with _reading(name, fault=fault, remedy=remedy), reader(_Content(content)) as file:
        _check_size(file.size, name, limits)
        image = image_within(file, name)
        _check_size(image.size, name, limits)
        if isinstance(image, TiffImageFile):
            _make_room(image)
        image.load()
        return _upright(to_rgb(image, name, top=_white_of(image)), _turn_of(image))


def _make_room(image: TiffImageFile) -> None:
    # Pillow applies its own limit when it allocates a TIFF, unless memory is allocated already.
    tags = image.tag_v2
    sides = (tags[ExifTags.Base.ImageWidth], tags[ExifTags.Base.ImageLength])
    image.im = Image.new(image.mode, sides).im


def _white_of(image: Image.Image) -> int:
    """The highest level that a deep image can hold: a TIFF of 12 bits is kept in 16."""
    bits = (16,)
    if isinstance(image, TiffImageFile) and image.mode.startswith("I;"):
        bits = image.tag_v2.get(ExifTags.Base.BitsPerSample, bits)
    return int(2 ** bits[0] - 1)


def _turn_of(image: Image.Image) -> Image.Transpose | None:
    # An image with damaged EXIF is taken as upright.
    with suppress(Exception):
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return None


def _upright(rgb: Image.Image, turn: Image.Transpose | None) -> Image.Image:
    if turn is not None:
        rgb = rgb.transpose(turn)
    # Without EXIF: a second reading of the result would turn it again.
    rgb.info = {}
    return rgb


_is_reading: ContextVar[bool] = ContextVar("_is_reading", default=False)


class _PillowWhileReading:
    """Takes the place of the pattern of a module's name in a warnings filter."""

    def match(self, module: str) -> bool:
        """Whether the warning comes from a reader, in a thread that is inside `_reading`."""
        return _is_reading.get() and module.startswith(("PIL.", "pillow_heif."))


_SILENCE = ("ignore", None, Warning, _PillowWhileReading(), 0)


@contextmanager
def _reading(name: str, *, fault: str, remedy: str) -> Iterator[None]:
    """Turn all errors of Pillow on a damaged image into an ImageError; suppress its warnings."""
    # catch_warnings would change the filters of other threads too. A filter that knows its thread
    # may stay; in front, it comes before a caller's "error".
    filters = cast("list[tuple[object, ...]]", warnings.filters)
    if not filters or filters[0] is not _SILENCE:
        filters.insert(0, _SILENCE)
    token = _is_reading.set(True)
    try:
        yield
    except ImageError:
        raise
    except Image.DecompressionBombError:
        raise ImageError(
            f"{name} is larger than Pillow's own limit for the whole process, "
            "PIL.Image.MAX_IMAGE_PIXELS. Make it smaller."
        ) from None
    except MemoryError:
        raise ImageError(f"{name} needs more memory than there is. Make it smaller.") from None
    except Exception as error:  # A damaged byte can raise a dozen types of errors.
        reason = str(error) or type(error).__name__
        raise _DamagedError(f"{fault} ({reason}). {remedy}") from error
    finally:
        _is_reading.reset(token)
