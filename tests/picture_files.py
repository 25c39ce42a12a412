"""Small picture files of every format and mode, as tests use them."""

import io
import struct
import zlib

import numpy
import pillow_heif
from PIL import ExifTags, Image

DEEP_MODES = {"I", "F", "I;16", "I;16B"}


def save(image, file_format, **options):
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def drawing(mode, size=(13, 9)):
    """A picture in any of Pillow's modes, with another level at every pixel."""
    width, height = size
    random = numpy.random.default_rng(width * height)
    noise = Image.fromarray(random.integers(0, 256, (height, width, 4), dtype=numpy.uint8))
    if mode in DEEP_MODES:
        deep = Image.new(mode, size)
        for i in range(width * height):
            level = i / (width * height) if mode == "F" else i * 560
            deep.putpixel((i % width, i // width), level)
        return deep
    if mode == "RGBa":
        return noise.convert("RGBA").convert("RGBa")
    return noise.convert("RGB").convert(mode) if mode in {"LAB", "P", "PA"} else noise.convert(mode)


def exif_of(orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    exif[ExifTags.Base.Make] = "a maker of cameras"
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal] = "2023:04:20 10:00:00"
    return exif


def saved_drawings():
    """One small file of every format in every mode that the format can hold, by name."""
    modes = ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16", "F", "CMYK", "YCbCr", "LAB")
    held = {
        "JPEG": {"1", "L", "RGB", "CMYK", "YCbCr"},
        "PNG": {"1", "L", "LA", "P", "RGB", "RGBA", "I;16"},
        "WEBP": {"L", "LA", "P", "RGB", "RGBA", "I", "CMYK"},
        "BMP": {"1", "L", "P", "RGB", "RGBA"},
        "TIFF": set(modes) - {"YCbCr"},  # Old Pillow cannot read what it wrote.
        "GIF": {"1", "L", "LA", "P", "RGB", "RGBA"},
    }
    files = {
        f"{file_format} {mode}": save(drawing(mode), file_format)
        for file_format, held_modes in held.items()
        for mode in modes
        if mode in held_modes
    }
    rgb, palette, grey = drawing("RGB"), drawing("P"), drawing("L")
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        files[f"TIFF {compression}"] = save(rgb, "TIFF", compression=compression, exif=exif_of(6))
    pages = {"save_all": True, "append_images": [rgb.rotate(180)]}
    # Those that people have besides, each in what it holds.
    icon = drawing("RGBA", (32, 32))
    files |= {
        "AVIF RGB": save(rgb, "AVIF", exif=exif_of(6)),
        "AVIF RGBA": save(drawing("RGBA"), "AVIF"),
        "HEIC RGB": heic(drawing("RGB", (64, 48))),
        "JPEG2000 RGB": save(rgb, "JPEG2000"),
        "JPEG2000 RGBA": save(drawing("RGBA"), "JPEG2000"),
        "JPEG2000 L": save(grey, "JPEG2000"),
        "JPEG2000 I;16": save(drawing("I;16"), "JPEG2000"),
        "JPEG2000 codestream": save(rgb, "JPEG2000", no_jp2=True),
        "PPM 1": save(drawing("1"), "PPM"),
        "PPM L": save(grey, "PPM"),
        "PPM RGB": save(rgb, "PPM"),
        "PPM 16 bits": b"P5 2 1 65535\n" + struct.pack(">2H", 257, 65_535),
        "PPM plain": b"P3 2 1 255\n1 2 3\n4 5 6\n",
        "PPM F": save(drawing("F"), "PPM"),
        "ICO PNG": save(icon, "ICO"),
        "ICO BMP": save(icon, "ICO", bitmap_format="bmp", sizes=[(32, 32), (16, 16)]),
        "ICNS": save(drawing("RGBA", (128, 128)), "ICNS"),
        "TGA RGB": save(rgb, "TGA"),
        "TGA L": save(grey, "TGA"),
        "TGA P": save(palette, "TGA"),
        "TGA RGBA packed": save(drawing("RGBA"), "TGA", compression="tga_rle"),
        "PSD RGB": psd(rgb),
        "PSD CMYK": psd(drawing("CMYK"), mode=4),
    }
    return files | {
        "TIFF group4": save(drawing("1"), "TIFF", compression="group4"),
        "TIFF big": save(rgb, "TIFF", big_tiff=True),
        "TIFF pages": save(rgb, "TIFF", **pages),
        "PNG transparent bytes": save(palette, "PNG", transparency=bytes(range(200))),
        "PNG transparent index": save(palette, "PNG", transparency=3),
        "PNG transparent grey": save(grey, "PNG", transparency=77),
        "PNG transparent RGB": save(rgb, "PNG", transparency=(1, 2, 3)),
        "PNG animated": save(rgb, "PNG", **pages),
        "WEBP lossless": save(drawing("RGBA"), "WEBP", lossless=True, exif=exif_of(6)),
        "WEBP animated": save(rgb, "WEBP", **pages),
        "GIF transparent": save(palette, "GIF", transparency=3),
        "GIF animated": save(palette, "GIF", **pages),
        "JPEG progressive": save(rgb, "JPEG", progressive=True, exif=exif_of(6)),
        "JPEG of a phone": save(rgb, "MPO", **pages),
    }


def psd(image, mode=3):
    """A Photoshop file of one layer, uncompressed."""
    bands = image.split()
    head = struct.pack(">4sH6xHLLHH", b"8BPS", 1, len(bands), *image.size[::-1], 8, mode)
    return head + bytes(12) + bytes(2) + b"".join(band.tobytes() for band in bands)


def heic(image, **options):
    """A picture as a phone stores it."""
    file = io.BytesIO()
    pillow_heif.from_pillow(image).save(file, format="HEIF", quality=-1, chroma=444, **options)
    return file.getvalue()


FILES = saved_drawings()


def tiff(width, height, *, entries=()):
    """An uncompressed greyscale TIFF of zeros, with more entries: tag, type, count, value."""
    plain = ((256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1))
    plain += ((262, 3, 1, 1), (273, 4, 1, 1000), (278, 4, 1, height), (279, 4, 1, width * height))
    directory = b"".join(struct.pack("<HHLL", *entry) for entry in sorted(plain + tuple(entries)))
    head = b"II*\0" + struct.pack("<LH", 8, len(plain) + len(entries)) + directory + bytes(4)
    return head.ljust(1000, b"\0") + bytes(width * height)


def png_with(chunk, content):
    """FILES["PNG RGB"] with one more chunk after its header."""
    crc = struct.pack(">L", zlib.crc32(chunk + content))
    whole = struct.pack(">L", len(content)) + chunk + content + crc
    return FILES["PNG RGB"][:33] + whole + FILES["PNG RGB"][33:]


# Files that Pillow reads with a warning, by what it says.
ODD_FILES = {
    "larger than file|Expecting to|Truncated": tiff(4, 3, entries=[(305, 2, 10**6, 900)]),
    "too many entries": tiff(4, 3, entries=[(266, 3, 2, 1 | 1 << 16)]),
    "Invalid APNG": png_with(b"acTL", bytes(8)),
    "Palette images": FILES["PNG transparent bytes"],
}
