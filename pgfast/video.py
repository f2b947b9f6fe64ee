"""Frames of a short video, for PaliGemma's way with it: several pictures in front of one prompt."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pgfast.errors import ImageError, InputError, MissingDependencyError
from pgfast.image import MAX_PIXELS

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

SUFFIXES = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".mpg", ".mpeg", ".ts", ".3gp", ".ogv", ".flv", ".wmv")
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,ogg,flv,asf"
"""Containers that are read; playlists, which could name other files and addresses, are not among them."""
MAX_FRAMES = 20_000
"""A longer video than this many frames (five minutes at 60 a second) is refused: all up to the last wanted one are decoded."""


def is_video(path: Any) -> bool:
    """Say whether a path is named like a video."""
    return isinstance(path, str | os.PathLike) and Path(os.fspath(path)).suffix.lower() in SUFFIXES


def read_frames(path: str | os.PathLike[str], count: int) -> list[PILImage]:
    """Read frames at the middle of each of `count` equal parts of a video; all of its frames if it has fewer.

    Args:
        path: A video file that PyAV reads.
        count: How many frames.

    Returns:
        RGB pictures in order of time, upright.

    Raises:
        ImageError: The file is missing, no video, damaged, too long or too large.
        InputError: `count` is below 1.
        MissingDependencyError: PyAV is not installed.
    """
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise InputError(f"the number of frames is {count!r}: 1 or more are needed")
    try:
        import av
    except ImportError as error:
        raise MissingDependencyError("av", "video") from error
    what = os.fspath(path)
    try:
        with open(path, "rb") as file:
            total = _count_frames(av, file, what)
            wanted = sorted({(2 * part + 1) * total // (2 * count) for part in range(count)})
            file.seek(0)
            frames = _decode(av, file, wanted)
    except FileNotFoundError as error:
        raise ImageError(f"{what} does not exist") from error
    except IsADirectoryError as error:
        raise ImageError(f"{what} is a folder, not a video") from error
    except (ImageError, MissingDependencyError):
        raise
    except (av.FFmpegError, OSError, ValueError, EOFError) as error:
        raise ImageError(f"{what} cannot be read as a video: {' '.join(str(error).split())[:120]}") from error
    if not frames:
        raise ImageError(f"{what} is damaged: no frame of it can be decoded")
    return frames


def _open(av: Any, file: Any) -> Any:
    # nothing but the bytes of this file: no protocol, no playlist
    return av.open(file, "r", options={"format_whitelist": FORMATS, "protocol_whitelist": ""}, metadata_errors="replace")


def _count_frames(av: Any, file: Any, what: str) -> int:
    """Count the frames without decoding them: containers often say nothing, or something wrong."""
    with _open(av, file) as container:
        if not container.streams.video:
            raise ImageError(f"{what} has no video in it")
        stream = container.streams.video[0]
        if stream.width * stream.height > MAX_PIXELS:
            raise ImageError(f"{what} has {stream.width} x {stream.height} pixels: at most {MAX_PIXELS:,} are accepted")
        total = 0
        for packet in container.demux(stream):
            total += packet.size > 0
            if total > MAX_FRAMES:
                raise ImageError(f"{what} has more than {MAX_FRAMES:,} frames: cut it shorter")
        if not total:
            raise ImageError(f"{what} has no frames")
        return total


def _decode(av: Any, file: Any, wanted: list[int]) -> list[PILImage]:
    """Decode up to the last wanted frame; a damaged video ends with what could be decoded."""
    frames: list[PILImage] = []
    latest = None
    with _open(av, file) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        try:
            for number, frame in enumerate(container.decode(stream)):
                latest = frame
                if number == wanted[len(frames)]:
                    frames.append(_picture(frame))
                    latest = None
                    if len(frames) == len(wanted):
                        return frames
        except av.FFmpegError:
            if latest is None and not frames:
                raise
        if latest is not None:  # fewer frames than packets: the last one stands for those that are missing
            frames.append(_picture(latest))
    return frames


def _picture(frame: Any) -> PILImage:
    if frame.width * frame.height > MAX_PIXELS:
        raise ImageError(f"a frame has {frame.width} x {frame.height} pixels: at most {MAX_PIXELS:,} are accepted")
    picture: PILImage = frame.to_image()
    turn = round(getattr(frame, "rotation", 0) or 0) % 360  # degrees anticlockwise, as phones note it
    return picture.rotate(turn, expand=True) if turn else picture
