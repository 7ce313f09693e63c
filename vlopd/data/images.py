"""Decodes one image of a data set completely, upright, as 8-bit RGB; damaged or ambiguous files are refused."""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy
from PIL import Image, ImageOps, UnidentifiedImageError

from vlopd.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Supported formats: none that runs another program (EPS) or always holds several images (ICO)."""

MAX_PIXELS = 90_000_000
"""About 270 MB as RGB, and Pillow's own limit for a decompression bomb."""

MAX_ASPECT = 200
"""Longer side over shorter side: Qwen-VL's image processors refuse more."""

PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))  # fmt: skip
"""First column and row, and the steps between columns and rows, of the passes of an interlaced PNG."""


def open_header(value: Any, folder: Path) -> Image.Image:
    """As `open_picture`, but reads only the header: nothing is decoded, and the size is before EXIF rotation."""
    if isinstance(value, Image.Image):
        return value
    inside = value.get("bytes") or value.get("path") if isinstance(value, Mapping) else value
    try:
        where = BytesIO(inside) if isinstance(inside, bytes) else folder / str(inside)
        return Image.open(where, formats=FORMATS)
    except Exception:  # for its error message
        return open_picture(value, folder)


def open_picture(value: Any, folder: Path) -> Image.Image:
    """A file name (relative to `folder`), bytes, `datasets`' {"bytes", "path"}, or an open image -> RGB image.

    EXIF rotation is applied; transparency becomes white; CMYK is converted without colour management;
    16-bit grey is scaled to 8. The file is read to its end, so a damaged one fails here. Not detected: a JPEG that
    was truncated and closed with a valid end marker (the rest is grey).

    Raises DataError with reason and remedy; the caller adds the row.
    """
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
        if value is None:
            raise DataError('needs "bytes" or "path"; fill one of them in')
    if isinstance(value, Image.Image):
        return _as_rgb(ImageOps.exif_transpose(value))
    if not isinstance(value, (str, bytes)):
        raise DataError("is neither a file name nor bytes; name a file, or remove it")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS applies
        try:
            with _open_file(value, folder) if isinstance(value, str) else BytesIO(value) as stream:
                return _decode(stream)
        except DataError:
            raise
        except UnidentifiedImageError:
            raise DataError(
                f"is not an image of a supported format ({', '.join(FORMATS)}); convert it or remove the row"
            ) from None
        except Image.DecompressionBombError as error:
            raise DataError(f"{error}; the limit is {MAX_PIXELS}; make it smaller") from None
        except (
            Exception
        ) as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error ...
            raise DataError(
                f"is broken ({shorten(str(error) or type(error).__name__)}); save it again or remove the row"
            ) from None


def _open_file(name: str, folder: Path) -> BinaryIO:
    """Opens an image file. Raises DataError for a URL and for a missing or empty file."""
    if "://" in name or name.startswith("data:"):
        raise DataError("is a URL; download the picture and give its file name")
    path = folder / name
    if not path.is_file():  # also excludes pipes and devices, which may never end
        reason = "is not a file" if path.exists() else "does not exist"
        raise DataError(f"{reason} in {folder}; file names are relative to the data file's folder")
    if path.stat().st_size == 0:
        raise DataError("is an empty file; save it again or remove the row")
    return path.open("rb")


def _decode(stream: BinaryIO) -> Image.Image:
    """Reads, checks and converts one image. Raises DataError, and whatever Pillow's decoders raise."""
    image = Image.open(stream, formats=FORMATS)
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise DataError(
            f"has {width} x {height} pixels, more than {MAX_PIXELS} in all; make it smaller"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise DataError(
            f"is {width} x {height}, longer than {MAX_ASPECT} : 1, which image processors refuse; crop it"
        )
    _refuse_frames(image)
    image.load()
    if image.format == "PNG":
        _refuse_short_png(image, stream)
    return _as_rgb(ImageOps.exif_transpose(image))


def _refuse_frames(image: Image.Image) -> None:
    """Raises DataError for animations and files of several pages, where the intended frame is ambiguous.

    Of a camera's JPEG with an auxiliary second image (MPO), the first is used.
    """
    if image.format == "MPO":
        return
    try:
        image.seek(1)
    except EOFError:
        image.seek(0)
        return
    frames = image.n_frames  # type: ignore[attr-defined]  # every kind that can seek has it
    raise DataError(f"has {frames} frames or pages; save the one that you mean, or all as a list")


def _as_rgb(image: Image.Image) -> Image.Image:
    """Converts any mode of known scale to 8-bit RGB; transparency over white."""
    if image.mode in ("I", "F"):
        raise DataError(f"has 32-bit pixels (mode {image.mode}) of unknown scale; save it as 8-bit")
    if image.mode.startswith("I;16"):  # Pillow's own conversion would clip at 255
        grey = numpy.asarray(image).astype(numpy.float64) / 257
        image = Image.fromarray(grey.round().astype(numpy.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def _refuse_short_png(image: Image.Image, stream: BinaryIO) -> None:
    """Raises DataError for a loaded PNG with fewer pixel data than its header requires; Pillow leaves the rest black.

    The required size follows from the header (PNG specification, sections 7 to 9).
    """
    # counting takes as long as decoding, so it is done only where the end may be missing: the data end with
    # the last row or, interlaced, with the last odd row (counted from 0), which a single row does not have
    bottom = image.crop((0, max(image.height - 2, 0), *image.size))
    ends = [bottom.crop((0, y, image.width, y + 1)) for y in range(bottom.height)]
    if len(ends) == 2 and all(row.getbbox(alpha_only=False) for row in ends):
        return
    stream.seek(16)
    header = stream.read(17)
    width, height = int.from_bytes(header[:4]), int.from_bytes(header[4:8])
    bits = header[8] * PNG_CHANNELS[header[9]]
    wanted = 0
    for x, y, step_x, step_y in ADAM7 if header[12] else ((0, 0, 1, 1),):
        columns, rows = math.ceil((width - x) / step_x), math.ceil((height - y) / step_y)
        if columns > 0 and rows > 0:
            wanted += rows * (1 + math.ceil(columns * bits / 8))
    found, inflate = 0, zlib.decompressobj()
    while found < wanted and len(head := stream.read(8)) == 8:
        body = stream.read(int.from_bytes(head[:4]))
        stream.read(4)  # the checksum, which Pillow has verified
        if head[4:] == b"IDAT":
            found += len(inflate.decompress(body, wanted - found))
    if found < wanted:
        raise DataError(
            f"ends early: its header says {width} x {height} pixels, {wanted} bytes, and {found} are there; "
            "save it again or remove the row"
        )


def shorten(text: str, length: int = 120) -> str:
    """One line, cut at `length` characters."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 3] + "..."
