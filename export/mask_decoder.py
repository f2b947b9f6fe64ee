"""The mask decoder: 16 `<seg>` codes to a mask, the decoder half of the VQ-VAE that PaliGemma's segmentation was trained with.

The architecture is that of the paper "All in Tokens" (arXiv 2301.02229); weights come as big_vision publishes them,
`vae-oid.npz`: torch's names and torch's layouts, so nothing is transposed. Always fp32, standard operators, on the CPU.
"""

from __future__ import annotations

import dataclasses
import itertools
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnxscript import GraphBuilder, nn

from pgfast.bundle import describe_file
from pgfast.errors import ExportError, WeightMismatchError
from pgfast.manifest import Manifest

from .graphs import MASK_DECODER, Graph, finish_graph, graph_spec, new_graph, new_value
from .layers import Op
from .plan import shape_and_type
from .weights import some

CODEBOOK = "_vq_vae._embedding"
CODES, CODEBOOK_SIZE, CODE_WIDTH = 16, 128, 512
"""`<seg>` tokens of a mask, their number of values, and the width of what each stands for."""
SIDE = 4
"""The codes are a square, row by row."""
CHANNELS = (128, 128, 64, 32, 16)
"""Of the picture as it doubles from 4 x 4 to 64 x 64."""
_CONVOLUTIONS = [f"encoder.{i}" for i in (0, 2, 4, 6, 10)] + [f"encoder.{i}.net.{j}" for i in (8, 9) for j in (0, 2, 4)]
NOT_NEEDED = {
    *(f"{name}.{part}" for name in _CONVOLUTIONS for part in ("weight", "bias")),
    *("_vq_vae._ema_cluster_size", "_vq_vae._ema_w", "codebook.weight"),
}
"""What the rest of the VQ-VAE's state is called: the encoder, which makes codes for training, and what kept the codebook's
averages. A file may have them or not."""
MAX_HEADER = 10_000
"""Bytes of a tensor's header; numpy reads no longer ones either."""

Weights = dict[str, NDArray[np.float32]]


class Conv(nn.Module):
    """A convolution that keeps the size of the picture."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter([channels_out, channels_in, kernel, kernel], ir.DataType.FLOAT)
        self.bias = nn.Parameter([channels_out], ir.DataType.FLOAT)
        self._kernel = kernel

    def forward(self, op: Op, x: ir.Value) -> ir.Value:
        """[N, in, S, S] to [N, out, S, S]."""
        return op.Conv(x, self.weight, self.bias, kernel_shape=[self._kernel] * 2, pads=[self._kernel // 2] * 4)


class Upsampling(nn.Module):
    """A transposed convolution that doubles the size of the picture."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter([channels_in, channels_out, 4, 4], ir.DataType.FLOAT)
        self.bias = nn.Parameter([channels_out], ir.DataType.FLOAT)

    def forward(self, op: Op, x: ir.Value) -> ir.Value:
        """[N, in, S, S] to [N, out, 2 S, 2 S]."""
        # flax, in the reference, pads the spread-out input by 2; of the output that cuts 4 - 1 - 2 = 1 at each edge
        return op.ConvTranspose(x, self.weight, self.bias, kernel_shape=[4, 4], strides=[2, 2], pads=[1] * 4)


class Relu(nn.Module):
    """A module, so that the places in a list are those of torch's names."""

    def forward(self, op: Op, x: ir.Value) -> ir.Value:
        """Any shape."""
        return op.Relu(x)


