"""Damaged bundles: each kind of damage is a function of a folder and a random generator."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx

from pgfast.bundle import describe_file

GRAPHS = ("decoder.onnx", "vision_encoder.onnx")
DATA = tuple(f"{name}.data" for name in GRAPHS)
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 63, 64, 255, 2**23, 2**24, 2**31, 2**63, -(2**63), 2**64, 10**400,
    0.0, -0.5, 1e-300, 1e300,
    "", "x", "..", "../decoder.onnx", "/etc/hostname", "decoder.onnx.data", "\u0000", "é" * 300,
    "{text}", "{language}", "float32[B]",
    [], [0], ["en"], [[[]]], {}, {"x": 1}, "NaN", "𐐷",
)  # fmt: skip
SIZES = (0, 1, 2, -1, -2, 3, 17, 127, 128, 1280, 2**20, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, -(2**63))
LOCATIONS = (
    "", ".", "..", "../outside.data", "/etc/passwd", "/dev/zero", "/dev/stdin", "/proc/self/mem", "missing.data", "folder",
    "folder/outside.data", "link/outside.data", "link.data", "loop", "pgfast.json", "tokenizer.json",
    "decoder.onnx", "./decoder.onnx.data",
    "x/../decoder.onnx.data", "decoder.onnx.data/", "..\\outside.data", "decoder.onnx.data\0x", "file:///etc/passwd", "é" * 300,
    "*/_ORT_MEM_ADDR_/*", "vision_encoder.onnx.data",
)  # fmt: skip


def make_mutant(source: Path, folder: Path, seed: int) -> str:
    """Make a bundle with one kind of damage from a good one; returns what kind.

    Args:
        source: The good one; files that stay as they are become hard links.
        folder: Where to; must not exist.
        seed: Says what becomes damaged, and how.
    """
    rng = random.Random(seed)
    shutil.copytree(source, folder, copy_function=_link)
    kind = MUTATIONS[seed % len(MUTATIONS)]
    kind(folder, rng)
    return kind.__name__


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


def put(path: Path, data: bytes) -> None:
    """Write a file anew: the old one may be a hard link to the good bundle's."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    raw = json.loads((folder / "pgfast.json").read_text())
    change(raw)
    put(folder / "pgfast.json", json.dumps(raw).encode())


def vouch(folder: Path, *names: str) -> None:
    """Let the manifest say what its files are now, so that the damage comes past the hashes."""
    for name in names:
        entry = describe_file(folder / name)
        edit_manifest(
            folder,
            lambda raw, name=name, entry=entry: raw["files"].update({name: {"sha256": entry.sha256, "size": entry.size}}),
        )


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Flip, insert, remove, repeat or cut off a few bytes."""
    buffer = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5, 30))):
        at, length = rng.randrange(len(buffer) + 1), rng.choice((1, 1, 2, 4, 50))
        what = rng.randrange(6)
        if what == 0 and at < len(buffer):
            buffer[at] ^= 1 << rng.randrange(8)
        elif what == 1 and at < len(buffer):
            buffer[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif what == 2:
            buffer[at:at] = rng.randbytes(length)
        elif what == 3:
            del buffer[at : at + length]
        elif what == 4:
            buffer[at:at] = buffer[at : at + length] * rng.choice((1, 3))
        elif rng.random() < 0.2:
            del buffer[at:]
    return bytes(buffer)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """All places in parsed JSON, a list's only at its ends."""
    keys: list[Any] = list(value) if isinstance(value, dict) else [*range(len(value))] if isinstance(value, list) else []
    found = [path] if path else []
    for key in keys if len(keys) < 100 else [*keys[:20], *keys[-20:]]:
        found += _places(value[key], (*path, key))
    return found


def changed_json(raw: Any, rng: random.Random) -> Any:
    """Replace, remove, double or move one value anywhere."""
    places = _places(raw)
    *parents, key = rng.choice(places)
    parent = raw
    for each in parents:
        parent = parent[each]
    what = rng.randrange(8)
    if what == 0:
        del parent[key]
    elif what == 1 and isinstance(parent, dict):
        parent[rng.choice(("surprise", "", "__class__", "../x"))] = parent[key]
    elif what == 2:
        other = raw
        for each in rng.choice(places):
            other = other[each]
        parent[key] = json.loads(json.dumps(other))
    elif what == 3 and isinstance(parent[key], int | float):
        parent[key] = parent[key] * rng.choice((2, 0.5, -1, 1000)) + rng.choice((0, 1, -1))
    else:
        parent[key] = rng.choice(VALUES)
    return raw


