"""One shard of the result against the source's, read side by side once, front to back."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from blake3 import blake3

from pissa_convert.engine.reading import digest_findings, open_to_read, read_exactly
from pissa_convert.errors import FormatError, PissaError
from pissa_convert.formats.adapter import adapter_keys
from pissa_convert.formats.checkpoint import check_inside
from pissa_convert.formats.manifest import FileRecord, Manifest
from pissa_convert.formats.safetensors import SafetensorsFile, TensorInfo, read_header
from pissa_convert.memory import CHUNK, chunks
from pissa_convert.options import SplitOptions
from pissa_convert.transforms.check import same_bytes, squared_error, widened

_VALUES = 1 << 20
"""Values of a weight that are compared at a time: 8 MiB in each of the few float64 arrays."""

_TOLERANCE = 1.01
"""Measured error over the recorded one. The recorded one is added up in another order, and in float32."""


class Adapter:
    """A and B of a result, read weight by weight."""

    def __init__(self, path: Path) -> None:
        """Read the file's header.

        Raises:
            FormatError: it is missing or damaged.
        """
        self.path = path
        self._tensors = {tensor.name: tensor for tensor in read_header(path).tensors}

    def factors(self, module: str) -> tuple[Any, Any]:
        """A (r × in) and B (out × r) of a module, float64.

        Raises:
            FormatError: the file does not hold them.
        """
        descriptor = open_to_read(self.path)
        try:
            a, b = (self._read(descriptor, key) for key in adapter_keys(module))
        finally:
            os.close(descriptor)
        return a, b

    def _read(self, descriptor: int, key: str) -> Any:
        tensor = self._tensors.get(key)
        if tensor is None:
            raise FormatError("the adapter lacks it", file=self.path, tensor=key)
        data = memoryview(bytearray(tensor.nbytes))
        read_exactly(descriptor, tensor.begin, data, self.path)
        return widened(data, tensor.dtype, tensor.shape)


class _Pair:
    """Source and result open side by side; every byte that is read is hashed."""

    def __init__(self, source: Path, dest: Path, seen: Callable[[int], None]) -> None:
        self._paths = source, dest
        self._descriptors: list[int] = []
        self._scratch = bytearray(CHUNK), bytearray(CHUNK)
        self.digests = blake3(), blake3()
        self._seen = seen

    def __enter__(self) -> _Pair:
        for path in self._paths:
            self._descriptors.append(open_to_read(path))
        return self

    def __exit__(self, *details: object) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)

    def read(self, begin: int, end: int) -> tuple[memoryview, memoryview]:
        """The same range of both, until the next call; ranges follow one another."""
        if end - begin > len(self._scratch[0]):
            self._scratch = bytearray(end - begin), bytearray(end - begin)
        first, second = (memoryview(scratch)[: end - begin] for scratch in self._scratch)
        for path, descriptor, view in zip(self._paths, self._descriptors, (first, second), strict=True):
            read_exactly(descriptor, begin, view, path)
        for digest, view in zip(self.digests, (first, second), strict=True):
            digest.update(view)
        self._seen(2 * (end - begin))
        return first, second

    def same(self, begin: int, end: int) -> bool:
        """Whether a range is equal; all of it is read in any case, so that it is hashed."""
        equal = True
        for span in chunks(begin, end):
            equal &= same_bytes(*self.read(*span))
        return equal


def compare_shard(
    source: Path, dest: Path, name: str, manifest: Manifest, adapter: Adapter, seen: Callable[[int], None]
) -> tuple[list[PissaError], list[float]]:
    """Compare the shard `name` of both folders, and both with their records.

    Returns:
        What differs, and the measured relative error of each split weight.
    """
    findings: list[PissaError] = []
    errors: list[float] = []
    sides = ((source / name, manifest.source[name]), (dest / name, manifest.output[name]))
    try:
        check_inside(source, source / name)
        layout = read_header(source / name)
        for path, record in sides:
            size = path.stat().st_size if path.is_file() else "no file"
            if size != record.size:
                raise FormatError("the size differs", file=path, expected=f"{record.size} bytes", found=size)
        with _Pair(source / name, dest / name, seen) as pair:
            _compare_tensors(layout, dest / name, pair, manifest, adapter, findings, errors)
        for (path, record), digest in zip(sides, pair.digests, strict=True):
            findings += digest_findings(path, record, FileRecord(record.size, digest.hexdigest()))
    except PissaError as error:
        findings.append(error)
    return findings, errors


def _compare_tensors(
    layout: SafetensorsFile,
    path: Path,
    pair: _Pair,
    manifest: Manifest,
    adapter: Adapter,
    findings: list[PissaError],
    errors: list[float],
) -> None:
    if not pair.same(0, len(layout.header)):
        findings.append(FormatError("the header differs from SOURCE's", file=path))
    split = {name for name, entry in manifest.tensors.items() if entry["file"] == layout.path.name}
    for missing in sorted(split - {tensor.name for tensor in layout.tensors}):
        findings.append(FormatError("SOURCE's shard lacks it", file=layout.path, tensor=missing))
    for tensor in layout.tensors:
        if tensor.name not in split:
            if not pair.same(tensor.begin, tensor.end):
                findings.append(FormatError("it was copied and differs from SOURCE's", file=path, tensor=tensor.name))
            continue
        entry = manifest.tensors[tensor.name]
        error = _split_error(tensor, entry, pair, adapter, SplitOptions(**_scaling(manifest)).scaling)
        errors.append(error)
        # NaN compares false: it must not pass.
        if not error <= _TOLERANCE * entry["relative_error"]:
            findings.append(
                FormatError(
                    "W_res + s·B·A is not SOURCE's W",
                    file=path,
                    tensor=tensor.name,
                    expected=f"‖W − (W_res + s·B·A)‖/‖W‖ of {entry['relative_error']:.2e}",
                    found=f"{error:.2e}",
                )
            )


def _scaling(manifest: Manifest) -> dict[str, Any]:
    return {name: manifest.head["options"][name] for name in ("rank", "alpha", "rslora")}


def _split_error(tensor: TensorInfo, entry: Mapping[str, Any], pair: _Pair, adapter: Adapter, scaling: float) -> float:
    """‖W − (W_res + s·B·A)‖ / ‖W‖ of one weight."""
    rows, cols = tensor.shape
    a, b = adapter.factors(entry["module"])
    left, right = (a.T, b.T) if entry["fan_in_fan_out"] else (b, a)
    if (left.shape[0], right.shape[1]) != (rows, cols) or left.shape[1] != right.shape[0]:
        raise FormatError("A and B do not fit its shape", file=adapter.path, tensor=tensor.name, expected=(rows, cols))
    row_bytes = tensor.nbytes // rows
    step = max(1, _VALUES // cols)
    error = norm = 0.0
    for top in range(0, rows, step):
        count = min(step, rows - top)
        begin = tensor.begin + top * row_bytes
        weight, residual = (
            widened(view, tensor.dtype, (count, cols)) for view in pair.read(begin, begin + count * row_bytes)
        )
        sums = squared_error(weight, residual, scaling * left[top : top + count], right)
        error, norm = error + sums[0], norm + sums[1]
    return math.sqrt(error / norm) if norm else math.sqrt(error)
