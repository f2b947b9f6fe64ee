"""Memory, threads, warnings and pipes around the opening of pictures."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from picture_files import chunk, png, saved, scene, seeds, tiled_tiff
from PIL import Image

from pgfast.errors import ImageError
from pgfast.image import open_image

TROUBLE = {
    "exif": saved(Image.fromarray(scene()), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x03\0\xff\xff"),
    "apng": png(scene(), 8, 2, before=chunk(b"acTL", b"\0" * 8), behind=chunk(b"acTL", b"\0" * 8)),
    "large": saved(Image.new("1", (9500, 9500)), "PNG"),
}
"""Pictures about which Pillow warns."""


@pytest.mark.parametrize("name", TROUBLE)
def test_pillow_warns_about_these(name: str) -> None:
    """If it no longer does, the next test proves nothing."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Image.open(io.BytesIO(TROUBLE[name])) as image:
            if name != "large":
                image.load()
            image.getexif()
    assert caught


def test_no_warning_escapes_from_any_thread() -> None:
    opened, kept = threading.Barrier(8), dict(zip(TROUBLE, [False] * len(TROUBLE), strict=True))

    def work(number: int) -> None:
        opened.wait()
        for turn in range(20):
            name = list(TROUBLE)[(number + turn) % len(TROUBLE)]
            try:
                open_image(TROUBLE[name])
            except ImageError:
                kept[name] = True

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        filters = list(warnings.filters)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
        assert warnings.filters == filters  # as they were
    assert [str(warning.message) for warning in caught] == []
    assert kept["large"]


def test_threads_get_their_own_pictures() -> None:
    files = seeds()
    alone = {name: np.asarray(open_image(data)) for name, data in files.items()}
    with ThreadPoolExecutor(8) as pool:
        for name, found in [(name, pool.submit(open_image, data)) for _ in range(6) for name, data in files.items()]:
            np.testing.assert_array_equal(np.asarray(found.result()), alone[name])


BOMBS = {
    "long": lambda: png(np.zeros((400_000, 1), np.uint8), 8, 0),
    "tile": lambda: tiled_tiff(np.zeros((16384, 16384), np.uint8), 16384).replace(
        b"\0\1\4\0\1\0\0\0\0\x40\0\0\1\1\4\0\1\0\0\0\0\x40\0\0", b"\0\1\4\0\1\0\0\0\x10\0\0\0\1\1\4\0\1\0\0\0\x10\0\0\0"
    ),
}


@pytest.mark.parametrize(("name", "message"), [("long", "a side has at most"), ("tile", "tiles of 16384 x 16384")])
def test_small_files_do_not_take_much_memory(name: str, message: str, tmp_path: Path) -> None:
    """In a child, whose peak is its own: the first would take 1.4 GB to resize to 896 pixels, the second 268 MB to open."""
    (tmp_path / "bomb").write_bytes(BOMBS[name]())
    code = """
import resource, sys
from pgfast.errors import ImageError
from pgfast.image import open_image
from PIL import Image
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
try:
    open_image(sys.argv[1]).resize((896, 896), Image.Resampling.BICUBIC)
except ImageError as error:
    print(error)
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "bomb"], capture_output=True, text=True, check=True)
    said, megabytes = done.stdout.splitlines()
    assert message in said
    assert float(megabytes) < 60


def test_the_largest_picture_is_in_memory_once_while_it_is_decoded() -> None:
    """Pillow takes 4 bytes a pixel; the file's own picture is turned into RGB, and no more copies of it are made."""
    code = """
import io, resource
from PIL import Image
from pgfast.image import open_image
buffer = io.BytesIO()
Image.new("L", (4000, 4000)).save(buffer, "PNG")
open_image(buffer.getvalue())
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
buffer = io.BytesIO()
Image.new("RGB", (4000, 4000)).save(buffer, "JPEG")
before = peak()
open_image(buffer.getvalue())
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 30  # the picture that was written took the same 61 MB before; a copy would take 61 more


def test_a_pipe_is_read(tmp_path: Path) -> None:
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    writer = threading.Thread(target=fifo.write_bytes, args=(seeds()["gif animated"],))
    writer.start()
    found = np.asarray(open_image(fifo))
    writer.join()
    np.testing.assert_array_equal(found, np.asarray(open_image(seeds()["gif animated"])))


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large.tif"
    with path.open("wb") as file:
        file.write(seeds()["tiff"])
        file.truncate(2**30 + 1)  # a hole, it takes no room
    with pytest.raises(ImageError, match="more than 1,073,741,824 bytes"):
        open_image(path)


@pytest.mark.parametrize("command", ["answer", "generate", "caption", "ocr", "question"])
def test_stdin(command: str) -> None:
    extra = {"answer": ["what color is the shape?"], "generate": ["answer en what color is the shape?"], "question": ["blue"]}
    args = [sys.executable, "-m", "pgfast", command, "-", *extra.get(command, []), "--provider", "cpu"]
    path = Path(__file__).parent.parent / "pgfast" / "demo" / "blue_circle.png"
    done = subprocess.run(args, input=path.read_bytes(), capture_output=True, check=False)
    as_file = subprocess.run([path if arg == "-" else arg for arg in args], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (as_file.returncode, as_file.stdout, as_file.stderr)
    if command == "answer":
        assert done.stdout == b"blue\n"
        empty = subprocess.run(args, input=b"", capture_output=True, check=False)
        assert empty.returncode == 2
        assert b"error: the picture is empty (0 bytes)" in empty.stderr
        closed = subprocess.run(["sh", "-c", '"$@" <&-', "sh", *args], capture_output=True, check=False)
        assert closed.returncode == 2
        assert b"error: - is stdin, which is closed" in closed.stderr


def test_the_command_says_that_there_are_more_frames(tmp_path: Path) -> None:
    (tmp_path / "a.gif").write_bytes(seeds()["gif animated"])
    args = [sys.executable, "-m", "pgfast", "answer", tmp_path / "a.gif", "what color is the shape?", "--provider", "cpu"]
    done = subprocess.run(args, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == f"pgfast: {tmp_path}/a.gif has 3 frames: the first one is used"
    assert len(done.stdout.splitlines()) == 1