def manifest_bytes(folder: Path, rng: random.Random) -> None:
    put(folder / "pgfast.json", damaged((folder / "pgfast.json").read_bytes(), rng))


def manifest_values(folder: Path, rng: random.Random) -> None:
    raw = json.loads((folder / "pgfast.json").read_text())
    for _ in range(rng.choice((1, 1, 1, 3))):
        raw = changed_json(raw, rng)
    put(folder / "pgfast.json", json.dumps(raw).encode())


def manifest_sizes(folder: Path, rng: random.Random) -> None:
    """Numbers that the graphs do not contradict: only the memory and the positions do."""

    def change(raw: dict[str, Any]) -> None:
        raw["dimensions"]["max_position_embeddings"] = 2**24 - 1
        key = rng.choice(("prompt_tokens", "new_tokens", "images"))
        raw["limits"][key] = rng.choice((1, 2, 3, 1000, 2**16, 2**17, 2**20, 2**23))
        if rng.random() < 0.3:
            raw["tokens"] = {key: rng.randrange(raw["dimensions"]["vocab_size"]) for key in raw["tokens"]}
        if rng.random() < 0.3:
            raw["image"] |= {"rescale_factor": rng.choice((1e-5, 1e5)), "std": [1e-5] * 3, "mean": [1e5] * 3}

    edit_manifest(folder, change)


def tokenizer_bytes(folder: Path, rng: random.Random) -> None:
    put(folder / "tokenizer.json", damaged((folder / "tokenizer.json").read_bytes(), rng))
    vouch(folder, "tokenizer.json")


