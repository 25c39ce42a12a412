"""Bytes → their format, and Pillow's reader of it.

Owns   the formats that are read, their first bytes and their file names; the names of image files
       that are not read; and the parts of a file that can be left out if its metadata is broken.
Takes  a file's content; gives a Format and its reader. Any other content is an ImageError.
Never  decodes a pixel, or touches Pillow's global settings.
"""

import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from io import BytesIO
from typing import Literal

from PIL.Image import Image
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import TiffImageFile

from minigpt4_runtime.errors import ImageError

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".bmp", ".dib", ".tif",
     ".tiff", ".gif", ".avif", ".avifs", ".heic", ".heics", ".heif", ".heifs", ".hif", ".jp2",
     ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".ico",
     ".icns", ".tga", ".icb", ".vda", ".vst", ".psd"}
)  # fmt: skip
# Image files that are not read: one in a folder must be reported.
UNREADABLE_SUFFIXES = frozenset(
    {".svg", ".svgz", ".eps", ".ai", ".cdr", ".emf", ".wmf", ".jxl", ".jxr", ".wdp", ".hdp",
     ".psb", ".xcf", ".kra", ".ora", ".exr", ".hdr", ".dds", ".pcx", ".sgi", ".xbm", ".xpm",
     ".qoi", ".cur", ".pam", ".pict", ".pct", ".fits", ".dcm", ".djvu", ".bpg", ".flif", ".dng",
     ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".srf", ".sr2", ".orf", ".rw2", ".raf",
     ".pef", ".srw", ".3fr", ".iiq", ".x3f", ".erf", ".mrw"}
)  # fmt: skip


# The most chunks or segments to look at. A malicious file has millions: the rest stays.
MOST_PARTS = 10_000


def _png_without_metadata(content: bytes) -> bytes:
    """The chunks that a decoder must know, whose names begin with a capital, and sound EXIF."""
    kept, start = bytearray(content[:8]), 8
    for _ in range(MOST_PARTS):
        end = start + 12 + int.from_bytes(content[start : start + 4])
        kind, chunk = content[start + 4 : start + 8], content[start:end]
        is_sound = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:])
        if kind[:1].isupper() or (kind == b"eXIf" and is_sound):
            kept += chunk
        start = end
        if start >= len(content):
            break
    return bytes(kept + content[start:])


# Applications' segments of a JPEG that matter, and how long each is at least: JFIF, EXIF, Adobe.
_JPEG_SEGMENTS = {b"\xff\xe0": 16, b"\xff\xe1": 2, b"\xff\xee": 14}


def _jpeg_without_metadata(content: bytes) -> bytes:
    """All but comments and applications' segments, of which those stay that matter."""
    kept, start = bytearray(content[:2]), 2
    for _ in range(MOST_PARTS):
        marker = content[start : start + 2]
        if marker[:1] != b"\xff" or marker == b"\xff\xda":
            break
        length = int.from_bytes(content[start + 2 : start + 4])
        is_metadata = b"\xff\xe0" <= marker <= b"\xff\xef" or marker == b"\xff\xfe"
        if not is_metadata or length >= _JPEG_SEGMENTS.get(marker, 2**16):
            kept += content[start : start + 2 + length]
        start += 2 + length
    return bytes(kept + content[start:])


# The tags that determine the pixels of a TIFF. 254 and 330 mark a camera's raw file.
_TIFF_TAGS = frozenset(
    {254, 256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323,
     324, 325, 330, 332, 338, 339, 347, *range(512, 522), *range(529, 533)}
)  # fmt: skip
# As a TIFF counts them, and a BigTIFF need not.
_MOST_TAGS = 2**16 - 1


def _tiff_without_metadata(content: bytes) -> bytes:
    """The first page alone, with a shorter list of tags in the place of the whole one."""
    order: Literal["little", "big"] = "little" if content[:2] == b"II" else "big"
    is_big = 43 in content[2:4]
    num_count, num_entry, num_offset = (8, 20, 8) if is_big else (2, 12, 4)
    place = int.from_bytes(content[num_offset : 2 * num_offset], order)
    count = min(int.from_bytes(content[place : place + num_count], order), _MOST_TAGS)
    entries = content[place + num_count :][: count * num_entry]
    tags = [entries[at : at + num_entry] for at in range(0, len(entries), num_entry)]
    tags = [tag for tag in tags if int.from_bytes(tag[:2], order) in _TIFF_TAGS]
    directory = len(tags).to_bytes(num_count, order) + b"".join(tags) + bytes(num_offset)
    return content[:place] + directory + content[place + len(directory) :]


def _psd_without_metadata(content: bytes) -> bytes:
    """The header, the colours of a palette, and the flat image: no resources, no layers."""
    end = 30 + int.from_bytes(content[26:30])
    start = end
    for _ in ("resources", "layers"):
        start += 4 + int.from_bytes(content[start : start + 4])
    return content[:end] + bytes(8) + content[start:]


def _heif_without_exif(content: bytes) -> bytes:
    """The same boxes, but the type of EXIF is one that no reader knows."""
    return re.sub(rb"(infe.{8,10}?)Exif", rb"\1skip", content, flags=re.DOTALL)


