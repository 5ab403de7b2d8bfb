"""A device whose memory several lanes share."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

import numpy as np
import torch

from pissa_convert.errors import RequestError
from pissa_convert.linalg.native import NativeBackend

_PORTABLE = 1
"""cudaHostRegisterPortable: for all devices."""

_FREE_SHARE = 0.9
"""Of what is free: the rest is for CUDA's own buffers."""


class Device:
    """Lanes work on it side by side, or one works alone where memory is short.

    Attributes:
        device: torch's.
        limit: bytes of its memory that may be taken.
        warnings: what had to be done in another way.
    """

    def __init__(self, device: torch.device, limit: int) -> None:
        self.device, self.limit = device, limit
        self.warnings: list[str] = []
        self._changed = threading.Condition()
        self._working = 0
        self._is_reserved = False

    @cached_property
    def cpu(self) -> NativeBackend:
        """Does what the device cannot."""
        return NativeBackend()

    @contextmanager
    def pinned(self, memory: memoryview) -> Iterator[None]:
        """Lock the pages of `memory` meanwhile, for every device; without that, copies are slower."""
        if self.device.type != "cuda":
            yield
            return
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        address = np.frombuffer(memory, np.uint8).ctypes.data
        with torch.cuda.device(self.device):
            code = int(runtime.cudaHostRegister(address, len(memory), _PORTABLE))
        if code:
            self.warnings.append(f"{len(memory)} bytes could not be pinned (CUDA error {code}): copies are slower")
        try:
            yield
        finally:
            if not code:
                runtime.cudaHostUnregister(address)

    @contextmanager
    def beside_others(self) -> Iterator[None]:
        """Wait while a lane works alone, then work."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_reserved)
            self._working += 1
        try:
            yield
        finally:
            with self._changed:
                self._working -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until nobody else works, and work with all the memory that can be had."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_reserved)
            self._is_reserved = True
            self._changed.wait_for(lambda: self._working == 0)
        try:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            yield
        finally:
            with self._changed:
                self._is_reserved = False
                self._changed.notify_all()


def find_devices(number: int | None, max_vram: int | None, *, is_needed: bool) -> Sequence[Device]:
    """The CUDA devices to use: number N, or all that are of the first one's kind, so that each gives the same bytes.

    Args:
        number: of one device, or None.
        max_vram: bytes on each that may be taken; by default most of what is free.
        is_needed: whether there has to be one.

    Raises:
        RequestError: there is no such device, or none that torch can use.
    """
    # Without this, cuBLAS may add up in another order when it works on several streams. It is read when CUDA starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    has_products = hasattr(torch.ops.aten.mm, "dtype")  # of bfloat16 with a float32 result: torch 2.8
    if not count or not has_products:
        if is_needed:
            raise RequestError(
                "no CUDA device can be used",
                found=f"torch {torch.__version__} with {count} CUDA devices",
                fix="install NVIDIA's driver and torch 2.8 or later for CUDA, or give --device cpu",
            )
        return []
    if number is not None and number >= count:
        raise RequestError("--device names no device", expected=f"less than cuda:{count}", found=f"cuda:{number}")
    kind = torch.cuda.get_device_name(0)
    indices = [i for i in range(count) if torch.cuda.get_device_name(i) == kind] if number is None else [number]
    return [_open(index, max_vram) for index in indices]


def _open(index: int, max_vram: int | None) -> Device:
    free, total = torch.cuda.mem_get_info(index)
    limit = int(_FREE_SHARE * free) if max_vram is None else min(max_vram, free)
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), index)
    return Device(torch.device("cuda", index), limit)
