"""Tensors on the device whose first axis is the cache slot; runs are bound to a part of them by address."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .providers import Target, import_onnxruntime

BFLOAT16 = 16
"""ONNX's number of a type that numpy lacks (TensorProto.DataType)."""


class SlotBuffer:
    """Zeros [slots, ...] in the target's memory, at one address for its whole life.

    On the CPU the operating system commits a page when it is first written: slots that nobody uses cost nothing.

    Args:
        target: Whose memory.
        shape: [slots, ...].
        dtype: Type of the elements; None: bfloat16.
    """

    def __init__(self, target: Target, shape: tuple[int, ...], dtype: DTypeLike | None) -> None:
        ort = import_onnxruntime()
        self._device = (target.device, target.device_id)
        self._shape = shape
        self._type: Any = BFLOAT16 if dtype is None else np.dtype(dtype)
        zeros: NDArray[Any] = np.zeros(shape, np.uint16 if dtype is None else dtype)
        self._slot_bytes = zeros.nbytes // shape[0]
        self._host: NDArray[Any] | None = None
        if target.device == "cpu":
            self._host = zeros  # the OrtValue shares this memory
        if dtype is not None:
            self._value = ort.OrtValue.ortvalue_from_numpy(zeros, *self._device)
        else:
            self._value = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(zeros, BFLOAT16)
            if target.device != "cpu":
                on_host = self._value
                self._value = ort.OrtValue.ortvalue_from_shape_and_type(shape, BFLOAT16, *self._device)
                self._value.update_inplace(on_host)

    def read(self) -> NDArray[Any]:
        """Return the content: on the CPU the memory itself (bfloat16 as uint16), elsewhere a copy."""
        content: NDArray[Any] = self._value.numpy() if self._host is None else self._host
        return content

    def write(self, first: int, rows: NDArray[Any]) -> None:
        """Set slots `first` and following to `rows` [n, ...]; for a few numbers, not for caches."""
        if self._host is not None:
            self._host[first : first + len(rows)] = rows
            return
        if rows.shape != self._shape:
            content = self.read()
            content[first : first + len(rows)] = rows
            rows = content
        self._value.update_inplace(rows)

    def shape(self, count: int) -> tuple[int, ...]:
        """Return the shape of `count` slots."""
        return (count, *self._shape[1:])

    def bind_input(self, binding: Any, name: str, first: int, shape: tuple[int, ...]) -> None:
        """Let a run read a tensor of this shape that begins at slot `first`."""
        binding.bind_input(name, *self._device, self._type, shape, self._address(first))

    def bind_output(self, binding: Any, name: str, first: int, shape: tuple[int, ...]) -> None:
        """Let a run write a tensor of this shape that begins at slot `first`."""
        binding.bind_output(name, *self._device, self._type, shape, self._address(first))

    def _address(self, first: int) -> int:
        address: int = self._value.data_ptr()
        return address + first * self._slot_bytes
