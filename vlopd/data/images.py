"""One picture of a data set, decoded whole, upright, as 8-bit RGB; what cannot be is refused, not repaired."""

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
"""What we read: no format that starts another program (EPS) or holds several pictures by nature (ICO)."""

MAX_PIXELS = 90_000_000
"""About 270 MB as RGB, and what Pillow itself takes for a decompression bomb."""

MAX_ASPECT = 200
"""Longer side over shorter side: Qwen-VL's image processors refuse more."""

PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))  # fmt: skip
"""First column and row, and the steps between columns and rows, of the passes of an interlaced PNG."""


def peek(value: Any, folder: Path) -> Image.Image:
    """As `open_picture`, but nothing is decoded: its size is before rotation. Raises DataError as that does."""
    inside = value.get("bytes") or value.get("path") if isinstance(value, Mapping) else value
    try:
        where = BytesIO(inside) if isinstance(inside, bytes) else folder / str(inside)
        return Image.open(where, formats=FORMATS)
    except Exception:  # the reason, in our words
        return open_picture(value, folder)


def open_picture(value: Any, folder: Path) -> Image.Image:
    """A file name (relative to `folder`), bytes, or `datasets`' {"bytes", "path"} -> RGB picture.

    EXIF rotation is applied; what is transparent becomes white; CMYK is converted without colour management;
    16-bit grey is scaled to 8. The file is read to its end here, so a broken one fails here. One fault cannot
    be seen: a JPEG that was cut short and closed with a proper end mark; its rest is grey.

    Raises DataError, with reason and remedy but without the row, which the caller adds.
    """
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
        if value is None:
            raise DataError('needs "bytes" or "path"; fill one of them in')
    if not isinstance(value, (str, bytes)):
        raise DataError("is neither a file name nor bytes; name a file, or remove it")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our limit is lower
        try:
            with open_file(value, folder) if isinstance(value, str) else BytesIO(value) as stream:
                return decode(stream)
        except DataError:
            raise
        except UnidentifiedImageError:
            raise DataError(
                f"is no picture of a kind we read ({', '.join(FORMATS)}); convert it or remove the row"
            ) from None
        except Image.DecompressionBombError as error:
            raise DataError(f"{error}; {MAX_PIXELS} is our limit; make it smaller") from None
        except (
            Exception
        ) as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error ...
            raise DataError(
                f"is broken ({shorten(str(error) or type(error).__name__)}); save it again or remove the row"
            ) from None


def open_file(name: str, folder: Path) -> BinaryIO:
    """Raises DataError for an address, and for what is not a file with something in it."""
    if "://" in name or name.startswith("data:"):
        raise DataError("is an address; download the picture and give its file name")
    path = folder / name
    if not path.is_file():  # this also keeps pipes and devices from being read for ever
        reason = "is not a file" if path.exists() else "does not exist"
        raise DataError(f"{reason} in {folder}; file names are relative to the data file's folder")
    if path.stat().st_size == 0:
        raise DataError("is an empty file; save it again or remove the row")
    return path.open("rb")


def decode(stream: BinaryIO) -> Image.Image:
    """Reads, checks and converts one picture. Raises DataError, and whatever Pillow's decoders raise."""
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
    refuse_frames(image)
    image.load()
    if image.format == "PNG":
        refuse_short_png(image, stream)
    return as_rgb(ImageOps.exif_transpose(image))


def refuse_frames(image: Image.Image) -> None:
    """Refuses animations and files of several pages: which frame is meant, only the user knows.

    A camera's JPEG with a second, auxiliary picture (MPO) is its first one.
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


def as_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB from any mode whose scale is known; transparency over white."""
    if image.mode in ("I", "F"):
        raise DataError(f"has 32-bit pixels (mode {image.mode}) of unknown scale; save it as 8-bit")
    if image.mode.startswith("I;16"):  # Pillow's own conversion would clip at 255
        grey = numpy.asarray(image).astype(numpy.float64) / 257
        image = Image.fromarray(grey.round().astype(numpy.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def refuse_short_png(image: Image.Image, stream: BinaryIO) -> None:
    """Refuses a loaded PNG whose pixel data end before its header says; Pillow leaves the rest black.

    The size of the data follows from the header (PNG specification, sections 7 to 9).
    """
    # the data are counted where they may be short only, for it takes as long as decoding: they end with
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
        stream.read(4)  # the checksum, which Pillow has looked at
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