class ResidualBlock(nn.Module):
    """Three convolutions beside an identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        kernels = (3, 3, 1)
        convolutions = [Conv(channels, channels, kernel) for kernel in kernels]
        self.net = nn.ModuleList([convolutions[0], Relu(), convolutions[1], Relu(), convolutions[2]])

    def forward(self, op: Op, x: ir.Value) -> ir.Value:
        """[N, C, S, S] to the same."""
        y = x
        for layer in self.net:
            y = layer(op, y)
        return op.Add(x, y)


class MaskDecoder(nn.Module):
    """Codes to a mask; parameters have the names of the published file."""

    def __init__(self) -> None:
        super().__init__()
        self.codebook = nn.Parameter([CODEBOOK_SIZE, CODE_WIDTH], ir.DataType.FLOAT, name=CODEBOOK)
        first = CHANNELS[0]
        layers: list[nn.Module] = [Conv(CODE_WIDTH, first, 1), Relu(), ResidualBlock(first), ResidualBlock(first)]
        for pair in itertools.pairwise(CHANNELS):
            layers += [Upsampling(*pair), Relu()]
        self.decoder = nn.ModuleList([*layers, Conv(CHANNELS[-1], 1, 1)])

    def forward(self, op: Op, codes: ir.Value) -> ir.Value:
        """int64 [N, 16] to float32 [N, 64, 64], about -1 outside the object and 1 inside."""
        x = op.Reshape(op.Gather(self.codebook, codes), [-1, SIDE, SIDE, CODE_WIDTH])  # [N, 4, 4, W]
        x = op.Transpose(x, perm=[0, 3, 1, 2])  # [N, W, 4, 4]
        for layer in self.decoder:
            x = layer(op, x)
        return op.Squeeze(x, [1])  # [N, 64, 64]


def build_mask_decoder() -> Graph:
    """`codes` int64 [N, 16] to `mask` float32 [N, 64, 64]."""
    codes = new_value("codes", ir.DataType.INT64, ["N", CODES])
    graph = new_graph(MASK_DECODER, [codes])
    mask = MaskDecoder()(GraphBuilder(graph).op, codes)
    side = SIDE * 2 ** (len(CHANNELS) - 1)
    return Graph(finish_graph(graph, {"mask": (mask, ir.DataType.FLOAT, ["N", side, side])}), {})


def add_mask_decoder(manifest: Manifest, folder: Path, weights: Weights) -> Manifest:
    """Write the graph with its weights inside (5 MB).

    Args:
        manifest: Of the bundle in `folder`.
        folder: Where the graph goes.
        weights: What `read_weights` returned.

    Returns:
        The manifest with the graph.
    """
    graph, path = build_mask_decoder(), folder / f"{MASK_DECODER}.onnx"
    for value in graph.parameters():
        value.const_value = ir.tensor(weights[str(value.name)], name=value.name)
    ir.save(graph.model, path)
    return dataclasses.replace(
        manifest,
        graphs=manifest.graphs | {MASK_DECODER: graph_spec(graph, path.name)},
        files=dict(sorted((manifest.files | {path.name: describe_file(path)}).items())),
    )


def read_weights(path: Path) -> Weights:
    """Read the decoder's tensors of a `.npz` file in the layout of big_vision's `vae-oid.npz`, as float32.

    Sizes are compared before anything is unpacked, and no pickle is read.

    Raises:
        ExportError: No such file, not a `.npz`, or damaged.
        WeightMismatchError: Tensors are missing, unexpected, of another shape or type, or not finite; the first are named.
    """
    wanted = {str(value.name): shape_and_type(value)[0] for value in build_mask_decoder().parameters()}
    try:
        with zipfile.ZipFile(path) as archive:
            return _read(archive, wanted, path)
    except ExportError:
        raise
    except FileNotFoundError as error:
        raise ExportError(f"{path} does not exist: --mask-decoder takes a file such as big_vision's vae-oid.npz") from error
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # what zipfile, zlib and numpy raise for damaged files has no common root
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise ExportError(f"{path.name} is not a .npz file, or is damaged: {reason}") from error


def _read(archive: zipfile.ZipFile, wanted: Mapping[str, tuple[int, ...]], path: Path) -> Weights:
    entries: dict[str, zipfile.ZipInfo] = {}
    for entry in archive.infolist():
        name = entry.filename.removesuffix(".npy")
        if name in entries:
            raise WeightMismatchError(f"{path.name} holds {name[:80]} a second time")
        entries[name] = entry
    problems = []
    if missing := sorted(wanted.keys() - entries.keys()):
        problems.append(f"missing: {some(missing)}")
    if extra := sorted(entries.keys() - wanted.keys() - NOT_NEEDED):
        problems.append(f"unexpected: {some([name[:80] for name in extra])}")
    weights: Weights = {}
    for name in sorted(wanted.keys() & entries.keys()):
        tensor = _read_tensor(archive, entries[name], wanted[name])
        if isinstance(tensor, str):
            problems.append(f"{name} {tensor}")
        else:
            weights[name] = tensor
    if problems:
        raise WeightMismatchError(f"{path.name} does not hold this mask decoder; {some(problems, 3, '; ')}")
    return weights


def _read_tensor(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, shape: tuple[int, ...]) -> NDArray[np.float32] | str:
    """Read a tensor, or say what is wrong with it."""
    count = int(np.prod(shape))
    if entry.file_size > MAX_HEADER + 8 * count:  # a bomb, or something else; zipfile unpacks no more than this says
        return f"has {entry.file_size:,} bytes where shape {list(shape)} is wanted"
    with archive.open(entry) as stream:
        found, fortran, dtype = _read_header(stream)
        if found != shape:
            return f"has shape {list(found)} where {list(shape)} is wanted"
        if dtype.kind != "f" or dtype.itemsize > 8:
            return f"has type {dtype}: floating-point numbers are wanted"
        flat = np.frombuffer(stream.read(), dtype)  # to the end: that is where zipfile compares the checksum
    if flat.size != count:
        return f"has {flat.size} numbers where {count} are wanted"
    values = flat.reshape(shape, order="F" if fortran else "C")
    with np.errstate(over="ignore"):  # what float32 cannot hold is an infinity, and found with the others
        tensor = np.ascontiguousarray(values, np.float32)
    return tensor if np.isfinite(tensor).all() else "holds NaN or infinite values"


def _read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream, max_header_size=MAX_HEADER)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(stream, max_header_size=MAX_HEADER)
    raise ValueError(f"arrays of version {version} hold no plain numbers")
