"""Files of pictures, opened within limits: which formats, how large, and in plain words what is wrong with the others."""

from __future__ import annotations

import io
import logging
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pgfast.errors import ImageError
from pgfast.image_frames import say_first_frame

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

logger = logging.getLogger(__name__)

MAX_PIXELS = 80_000_000
"""Larger pictures are refused before they are decoded; under Pillow's own limit of 89 million."""
MAX_SIDE = 65_535
"""Pixels of a side, as in a JPEG. Pillow resizes the width first: 1 x 80,000,000 pixels would become 224 x 80,000,000."""
MAX_FILE = 2**30
"""Bytes of a file; the largest picture has no more, not even uncompressed with 16 bits."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
"""Formats that decode in-process; Pillow would hand some others (EPS) to an external program. HEIF has its own library."""
NAMES = "JPEG, PNG, WebP, GIF, BMP, TIFF, PPM, AVIF, HEIC, JPEG 2000"
MAX_SCANS = 100
"""Of a progressive JPEG, which has about ten. Each costs a pass over the whole picture and perhaps less than 100 bytes;
libtiff has the same limit."""
MAX_TILE = 4096 * 4096
"""Pixels of a TIFF's tile, if the picture itself is smaller: a whole tile is unpacked for one pixel of it."""
TILE_WIDTH, TILE_LENGTH = 322, 323

_QUIET = threading.Lock()
_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])", re.DOTALL)
"""The next marker with a length in JPEG's data; elsewhere 0xFF stands only before zeros and markers that have none."""
_HEAD = 512
_HEVC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs")
_OTHERS = (
    (re.compile(rb"(?i)\s*<(!doctype html|html|head|body)"), "a web page (HTML)"),
    (re.compile(rb"(?is)\s*(<\?xml.*|<!--.*)?<svg"), "an SVG drawing: save it as PNG"),
    (re.compile(rb"%PDF-"), "a PDF: save the page as PNG"),
    (re.compile(rb"%!PS|\xc5\xd0\xd3\xc6"), "PostScript: save it as PNG"),
    (re.compile(rb"PK\x03\x04|\x1f\x8b|7z\xbc\xaf|Rar!"), "an archive: unpack it first"),
    (re.compile(rb"....ftyp(isom|iso[2-6]|mp4|M4V|qt  |avc1|3gp)|\x1aE\xdf\xa3|RIFF....AVI ", re.DOTALL), "a video"),
)
"""What is taken for a picture by mistake, by how it begins."""


@contextmanager
def quiet() -> Iterator[list[warnings.WarningMessage]]:
    """Keep Pillow's warnings to ourselves; one thread at a time, for the filters are global."""
    with _QUIET, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


def open_header(file: Any) -> PILImage:
    """Let Pillow, or its plugin for HEIC, read the header; raises what they raise.

    Raises:
        ImageError: It is HEIC, and the plugin is not installed.
    """
    from PIL import Image

    head = file.read(_HEAD)
    file.seek(0)
    if not _is_heif(head):
        return Image.open(file, formats=FORMATS)
    try:
        from pillow_heif import HeifImageFile
    except ImportError as error:
        raise ImageError("it is a HEIC picture, which needs one more library: pip install pillow-heif") from error
    reader: Any = HeifImageFile  # partly untyped
    heif: PILImage = reader(file)
    return heif


def bounded(file: Any, what: str) -> Any:
    """Return what Pillow can go back and forth in: the file, or what comes out of a pipe.

    Raises:
        ImageError: It is empty, or larger than any picture.
    """
    if not file.seekable():
        file = io.BytesIO(file.read(MAX_FILE + 1))
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    if size > MAX_FILE:
        raise ImageError(f"{what} has more than {MAX_FILE:,} bytes: no picture is that large")
    if not size:
        raise ImageError(f"{what} is empty (0 bytes), not a picture")
    return file


