"""Tensors on the device whose first axis is the cache slot; runs are bound to a part of them by address."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .providers import Target, import_onnxruntime

BFLOAT16 = 16
"""ONNX's number of a type that numpy lacks (TensorProto.DataType)."""


def to_device(target: Target, array: NDArray[Any], *, bfloat16: bool = False) -> Any:
    """Return an array as an OrtValue in the target's memory; on the CPU it shares the array's.

    Args:
        target: Whose memory.
        array: Any shape; uint16 when it holds bfloat16.
        bfloat16: Whether it does.
    """
    ort_value, device = import_onnxruntime().OrtValue, (target.device, target.device_id)
    if not bfloat16:
        return ort_value.ortvalue_from_numpy(array, *device)
    value = ort_value.ortvalue_from_numpy_with_onnx_type(array, BFLOAT16)
    if target.device == "cpu":
        return value
    on_device = ort_value.ortvalue_from_shape_and_type(array.shape, BFLOAT16, *device)
    on_device.update_inplace(value)
    return on_device


class SlotBuffer:
    """Zeros [slots, ...] in the target's memory, at one address for its whole life.

    On the CPU the operating system commits a page when it is first written: slots that nobody uses cost nothing.

    Args:
        target: Whose memory.
        shape: [slots, ...].
        dtype: Type of the elements; None: bfloat16.
    """

    def __init__(self, target: Target, shape: tuple[int, ...], dtype: DTypeLike | None) -> None:
        self._device = (target.device, target.device_id)
        self._shape = shape
        self._type: Any = BFLOAT16 if dtype is None else np.dtype(dtype)
        zeros: NDArray[Any] = np.zeros(shape, np.uint16 if dtype is None else dtype)
        self._slot_bytes = zeros.nbytes // shape[0]
        self._host: NDArray[Any] | None = None
        if target.device == "cpu":
            self._host = zeros  # the OrtValue shares this memory
        self._value = to_device(target, zeros, bfloat16=dtype is None)

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

    def copy(self, source: int, target: int, first: int, end: int) -> None:
        """Copy positions `first` to `end` (third axis) of a slot into another slot; only in host memory.

        Args:
            source: The slot to read.
            target: The slot to write; its other positions stay as they are.
            first: First position.
            end: Position after the last one.
        """
        assert self._host is not None, "there is no copy within device memory"
        self._host[target, :, first:end] = self._host[source, :, first:end]

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


class DeviceFeatures:
    """Image features in device memory; numpy gets a copy when it asks for one.

    Args:
        value: OrtValue [B, P, D].
    """

    def __init__(self, value: Any) -> None:
        self.value = value
        self.shape: tuple[int, ...] = tuple(value.shape())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self.value.numpy(), dtype)  # on the CPU numpy() is a view that does not keep the memory


Features = NDArray[Any] | DeviceFeatures
"""Image features [B, P, D], on the host or on the device."""
