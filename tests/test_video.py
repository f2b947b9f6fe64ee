"""Frames of short videos that the test itself writes."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pgfast.errors import ImageError, InputError, MissingDependencyError
from pgfast.video import read_frames

av = pytest.importorskip("av")


def write_video(path: Path, frames: int, *, size: tuple[int, int] = (64, 48), codec: str = "mpeg4") -> Path:
    """Frame i is gray of value 6 * i."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(10))
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for number in range(frames):
            gray = np.full((size[1], size[0], 3), 6 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(gray, format="rgb24")))
        container.mux(stream.encode())
    return path


def numbers(frames: list[Any]) -> list[int]:
    return [round(float(np.asarray(frame).mean()) / 6) for frame in frames]


@pytest.mark.parametrize(("name", "codec"), [("clip.mp4", "mpeg4"), ("clip.mkv", "ffv1"), ("clip.avi", "mjpeg")])
def test_frames_are_the_middles_of_equal_parts(tmp_path: Path, name: str, codec: str) -> None:
    path = write_video(tmp_path / name, 40, codec=codec) if codec != "mjpeg" else write_video(tmp_path / name, 40)
    frames = read_frames(path, 8)
    expected = [int((part + 0.5) * 40 / 8) for part in range(8)]
    assert np.abs(np.array(numbers(frames)) - expected).max() <= 1  # lossy codecs
    assert {frame.size for frame in frames} == {(64, 48)}
    assert {frame.mode for frame in frames} == {"RGB"}


def test_a_video_of_fewer_frames_gives_all(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mkv", 3, codec="ffv1")
    assert numbers(read_frames(path, 8)) == [0, 1, 2]
    assert numbers(read_frames(path, 1)) == [1]


def test_a_video_that_ends_early_gives_what_is_there(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "clip.mkv", 40, codec="ffv1").read_bytes()
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole[: len(whole) // 2])
    found = numbers(read_frames(cut, 4))
    assert 1 <= len(found) <= 4
    assert found == sorted(set(found))
    assert max(found) < 30


def _playlist(folder: Path, clip: Path) -> bytes:
    return f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n{clip}\n#EXT-X-ENDLIST\n".encode()


@pytest.mark.parametrize(
    "content",
    [
        lambda folder, clip: b"",
        lambda folder, clip: b"no video at all" * 100,
        lambda folder, clip: clip.read_bytes()[:200],
        _playlist,
        lambda folder, clip: f"ffconcat version 1.0\nfile {clip}\n".encode(),
    ],
    ids=["empty", "text", "cut", "playlist", "concat"],
)
def test_what_is_no_video_is_refused_in_one_line(tmp_path: Path, content: Callable[[Path, Path], bytes]) -> None:
    """A playlist names another file, which must not be opened."""
    clip = write_video(tmp_path / "clip.mp4", 4)
    path = tmp_path / "bad.mp4"
    path.write_bytes(content(tmp_path, clip))
    with pytest.raises(ImageError, match=r"bad\.mp4") as caught:
        read_frames(path, 2)
    assert "\n" not in str(caught.value)


def test_paths_and_numbers_that_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImageError, match="does not exist"):
        read_frames(tmp_path / "gone.mp4", 2)
    with pytest.raises(ImageError, match="is a folder"):
        read_frames(tmp_path, 2)
    with pytest.raises(InputError, match="number of frames is 0"):
        read_frames(tmp_path / "gone.mp4", 0)
    clip = write_video(tmp_path / "clip.mp4", 6)
    monkeypatch.setattr("pgfast.video.MAX_FRAMES", 5)
    with pytest.raises(ImageError, match="more than 5 frames"):
        read_frames(clip, 2)
    monkeypatch.setattr("pgfast.video.MAX_PIXELS", 1000)
    with pytest.raises(ImageError, match="64 x 48 pixels"):
        read_frames(clip, 2)
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(MissingDependencyError, match=r"pgfast\[video\]"):
        read_frames(clip, 2)


def test_a_picture_taken_sideways_is_turned(tmp_path: Path) -> None:
    """Phones write a rotation beside the pixels."""

    class Turned:
        width, height, rotation = 4, 2, -90

        def to_image(self) -> Any:
            from PIL import Image

            return Image.fromarray(np.arange(24, dtype=np.uint8).reshape(2, 4, 3))

    from pgfast.video import _picture

    turned = np.asarray(_picture(Turned()))
    assert turned.shape == (4, 2, 3)
    assert (turned == np.rot90(np.arange(24, dtype=np.uint8).reshape(2, 4, 3), -1)).all()
