"""A stand-in for Triton's Python backend and the reader of its configuration.

`triton_python_backend_utils` exists only inside Triton. What is imitated, after python_backend's README and sources:

- BYTES tensors reach the model as numpy objects of type bytes, after a way through their wire format (length, content);
- an input that the client left out is None; every tensor has the batch dimension in front when max_batch_size is above 0;
- `execute` gets all requests of a call and returns one response for each, in order; a response has tensors or an error;
- outputs have the names, types and shapes of config.pbtxt; those that the client did not ask for are dropped;
- errors have a code, INTERNAL if none is given; `is_cancelled` asks whether the client has gone away.

Not imitated: processes, shared memory, decoupled models, BLS, GPU tensors, the dynamic batcher.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

TYPES = {
    "TYPE_STRING": np.object_,
    "TYPE_FP32": np.float32,
    "TYPE_FP16": np.float16,
    "TYPE_INT32": np.int32,
    "TYPE_INT64": np.int64,
}
FIELDS: dict[str, dict[str, Any]] = {
    "ModelConfig": {
        "name": str,
        "platform": str,
        "backend": str,
        "max_batch_size": int,
        "input": ["ModelInput"],
        "output": ["ModelOutput"],
        "instance_group": ["ModelInstanceGroup"],
        "default_model_filename": str,
        "dynamic_batching": "ModelDynamicBatching",
        "model_transaction_policy": "ModelTransactionPolicy",
        "parameters": ["ParametersEntry"],
    },
    "ModelInput": {"name": str, "data_type": set(TYPES), "dims": [int], "optional": bool, "allow_ragged_batch": bool},
    "ModelOutput": {"name": str, "data_type": set(TYPES), "dims": [int]},
    "ModelInstanceGroup": {"count": int, "kind": {"KIND_CPU", "KIND_GPU"}},
    "ModelDynamicBatching": {},
    "ModelTransactionPolicy": {"decoupled": bool},
    "ParametersEntry": {"key": str, "value": "ModelParameter"},
    "ModelParameter": {"string_value": str},
}
"""The part of model_config.proto that is used here: field names and types, in lists where they repeat, enum values in sets."""
_TOKEN = re.compile(r'\s*(?:([A-Za-z_]\w*)|(-?\d+)|("(?:[^"\\\n]|\\.)*")|([{}\[\]:,]))')


def parse_config(text: str) -> dict[str, Any]:
    """Read config.pbtxt strictly: every field must exist, have its type, and come once unless it repeats."""
    tokens, place = [], 0
    while text[place:].strip():
        match = _TOKEN.match(text, place)
        assert match, f"not protobuf's text format: {text[place : place + 40]!r}"
        tokens.append(match[0].strip())
        place = match.end()
    config = _message(tokens, "ModelConfig", end="")
    config["parameters"] = {entry["key"]: entry["value"] for entry in config.get("parameters", [])}  # a map, in JSON an object
    return config


def _message(tokens: list[str], kind: str, end: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    while tokens and tokens[0] != "}":
        name = tokens.pop(0)
        assert name in FIELDS[kind], f"{kind} has no field {name}"
        wanted = FIELDS[kind][name]
        repeated = isinstance(wanted, list)
        wanted = wanted[0] if repeated else wanted
        if isinstance(wanted, str):
            assert tokens.pop(0) == "{"
            value: Any = _message(tokens, wanted, "}")
        else:
            assert tokens.pop(0) == ":"
            if repeated:
                assert tokens.pop(0) == "["
                value = []
                while tokens[0] != "]":
                    value.append(_scalar(tokens.pop(0), wanted))
                    assert tokens[0] in ",]"
                    tokens[:1] = [] if tokens[0] == "," else ["]"]
                tokens.pop(0)
                assert name not in found
                found[name] = value
                continue
            value = _scalar(tokens.pop(0), wanted)
        if repeated:
            found.setdefault(name, []).append(value)
        else:
            assert name not in found, f"{name} comes twice"
            found[name] = value
    assert (tokens.pop(0) if tokens else "") == end
    return found


def _scalar(token: str, wanted: Any) -> Any:
    if isinstance(wanted, set):
        assert token in wanted
        return token
    value = json.loads(token)
    assert type(value) is wanted
    return value


def through_the_wire(array: np.ndarray) -> np.ndarray:
    """BYTES: each element as four bytes of length and its content, and back."""
    if array.dtype != np.object_:
        return np.array(array)
    elements = [item if isinstance(item, bytes) else str(item).encode() for item in array.ravel()]
    wire, place, found = b"".join(struct.pack("<I", len(item)) + item for item in elements), 0, []
    while place < len(wire):
        (length,) = struct.unpack_from("<I", wire, place)
        found.append(wire[place + 4 : place + 4 + length])
        place += 4 + length
    result = np.empty(len(found), np.object_)
    result[:] = found
    return result.reshape(array.shape)


class Tensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        assert isinstance(array, np.ndarray)
        assert array.dtype.type in TYPES.values(), "not a type of Triton's"
        self._name, self._array = name, through_the_wire(array)

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._array


class TritonError:
    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE, UNSUPPORTED, ALREADY_EXISTS, CANCELLED = range(8)

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        assert isinstance(message, str)
        self._message, self._code = message, code

    def message(self) -> str:
        return self._message

    def code(self) -> int:
        return self._code


class InferenceResponse:
    def __init__(self, output_tensors: list[Tensor], error: TritonError | None = None) -> None:
        assert type(output_tensors) is list
        assert all(isinstance(tensor, Tensor) for tensor in output_tensors)
        self._tensors, self._error = output_tensors, error

    def output_tensors(self) -> list[Tensor]:
        return self._tensors

    def error(self) -> TritonError | None:
        return self._error

    def has_error(self) -> bool:
        return self._error is not None


class InferenceRequest:
    def __init__(
        self,
        inputs: dict[str, np.ndarray],
        outputs: Sequence[str] | None = None,
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        self._inputs = [Tensor(name, array) for name, array in inputs.items()]
        self.outputs, self.is_cancelled = outputs, is_cancelled

    def inputs(self) -> list[Tensor]:
        return self._inputs


def get_input_tensor_by_name(request: InferenceRequest, name: str) -> Tensor | None:
    return next((tensor for tensor in request.inputs() if tensor.name() == name), None)


def check_tensors(tensors: Sequence[Tensor], described: Sequence[dict[str, Any]], batch: int) -> int:
    """Hold tensors to their description; returns the number of rows."""
    rows = 0
    for tensor in tensors:
        array = tensor.as_numpy()
        wanted = next(entry for entry in described if entry["name"] == tensor.name())
        assert array.dtype.type is TYPES[wanted["data_type"]], tensor.name()
        assert array.ndim == 1 + len(wanted["dims"])
        assert all(dim in (-1, size) for dim, size in zip(wanted["dims"], array.shape[1:], strict=True))
        assert 0 < array.shape[0] <= batch
        assert rows in (0, array.shape[0])
        rows = array.shape[0]
    return rows


def serve(model: Any, config: dict[str, Any], requests: list[InferenceRequest]) -> list[Any]:
    """One call of the backend: each request's outputs by name, or its error."""
    total = 0
    for request in requests:
        given = {tensor.name() for tensor in request.inputs()}
        assert {entry["name"] for entry in config["input"] if not entry.get("optional")} <= given
        total += check_tensors(request.inputs(), config["input"], config["max_batch_size"])
    assert total <= config["max_batch_size"]
    responses = model.execute(requests)
    assert isinstance(responses, list)
    assert len(responses) == len(requests)
    found: list[Any] = []
    for request, response in zip(requests, responses, strict=True):
        assert isinstance(response, InferenceResponse)
        if response.has_error():
            found.append(response.error())
            continue
        rows = check_tensors(response.output_tensors(), config["output"], config["max_batch_size"])
        assert rows == request.inputs()[0].as_numpy().shape[0]
        tensors = {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}
        found.append({name: tensors[name] for name in request.outputs or tensors})
    return found
