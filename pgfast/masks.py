"""Masks: 16 codes through the mask decoder, resized into their box, painted; and their run lengths as COCO writes them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pgfast.bundle import Bundle
from pgfast.runtime.providers import Target
from pgfast.runtime.session import failure, open_session

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

    from pgfast.types import Segment

MASK_DECODER = "mask_decoder"

Mask = NDArray[np.bool_]


class MaskDecoder:
    """A bundle's mask decoder, opened at the first mask: on the CPU whatever the target, one thread is enough.

    Args:
        bundle: The bundle.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._bundle, self._target = bundle, Target("cpu", spin=False)
        self._opening = threading.Lock()
        self._session: Any = None

    @property
    def present(self) -> bool:
        """Whether the bundle has one."""
        return MASK_DECODER in self._bundle.manifest.graphs

    def decode(self, codes: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Run the graph.

        Args:
            codes: 16 numbers below 128 each.

        Returns:
            [N, 64, 64]; above 0 is the object.

        Raises:
            BundleError: The graph does not load or run.
        """
        spec = self._bundle.manifest.graphs[MASK_DECODER]
        with self._opening:
            if self._session is None:
                self._session = open_session(self._bundle.path(spec.file), spec, self._target, threads=1)
        try:
            masks: NDArray[np.float32] = self._session.run(["mask"], {"codes": np.array(codes, np.int64)})[0]
        except Exception as error:
            raise failure("the mask decoder fails", self._target, error) from error
        return masks


def place(mask: NDArray[np.float32], box: tuple[float, float, float, float], width: int, height: int) -> Mask:
    """Resize a mask into its box.

    Args:
        mask: [S, S]; above 0 is the object.
        box: x0, y0, x1, y1 in pixels, rounded here; without area, or outside the picture, it leaves nothing.
        width: Of the picture, in pixels.
        height: Of the picture.

    Returns:
        [height, width].
    """
    from PIL import Image

    placed = np.zeros((height, width), np.bool_)
    x0, y0, x1, y1 = map(round, box)
    left, top, right, bottom = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
    if left >= right or top >= bottom:
        return placed
    # the part of the mask that is inside the picture; multiplied first, so that nothing rounds beyond the mask's edge
    rows, columns = mask.shape
    part = (
        (left - x0) * columns / (x1 - x0),
        (top - y0) * rows / (y1 - y0),
        (right - x0) * columns / (x1 - x0),
        (bottom - y0) * rows / (y1 - y0),
    )
    # bilinear on the decoder's numbers, and only then compared with 0 (big_vision, evaluators/.../transfers/segmentation.py)
    resized = Image.fromarray(mask).resize((right - left, bottom - top), Image.Resampling.BILINEAR, box=part)
    placed[top:bottom, left:right] = np.asarray(resized) > 0
    return placed


def paint(picture: NDArray[np.uint8], mask: Mask, color: tuple[int, int, int]) -> None:
    """Lay a half-transparent colour over the mask, in place: uint8 [H, W, 3], [H, W]."""
    under = picture[mask].astype(np.uint16)
    picture[mask] = ((under + np.array(color, np.uint16) + 1) // 2).astype(np.uint8)


def draw_segments(picture: PILImage, segments: Sequence[Segment]) -> PILImage:
    """Draw masks, boxes and labels, in a colour per label (arguments as in `draw_detections`)."""
    from PIL import Image

    from pgfast.drawing import draw_detections, label_colors

    colors, painted = label_colors([segment.label for segment in segments]), np.array(picture)
    for segment in segments:
        if segment.mask is not None:
            paint(painted, segment.mask, colors[segment.label])
    return draw_detections(Image.fromarray(painted), segments)


def run_lengths(mask: Mask) -> list[int]:
    """COCO's uncompressed counts: lengths of runs, column by column, the first one of pixels outside (perhaps 0)."""
    pixels = mask.ravel(order="F")
    changes = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    lengths: list[int] = np.diff(np.concatenate([[0], changes, [pixels.size]])).tolist()
    return [0, *lengths] if pixels.size and pixels[0] else lengths


def compressed(counts: Sequence[int]) -> str:
    """COCO's compressed string: from the fourth on each count less the one two before it, five bits per character."""
    characters = []
    for i, count in enumerate(counts):
        rest = count - counts[i - 2] if i > 2 else count
        while True:
            bits, rest = rest & 31, rest >> 5
            last = rest == (-1 if bits & 16 else 0)  # the reader extends the sign from bit 4
            characters.append(chr(48 + bits + (0 if last else 32)))
            if last:
                break
    return "".join(characters)


def to_rle(mask: Mask) -> dict[str, list[int] | str]:
    """COCO's run-length encoding of a mask [H, W], compressed: `size` (H, W) and `counts`."""
    return {"size": list(mask.shape), "counts": compressed(run_lengths(mask))}
