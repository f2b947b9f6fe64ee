"""How many frames or pages a file has, without decoding them."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

MAX_BLOCKS = 300_000
"""Of a GIF that are looked at, 75 MB of a usual one: a hostile one has a block per byte."""
MAX_PAGES = 10_000


def say_first_frame(opened: PILImage, file: Any) -> str | None:
    """Say that only the first frame is used, if there are more.

    The second picture in an MPO is a preview, or the other eye's view: nothing is said about it.

    Args:
        opened: What was made from the file.
        file: Seekable; its place is not kept.
    """
    match opened.format:
        case "GIF":
            count = gif_frames(_whole(file))
        case "TIFF":
            count = tiff_pages(file)
            return f"has {count} pages: the first one is used" if count > 1 else None
        case "HEIF":
            count = getattr(opened, "n_frames", 1)
            return f"has {count} pictures: the main one is used" if count > 1 else None
        case "PNG" | "WEBP" | "AVIF":
            count = getattr(opened, "n_frames", 1)
        case _:
            return None
    return f"has {count} frames: the first one is used" if count > 1 else None


def gif_frames(data: bytes) -> int:
    """Count the frames of a GIF; up to where it is damaged, or to `MAX_BLOCKS`."""
    frames, blocks = 0, 0
    try:
        place = 13 + _colors(data[10])
        while blocks < MAX_BLOCKS:
            match data[place]:
                case 0x2C:  # a frame: its size and colours, then the first byte of its pixels
                    frames += 1
                    place += 11 + _colors(data[place + 9])
                case 0x21:  # an extension
                    place += 2
                case _:
                    break
            while size := data[place]:
                place, blocks = place + size + 1, blocks + 1
            place += 1
    except IndexError:
        pass  # cut off
    return frames


def _colors(flags: int) -> int:
    return 3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0


def tiff_pages(file: Any) -> int:
    """Count the pages of a TIFF; up to where it is damaged, or to `MAX_PAGES`."""
    file.seek(0)
    head = file.read(16)
    order = "<" if head[:2] == b"II" else ">"
    big = head[2:4] in (b"\x2b\0", b"\0\x2b")
    count_format, entry, place_format = (f"{order}Q", 20, f"{order}Q") if big else (f"{order}H", 12, f"{order}I")
    seen = set[int]()
    try:
        (place,) = struct.unpack_from(place_format, head, 8 if big else 4)
        while place and place not in seen and len(seen) < MAX_PAGES:
            file.seek(place)
            (entries,) = struct.unpack(count_format, file.read(struct.calcsize(count_format)))
            seen.add(place)
            file.seek(place + struct.calcsize(count_format) + entries * entry)
            (place,) = struct.unpack(place_format, file.read(struct.calcsize(place_format)))
    except (struct.error, OverflowError, ValueError, OSError):
        pass  # cut off, or a place that no file has
    return len(seen)


def _whole(file: Any) -> bytes:
    file.seek(0)
    data: bytes = file.read()
    return data
