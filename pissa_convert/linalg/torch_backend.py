"""Splits on GPUs through torch; with device "cpu" the same arithmetic without one, which is how it is tested.

Each lane has a device and a stream of its own: while one lane's weight is on its way in or out, another's is computed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch

from pissa_convert.errors import RequestError, WeightError
from pissa_convert.linalg import SplitSpec, SplitStats
from pissa_convert.linalg.torch_basis import Note
from pissa_convert.linalg.torch_device import Device
from pissa_convert.linalg.torch_krylov import Factors, factorize
from pissa_convert.linalg.torch_matrix import CHUNK, Matrix
from pissa_convert.linalg.torch_refit import correct, follow
from pissa_convert.linalg.torch_schedule import device_bytes

Done = TypeVar("Done")

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

_LANES = 3
"""Weights that are on a device at the same time: one on its way in, one that is computed, one on its way out."""

_SMALL_CHUNK = CHUNK // 16
"""Values that are widened at a time where memory is short."""


class TorchBackend:
    """Splits on devices of one kind; which of them, and how many there are, changes no byte of a result."""

    def __init__(self, devices: Sequence[Device], turn: int = 0) -> None:
        """Split on the `turn`-th of these, counted round."""
        self._devices = devices
        self._home = devices[turn % len(devices)]
        self._device = self._home.device
        self._turns = itertools.count()
        is_cuda = self._device.type == "cuda"
        self._stream = torch.cuda.Stream(self._device) if is_cuda else None  # type: ignore[no-untyped-call]
        # TF32 has the 11 bits of float16, and is off unless the program asked for it. There is no other way to be sure
        # than this setting of the whole process.
        torch.set_float32_matmul_precision("highest")

    @property
    def name(self) -> str:
        """ "torch", its version, and the kind of device."""
        kind = torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else self._device.type
        return f"torch {torch.__version__}/{kind}"

    @property
    def threads(self) -> int:
        """Those that wait for a device: see `at_once`."""
        return _LANES * len(self._devices)

    @property
    def warnings(self) -> Sequence[str]:
        """See `Backend.warnings`."""
        return [text for device in self._devices for text in device.warnings]

    def at_once(self, specs: Iterable[SplitSpec]) -> int:
        """See `Backend.at_once`: as many as the devices' memory holds of the largest."""
        largest = max((device_bytes(spec, CHUNK) for spec in specs), default=0)
        limit = min(device.limit for device in self._devices)
        if largest > limit:
            needed = largest // (1 << 20) + 1
            raise RequestError(
                "the memory of the GPU is too small for the largest weight",
                expected=f"at least {largest} bytes",
                found=f"{limit}",
                fix=f"give --max-vram {needed}MiB or more, or --device cpu",
            )
        return len(self._devices) * (min(_LANES, limit // largest) if largest else _LANES)

    def pinned(self, memory: memoryview) -> AbstractContextManager[None]:
        """See `Backend.pinned`: copies of locked pages run beside the computing, and twice as fast."""
        return self._home.pinned(memory)

    def with_threads(self, threads: int) -> TorchBackend:
        """See `Backend.with_threads`: a lane of one device; they are dealt out in turn."""
        return TorchBackend(self._devices, next(self._turns))

    def split(self, weight: memoryview, a: memoryview, b: memoryview, spec: SplitSpec) -> SplitStats:
        """See `Backend.split`. Where the device's memory is too small the CPU does it, and `warnings` say so."""
        found = self._try(lambda chunk: self._split(weight, a, b, spec, chunk), spec)
        return self._home.cpu.split(weight, a, b, spec) if found is None else found

    def refit(self, difference: memoryview, a: memoryview, b: memoryview, spec: SplitSpec) -> None:
        """See `Backend.refit`, and `split`."""
        spec = replace(spec, dtype="F32", passes=None)
        if self._try(lambda chunk: self._split(difference, a, b, spec, chunk, near=True), spec) is None:
            self._home.cpu.refit(difference, a, b, spec)

    def correct(self, difference: memoryview, a: memoryview, b: memoryview, spec: SplitSpec) -> bool:
        """See `Backend.correct`, and `split`."""
        done = self._try(lambda chunk: self._correct(difference, a, b, spec, chunk), spec)
        return self._home.cpu.correct(difference, a, b, spec) if done is None else done

    def _try(self, work: Callable[[int], Done], spec: SplitSpec) -> Done | None:
        """`work` with so many values widened at a time; None, and a warning, where there is no memory for it."""
        device = self._home
        attempts: list[tuple[Callable[[], AbstractContextManager[None]], int]] = [
            (device.beside_others, CHUNK),
            (device.alone, _SMALL_CHUNK),
        ]
        for claim, chunk in attempts:
            with claim(), torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
                try:
                    return work(chunk)
                except torch.OutOfMemoryError:
                    pass  # leaving this block drops what the attempt holds
        device.warnings.append(f"{spec.name}: too large for the memory of {self._device}, split by the CPU instead")
        return None

    def _correct(self, difference: memoryview, a: memoryview, b: memoryview, spec: SplitSpec, chunk: int) -> bool:
        dtype = _DTYPES[spec.adapter_dtype]
        values = self._on_device(difference, (spec.rows, spec.cols), torch.float32)
        start_a, start_b = self._on_device(a, spec.a_shape, dtype), self._on_device(b, spec.b_shape, dtype)
        found = correct(Matrix(values, chunk=chunk), start_a.float(), start_b.float(), spec.scaling)
        if found is None:
            return False
        made = [part.to(dtype).contiguous() for part in found]
        if not all(bool(torch.isfinite(part).all()) for part in made):
            return False
        self._send_back(((a, made[0]), (b, made[1]), (difference, values)))
        return True

    def workspace_bytes(self, spec: SplitSpec, threads: int) -> int:
        """See `Backend.workspace_bytes`: what the CPU takes where it has to do the work."""
        cpu = self._home.cpu
        return cpu.workspace_bytes(spec, cpu.threads)

    def refit_workspace_bytes(self, spec: SplitSpec, threads: int) -> int:
        """See `workspace_bytes`."""
        cpu = self._home.cpu
        return cpu.refit_workspace_bytes(spec, cpu.threads)

    def _split(
        self, weight: memoryview, a: memoryview, b: memoryview, spec: SplitSpec, chunk: int, *, near: bool = False
    ) -> SplitStats:
        values = self._on_device(weight, (spec.rows, spec.cols), _DTYPES[spec.dtype])
        start = self._on_device(a, spec.a_shape, _DTYPES[spec.adapter_dtype]) if near else None
        made_a, made_b, stats = split_values(values, spec, self._home.warnings.append, chunk, start)
        self._send_back(((a, made_a), (b, made_b), (weight, values)))
        return stats

    def _on_device(self, data: memoryview, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=dtype, device=self._device)
        _as_bytes(tensor).copy_(torch.frombuffer(data.cast("B"), dtype=torch.uint8), non_blocking=True)
        return tensor

    def _send_back(self, results: Iterable[tuple[memoryview, torch.Tensor]]) -> None:
        for place, made in results:
            torch.frombuffer(place.cast("B"), dtype=torch.uint8).copy_(_as_bytes(made), non_blocking=True)
        if self._stream is not None:
            self._stream.synchronize()


def split_values(
    values: torch.Tensor, spec: SplitSpec, note: Note, chunk: int = CHUNK, start: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, SplitStats]:
    """Split a weight where it lies: `values` (rows × cols) become the residual.

    Args:
        note: takes what the user should know of.
        chunk: values that are widened at a time.
        start: the A of a matrix near by, to begin the search at.

    Returns:
        A (rank × in) and B (out × rank) in the adapter's dtype, and the statistics.

    Raises:
        WeightError: see `Backend.split`.
    """
    matrix = Matrix(values, chunk=chunk)
    factors = None if start is None else follow(matrix, start.float())
    if factors is None:
        factors = factorize(matrix, spec, note)
    left, right = _as_stored(factors, spec)
    exponent = int(np.frexp(factors.sigma[0])[1]) - 1 if factors.sigma[0] > 0 else 0
    norm, error = matrix.at(exponent).subtract(left, right, spec.scaling)
    if not np.isfinite(error):
        raise WeightError("the weight has a residual that overflows its dtype", fix="exclude the module")
    a, b = (left, right.T) if spec.fan_in_fan_out else (right, left.T)
    dtype = _DTYPES[spec.adapter_dtype]
    stats = SplitStats.of(factors.sigma.tolist(), norm, error, factors.estimated_deficit, factors.passes)
    return a.to(dtype).contiguous(), b.to(dtype).contiguous(), stats


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor. In a file, and so in its buffer, a value may lie anywhere."""
    return tensor.view(-1).view(torch.uint8)


def _as_stored(factors: Factors, spec: SplitSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Left and right with σ/s shared out as a square root, signs fixed, rounded to what will be stored; float32.

    The largest entry of each row of A is positive. Factors of a bfloat16 weight keep its 8 bits in whatever dtype they
    are stored, so that the residual is an exact product of bfloat16 (see cpp/split.cpp).

    Raises:
        WeightError: a factor overflows the adapter's dtype.
    """
    side = factors.left if spec.fan_in_fan_out else factors.right
    largest = side.gather(1, side.abs().argmax(1, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0)
    shared = np.sqrt(factors.sigma / spec.scaling)
    stored = []
    for values, scale in (
        (factors.left, shared),
        (factors.right, np.divide(shared, factors.length, out=np.zeros_like(shared), where=shared > 0)),
    ):
        scaled = values * sign * torch.from_numpy(scale).to(values)[:, None]
        if spec.dtype == "BF16":
            scaled = scaled.bfloat16().float()
        scaled = scaled.to(_DTYPES[spec.adapter_dtype]).float()
        if not bool(torch.isfinite(scaled).all()):
            raise WeightError(
                "the weight gives adapter factors that overflow the adapter's dtype",
                fix="repair the checkpoint, or exclude the module",
            )
        stored.append(scaled)
    return stored[0], stored[1]