def _jp2_without_resolution(content: bytes) -> bytes:
    """The same boxes, but the type of the print size is one that no reader knows."""
    return re.sub(rb"(jp2h.{22,400}?)res ", rb"\1skip", content, count=1, flags=re.DOTALL)


@dataclass(frozen=True)
class Format:
    """`begins` is a pattern for the first bytes; `reader` is "module:class"."""

    name: str
    begins: bytes
    reader: str
    install: str = "pip install -U pillow"
    without_metadata: Callable[[bytes], bytes] = bytes

    def find_reader(self, image_name: str) -> Callable[[BytesIO], ImageFile]:
        """Pillow's reader. `Image.open` would apply Pillow's limit, one for the whole process.

        Raises:
            ImageError: a package is missing.
        """
        module, _, reader = self.reader.partition(":")
        try:
            return getattr(import_module(module), reader)  # type: ignore[no-any-return]
        except ImportError:
            raise ImageError(
                f"{image_name} is a picture in {self.name}, which this installation cannot read. "
                f"Convert it to JPEG, or run: {self.install}"
            ) from None


# An MPO is read as the JPEG that it begins with, a PSD as the flat image that it holds.
_FORMATS = (
    Format("JPEG", rb"\xff\xd8\xff", "PIL.JpegImagePlugin:JpegImageFile",
           without_metadata=_jpeg_without_metadata),
    Format("PNG", rb"\x89PNG\r\n\x1a\n", "PIL.PngImagePlugin:PngImageFile",
           without_metadata=_png_without_metadata),
    Format("WebP", rb"RIFF....WEBP", "PIL.WebPImagePlugin:WebPImageFile"),
    Format("GIF", rb"GIF8[79]a", "PIL.GifImagePlugin:GifImageFile"),
    Format("BMP", rb"BM", "PIL.BmpImagePlugin:BmpImageFile"),
    Format("TIFF", rb"II[*+]\0|MM\0[*+]", "PIL.TiffImagePlugin:TiffImageFile",
           without_metadata=_tiff_without_metadata),
    # These two are kinds of one container. The brands at its beginning tell which.
    Format("AVIF", rb"\0\0..ftyp(?:.{4}){0,16}?avi[fs]", "PIL.AvifImagePlugin:AvifImageFile",
           install="pip install -U 'pillow>=11.3'", without_metadata=_heif_without_exif),
    Format("HEIC", rb"\0\0..ftyp(?:.{4}){0,16}?(?:hei[cxms]|hev[cxms]|mif1|msf1)",
           "pillow_heif:HeifImageFile", install="pip install 'minigpt4-runtime[heif]'",
           without_metadata=_heif_without_exif),
    Format("JPEG 2000", rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  \r\n\x87\n",
           "PIL.Jpeg2KImagePlugin:Jpeg2KImageFile", without_metadata=_jp2_without_resolution),
    Format("PPM", rb"P[1-6f]\s", "PIL.PpmImagePlugin:PpmImageFile"),
    Format("ICO", rb"\0\0\x01\0", "PIL.IcoImagePlugin:IcoImageFile"),
    Format("ICNS", rb"icns", "PIL.IcnsImagePlugin:IcnsImageFile"),
    Format("PSD", rb"8BPS", "PIL.PsdImagePlugin:PsdImageFile",
           without_metadata=_psd_without_metadata),
    # It begins with no mark: a header is known by what its fields may hold.
    Format("TGA", rb".[\x00\x01][\x01-\x03\x09-\x0b].{13}[\x01\x08\x10\x18\x20][\x00-\x3f]",
           "PIL.TgaImagePlugin:TgaImageFile"),
)  # fmt: skip
# Of TIFF: whether a page is only a smaller copy of another, and where there are more pages.
_SUBFILE_TYPE, _SUB_IFDS = 254, 330
_XML = (b"<svg", b"<?xml", b"<!--", b"<!doctype svg")


def find_format(content: bytes, name: str) -> Format:
    """Find the format of an image by its first bytes, not by its name.

    Raises:
        ImageError: no format that is read begins so; `name` is for the message.
    """
    for known in _FORMATS:
        if re.match(known.begins, content, re.DOTALL):
            return known
    head = content[:4096].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith(_XML) and re.search(rb"<(?:!doctype\s+)?svg[\s>]", head):
        raise ImageError(f"{name} is a drawing in SVG, which is not read here. Export it as PNG.")
    raise ImageError(
        f"{name} is not a picture that can be read here; it begins with {content[:12]!r}. "
        "Convert it to JPEG or PNG."
    )


def image_within(image: ImageFile, name: str) -> Image:
    """The image itself, not yet decoded: that of an icon is a file within the file.

    Raises:
        ImageError: it holds only a preview of the image.
    """
    if image.format == "ICO":
        return image.ico.getimage(image.size)  # type: ignore[attr-defined,no-any-return]
    if image.format == "ICNS":
        return image.icns.getimage()  # type: ignore[attr-defined,no-any-return]
    tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
    if tags.get(_SUBFILE_TYPE) == 1 and _SUB_IFDS in tags:
        raise ImageError(
            f"{name} is a camera's raw file, of which only a small preview can be read here. "
            "Export it as JPEG."
        )
    return image
