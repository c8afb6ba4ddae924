"""The one reader of images that rows name: by path, or by the bytes in the row.

`formats` makes an `ImageRef` of what a row says; `examine` looks at the whole file while the data is prepared, so that
nothing is found out at step 3,000; `read` decodes it for a step. Pillow does the decoding, nothing is fetched from the net,
and no pickle is involved. Pixels come out as RGB, turned as the camera says (EXIF), transparent parts on white.
"""

import base64
import binascii
import functools
import io
import os
import re
import struct
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastft import regular_file
from fastft.data.dialogue import ImageRef, Where
from fastft.errors import DataError, FileError

# Bytes of an image file; larger ones are refused before they are read.
MAX_FILE_BYTES = 1 << 30
# What files that are no images start with, and what to say of them.
OTHER_KINDS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a pointer of git LFS, not the image; run `git lfs pull` where it was cloned"),
    (b"%PDF", "a PDF; save its pages as images"),
    (b"<!DOCTYPE", "a web page, perhaps the error page of a download; fetch the image again"),
    (b"<html", "a web page, perhaps the error page of a download; fetch the image again"),
    (b"<svg", "an SVG drawing; save it as PNG"),
    (b"<?xml", "an XML file (an SVG drawing?); save it as PNG"),
    (b"PK\x03\x04", "a zip archive; unpack it"),
    (b"\x1f\x8b", "a gzip archive; unpack it"),
    (b"\x80\x04", "a pickle; save the images as files"),
)
# What image files start with; one that cannot be read is broken, and not something else.
IMAGE_STARTS = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")
# EXIF's number of the way the camera was held, what puts the picture upright, and which of them swap its sides.
ORIENTATION = 0x0112
TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
LYING = frozenset({5, 6, 7, 8})
DATA_URI = re.compile(r"data:(?P<kind>[\w/+.-]*)(?P<more>(;[\w=.-]+)*),", re.IGNORECASE)
# Formats that Pillow reads by itself and without helpers (ghostscript for EPS, for one, would run a program).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF", "MPO", "ICO", "TGA", "DIB")


_LIMIT = threading.Lock()


class BadImageError(DataError):
    """An image cannot be used; the message is the reason with the file's name, without the row."""


@dataclass(frozen=True, slots=True)
class Folder:
    """Where relative paths of a source start.

    Attributes:
        path: the folder.
        configured: whether the config names it (`images`); then absolute paths may not leave it either.
    """

    path: Path
    configured: bool


def reference(value: Any, folder: Folder, where: Where) -> ImageRef:
    """What a row says of an image, as a reference.

    Args:
        value: a path, a data URI, bytes, or a mapping with one of `url`, `path`, `bytes`, `image_url`, `image`.
        folder: where relative paths start.
        where: the row.

    Raises:
        BadImageError: a URL of the net, a path that leaves the folder, or something that names no image.
    """
    if isinstance(value, Mapping):
        return _of_mapping(value, folder, where)
    if isinstance(value, bytes):
        return ImageRef(None, value, "image in the row")
    if not isinstance(value, str) or not value.strip():
        raise BadImageError(
            f"an image is {type(value).__name__ if not isinstance(value, str) else 'empty text'}, not a path"
        )
    text = value.strip()
    if text[:5].lower() == "data:":
        return ImageRef(None, _of_uri(text), "data URI")
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", text)
    if scheme is not None and scheme[1].lower() != "file":
        raise BadImageError(
            f"image {shown(text)}: nothing is fetched from the net; download it and put the file's path into the row"
        )
    return _of_path(text.removeprefix("file://") if scheme is not None else text, folder)


def _of_mapping(value: Mapping[str, Any], folder: Folder, where: Where) -> ImageRef:
    if value.get("bytes") is not None:
        content = value["bytes"]
        if not isinstance(content, bytes):
            raise BadImageError(f"an image's bytes are {type(content).__name__}, not bytes")
        name = value.get("path")
        return ImageRef(None, content, str(name) if isinstance(name, str) and name else "image in the row")
    for name in ("url", "path", "image_url", "image"):
        if value.get(name) is not None:
            return reference(value[name], folder, where)
    raise BadImageError(f"an image with neither path, url nor bytes (it has {', '.join(map(str, value)) or 'nothing'})")