def tokenizer_values(folder: Path, rng: random.Random) -> None:
    raw = json.loads((folder / "tokenizer.json").read_text())
    for _ in range(rng.choice((1, 1, 3))):
        part = rng.choice(("all", "model", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
        if isinstance(raw, dict) and isinstance(raw.get(part), dict | list) and raw[part]:
            raw[part] = changed_json(raw[part], rng)
        elif raw:
            raw = changed_json(raw, rng)
    put(folder / "tokenizer.json", json.dumps(raw).encode())
    vouch(folder, "tokenizer.json")


def graph_bytes(folder: Path, rng: random.Random) -> None:
    name = rng.choice(GRAPHS)
    put(folder / name, damaged((folder / name).read_bytes(), rng))
    vouch(folder, name)


def _edit_graph(folder: Path, name: str, change: Callable[[onnx.ModelProto], object]) -> None:
    model = onnx.load(folder / name, load_external_data=False)
    change(model)
    put(folder / name, model.SerializeToString())
    vouch(folder, name)


def graph_dims(folder: Path, rng: random.Random) -> None:
    """Shapes of weights and of inputs and outputs."""

    def change(model: onnx.ModelProto) -> None:
        graph = model.graph
        for _ in range(rng.choice((1, 1, 4))):
            if rng.random() < 0.7:
                tensor = rng.choice(graph.initializer)
                if tensor.dims and rng.random() < 0.8:
                    tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(SIZES)
                elif rng.random() < 0.5:
                    tensor.dims.extend([rng.choice(SIZES)] * rng.choice((1, 1, 40)))
                else:
                    tensor.data_type = rng.choice((0, 1, 2, 6, 7, 8, 9, 10, 11, 16, 22, 99, -1))
            else:
                value = rng.choice([*graph.input, *graph.output])
                if value.type.tensor_type.shape.dim:
                    rng.choice(value.type.tensor_type.shape.dim).dim_value = rng.choice(SIZES)

    _edit_graph(folder, rng.choice(GRAPHS), change)


def graph_nodes(folder: Path, rng: random.Random) -> None:
    """Operators, their inputs and attributes."""

    def change(model: onnx.ModelProto) -> None:
        graph = model.graph
        names = [name for node in graph.node for name in (*node.input, *node.output)]
        for _ in range(rng.choice((1, 1, 3))):
            node, what = rng.choice(graph.node), rng.randrange(7)
            if what == 0:
                graph.node.remove(node)
            elif what == 1 and node.input:
                node.input[rng.randrange(len(node.input))] = rng.choice([*names, "", "nothing"])
            elif what == 2 and node.output:
                node.output[rng.randrange(len(node.output))] = rng.choice([*names, "", "nothing"])
            elif what == 3:
                node.op_type = rng.choice(
                    ("Reshape", "Expand", "Tile", "Loop", "EPContext", "MatMul", "Gather", "ConstantOfShape", "")
                )
            elif what == 4:
                node.domain = rng.choice(("", "com.microsoft", "x"))
            elif node.attribute:
                attribute = rng.choice(node.attribute)
                attribute.i = rng.choice(SIZES)
                attribute.f = rng.choice((0.0, -1.0, float("nan"), float("inf"), 1e30))
                for at in range(len(attribute.ints)):
                    attribute.ints[at] = rng.choice(SIZES)
            elif node.input:
                node.input.append(rng.choice(names))

    _edit_graph(folder, rng.choice(GRAPHS), change)


def external_data(folder: Path, rng: random.Random) -> None:
    """Where a graph says that its weights lie."""
    (folder.parent / "outside.data").write_bytes(b"secret  " * 2**17)
    (folder / "folder").mkdir()
    (folder / "folder" / "outside.data").write_bytes(b"secret  " * 2**17)
    (folder / "link").symlink_to(folder.parent, target_is_directory=True)
    (folder / "loop").symlink_to("loop")
    if rng.random() < 0.3:
        (folder / "link.data").symlink_to(folder.parent / "outside.data")

    def change(model: onnx.ModelProto) -> None:
        tensors = [tensor for tensor in model.graph.initializer if tensor.external_data]
        location, offset, length = rng.choice(LOCATIONS), rng.choice(SIZES), rng.choice(SIZES)
        what = rng.choice(("location", "location", "offset", "length", "both", "odd"))
        for tensor in tensors if rng.random() < 0.4 else [rng.choice(tensors)]:
            for entry in tensor.external_data:
                if entry.key == "location" and what == "location":
                    entry.value = location
                if (entry.key, what) in (("offset", "offset"), ("offset", "both")):
                    entry.value = str(offset)
                if (entry.key, what) in (("length", "length"), ("length", "both")):
                    entry.value = str(length)
                if what == "odd" and rng.random() < 0.3:
                    entry.key = rng.choice(("offset", "location", "length", "checksum", ""))
                if what == "odd" and rng.random() < 0.3:
                    entry.value = rng.choice(("", "x", "1e3", "0x10", "-1", "9" * 30, " 5", "5\0"))

    _edit_graph(folder, rng.choice(GRAPHS), change)


def data_bytes(folder: Path, rng: random.Random) -> None:
    """Weights of another size, or others; half of the time the manifest says so."""
    name = rng.choice(DATA)
    data = (folder / name).read_bytes()
    what = rng.randrange(4)
    if what == 0:
        data = data[: rng.choice((0, 1, len(data) // 2, len(data) - 1, rng.randrange(len(data))))]
    elif what == 1:
        data += rng.randbytes(rng.choice((1, 4096)))
    elif what == 2:
        data = (b"\xff\xff\xff\x7f" if rng.random() < 0.5 else b"\0\0\x80\x7f") * (len(data) // 4)  # NaN, infinity
    else:
        data = damaged(data[:100_000], rng)[:100_000].ljust(100_000, b"\0") + data[100_000:]
    put(folder / name, data)
    if rng.random() < 0.7:
        vouch(folder, name)


def files(folder: Path, rng: random.Random) -> None:
    """Files that are missing, links, folders, pipes, swapped or unreadable names."""
    path = folder / rng.choice((*GRAPHS, *DATA, "tokenizer.json", "pgfast.json"))
    what = rng.randrange(9)
    if what == 0:
        path.unlink()
    elif what == 1:
        outside = folder.parent / "elsewhere"
        outside.write_bytes(path.read_bytes())
        path.unlink()
        path.symlink_to(outside)
    elif what == 2:
        path.unlink()
        path.mkdir()
    elif what == 3:
        path.unlink()
        path.symlink_to(path.name)
    elif what == 4:
        path.unlink()
        os.mkfifo(path)
    elif what == 5:
        inner = folder / "inner"
        path.rename(inner)
        path.symlink_to("inner")
    elif what == 6:
        others = [each for each in (*GRAPHS, *DATA, "tokenizer.json") if each != path.name]
        put(path, (folder / rng.choice(others)).read_bytes())
        if path.name != "pgfast.json":
            vouch(folder, path.name)
    elif what == 7:
        (folder / rng.choice(("more.onnx", "more.data", "\udcff.data"))).touch()
    else:
        path.unlink()
        path.symlink_to("/dev/zero")


MUTATIONS = (
    manifest_bytes,
    manifest_values,
    manifest_sizes,
    tokenizer_bytes,
    tokenizer_values,
    graph_bytes,
    graph_dims,
    graph_nodes,
    external_data,
    data_bytes,
    files,
)