def open_file(file: Any, what: str, most: int) -> PILImage:
    """Open a picture's file; nothing is decoded yet.

    Args:
        file: From `bounded`; stays open as long as the picture is not loaded.
        what: How messages name it.
        most: Pixels.

    Raises:
        ImageError: It is no picture in a known format, or too large.
    """
    from PIL import Image, UnidentifiedImageError

    caught: list[warnings.WarningMessage] = []
    try:
        with quiet() as caught:
            opened = open_header(file)
            _read_tags(opened)
    except Image.DecompressionBombError as error:
        raise ImageError(f"{what} is a decompression bomb: at most {most:,} pixels are accepted") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{what} {_what_it_is(file, caught)}") from error
    except ImageError as error:
        raise ImageError(f"{what} cannot be opened: {error}") from error
    except Exception as error:  # Pillow's readers raise whatever a broken file makes them raise
        raise ImageError(f"{what} cannot be opened: {reason(error)}") from error
    check_size(opened.width, opened.height, what, most)
    _check_tiles(opened, what)
    if opened.format in ("JPEG", "MPO") and opened.info.get("progressive"):
        file.seek(0)
        if _scans(file.read()) > MAX_SCANS:
            raise ImageError(f"{what} has more than {MAX_SCANS} scans: save it again as a usual JPEG")
    return opened


def check_size(width: int, height: int, what: str, most: int) -> None:
    """Refuse what has too many pixels, or is too long.

    Raises:
        ImageError: It is larger than `most`, or a side is longer than `MAX_SIDE`.
    """
    if width * height > most:
        raise ImageError(f"{what} has {width} x {height} pixels: at most {most:,} are accepted")
    if max(width, height) > MAX_SIDE:
        raise ImageError(f"{what} has {width} x {height} pixels: a side has at most {MAX_SIDE:,}")


def _check_tiles(image: PILImage, what: str) -> None:
    tags = getattr(image, "tag_v2", {})
    width, height = tags.get(TILE_WIDTH), tags.get(TILE_LENGTH)
    if isinstance(width, int) and isinstance(height, int) and width * height > max(MAX_TILE, image.width * image.height):
        raise ImageError(f"{what} has tiles of {width} x {height} pixels, larger than itself: save it again with smaller ones")


def say_frames(opened: PILImage, file: Any, what: str) -> None:
    """Log one line if a file holds more than the frame that is used."""
    if line := say_first_frame(opened, file):
        logger.warning("%s %s", what, line)


def reason(error: BaseException) -> str:
    """What an error says, as one short line."""
    return " ".join(str(error).split())[:120] or type(error).__name__


def _read_tags(opened: PILImage) -> None:
    """Read now what Pillow would read with the pixels, while nobody keeps its warnings."""
    if png := getattr(opened, "png", None):
        png.chunk_acTL = _pass_over  # behind the pixels it means nothing any more
    if opened.format == "TIFF":
        from PIL import TiffTags

        exif = opened.getexif()
        for group in TiffTags.TAGS_V2_GROUPS:
            if group in exif:
                exif.get_ifd(group)


def _pass_over(position: int, length: int) -> bytes:
    raise AttributeError  # so Pillow knows that a kind of chunk is unknown


def _is_heif(head: bytes) -> bool:
    if head[4:8] != b"ftyp":
        return False
    end = min(int.from_bytes(head[:4]), len(head))
    brands = {head[8:12], *(head[i : i + 4] for i in range(16, end - 3, 4))}
    return not brands.isdisjoint(_HEVC) and head[8:12] not in (b"avif", b"avis")


def _what_it_is(file: Any, caught: list[warnings.WarningMessage]) -> str:
    file.seek(0)
    head: bytes = file.read(_HEAD)
    for pattern, kind in _OTHERS:
        if pattern.match(head):
            return f"is not a picture but {kind}"
    if caught:  # "image file could not be identified because AVIF support not installed"
        return f"cannot be read by this Pillow: {reason(caught[-1].message)}"  # type: ignore[arg-type]
    if _is_text(head):
        return "is not a picture but text"
    return f"is not a picture in a known format ({NAMES})"


def _is_text(head: bytes) -> bool:
    try:
        text = head.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # not merely a character cut in two
            return False
        text = head[: error.start].decode("utf-8-sig")
    return all(char.isprintable() or char.isspace() for char in text)


def _scans(jpeg: bytes) -> int:
    """Count a JPEG's scans, up to one more than are accepted."""
    count, place = 0, 2
    while count <= MAX_SCANS and (match := _MARKER.search(jpeg, place)) and match[1] != b"\xd9":
        count += match[1] == b"\xda"
        place = match.end() + int.from_bytes(jpeg[match.end() : match.end() + 2])
    return count