def _of_uri(text: str) -> bytes:
    head = DATA_URI.match(text)
    if head is None or ";base64" not in head["more"].lower():
        raise BadImageError(f"image {shown(text)}: a data URI without base64; write data:image/png;base64,...")
    try:
        return base64.b64decode(text[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadImageError(f"image {shown(text)}: broken base64 ({error})") from error


def _of_path(text: str, folder: Folder) -> ImageRef:
    if "\0" in text:
        raise BadImageError(f"image {shown(text)}: a path with a zero byte")
    # Compared as text: data sets on a disk and the hub's cache are full of links, which the user has put there.
    base = os.path.abspath(folder.path)  # noqa: PTH100 - resolve() would follow links
    full = os.path.normpath(os.path.join(base, text))  # noqa: PTH118
    inside = full == base or full.startswith(base.rstrip(os.sep) + os.sep)
    if not inside and (folder.configured or not os.path.isabs(text)):  # noqa: PTH117
        hint = "" if folder.configured else "; set `images` of the source to the folder that holds all of them"
        raise BadImageError(f"image {shown(text)}: the path leaves the image folder {folder.path}{hint}")
    return ImageRef(full, None, text)


def examine(ref: ImageRef, max_pixels: int) -> tuple[int, int]:
    """Width and height, in pixels, of the image as `read` gives it; the whole file is decoded once.

    Raises:
        BadImageError: it is missing, no image, broken, cut off, or too large.
    """
    with _opened(ref, max_pixels) as image:
        width, height = image.size
        # A JPEG is decoded at an eighth of its size: every byte is looked at, in a fraction of the time.
        if image.format == "JPEG":
            image.draft("RGB", (1, 1))
        _load(image, ref)
        return (height, width) if _orientation(image) in LYING else (width, height)


def read(ref: ImageRef, max_pixels: int) -> Any:
    """The image as Pillow's RGB image, [height, width, 3] of 8 bits.

    Raises:
        BadImageError: it is missing, no image, broken, cut off, or too large.
    """
    from PIL import Image

    with _opened(ref, max_pixels) as image:
        _load(image, ref)
        turn = TURNS.get(_orientation(image))
        return _rgb(image if turn is None else image.transpose(Image.Transpose[turn]))


def shown(text: str) -> str:
    """A path or URI for an error line: control characters escaped, the middle of a long one left out."""
    plain = text.encode("unicode_escape").decode("ascii") if not text.isprintable() else text
    return plain if len(plain) <= 120 else f"{plain[:80]}...{plain[-20:]}"


def _opened(ref: ImageRef, max_pixels: int) -> Any:
    from PIL import Image, UnidentifiedImageError

    name = shown(ref.name)
    stream = _stream(ref)
    try:
        with _limited(max_pixels):
            image = Image.open(stream, formats=_known())
    except UnidentifiedImageError as error:
        stream.seek(0)
        raise BadImageError(f"image {name}: {_what_it_is(stream.read(64))}") from error
    except Image.DecompressionBombError as error:
        raise BadImageError(
            f"image {name}: it has more than twice the pixels of vision.max_image_pixels ({max_pixels:,}); scale it down, "
            "or raise the limit"
        ) from error
    except (OSError, ValueError, SyntaxError, OverflowError, MemoryError) as error:
        raise BadImageError(f"image {name}: its header is broken ({error})") from error
    width, height = image.size
    if width * height > max_pixels:
        raise BadImageError(
            f"image {name}: {width} x {height} pixels are more than vision.max_image_pixels ({max_pixels:,}); scale it "
            "down, or raise the limit"
        )
    return image


@functools.cache
def _known() -> tuple[str, ...]:
    """The formats that this build of Pillow has."""
    from PIL import Image

    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@contextmanager
def _limited(max_pixels: int) -> Iterator[None]:
    """Let the config's limit be Pillow's, which warns from there on and refuses twice as much."""
    from PIL import Image

    with _LIMIT:  # Pillow's limit and the filters of warnings belong to all threads
        own = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = max_pixels
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                yield
        finally:
            Image.MAX_IMAGE_PIXELS = own


def _stream(ref: ImageRef) -> io.BytesIO:
    if ref.content is not None:
        return io.BytesIO(ref.content)
    assert ref.path is not None
    name = shown(ref.name)
    try:
        opened = regular_file.opened(ref.path)
    except FileError as error:
        kind = "a folder" if Path(ref.path).is_dir() else "no regular file"
        raise BadImageError(f"image {name}: {kind}") from error
    except FileNotFoundError as error:
        raise BadImageError(f"image {name}: no such file ({shown(ref.path)})") from error
    except OSError as error:
        raise BadImageError(f"image {name}: cannot be read ({error.strerror or error})") from error
    with opened as file:
        num_bytes = os.fstat(file.fileno()).st_size
        if num_bytes > MAX_FILE_BYTES:
            raise BadImageError(f"image {name}: a file of {num_bytes:,} bytes is too large for an image")
        if not num_bytes:
            raise BadImageError(f"image {name}: the file is empty")
        return io.BytesIO(file.read())


def _what_it_is(head: bytes) -> str:
    if head.startswith(IMAGE_STARTS):
        return "broken: it starts as an image, and what follows is none"
    start = head.lstrip()
    for mark, said in OTHER_KINDS:
        if start[: len(mark)].lower() == mark.lower():
            return said
    return "no image that can be read (JPEG, PNG, WebP, BMP, GIF, TIFF and a few more can)"


def _orientation(image: Any) -> int:
    """How the camera was held, 1 to 8 (EXIF); a broken EXIF block says nothing, and spoils no picture."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except (OSError, ValueError, SyntaxError, TypeError, KeyError, struct.error):
        return 1


def _load(image: Any, ref: ImageRef) -> None:
    try:
        image.load()
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError, IndexError) as error:
        raise BadImageError(f"image {shown(ref.name)}: broken or cut off ({error})") from error


def _rgb(image: Any) -> Any:
    """Eight bits of red, green and blue; what is transparent shows white."""
    from PIL import Image

    if image.mode in {"I;16", "I;16L", "I;16B", "I", "F"}:
        image = _eight_bits(image)
    if image.mode in {"RGBA", "LA", "PA", "RGBa", "La"} or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Any) -> Any:
    """Grey of 16 or 32 bits to 8: Pillow's own conversion clips at 255 instead of scaling."""
    import numpy as np
    from PIL import Image

    grey = np.nan_to_num(np.asarray(image, dtype=np.float64))
    top = 65535.0 if grey.max(initial=0.0) > 255.0 else 255.0
    return Image.fromarray(np.clip(grey * (255.0 / top), 0, 255).astype(np.uint8))
