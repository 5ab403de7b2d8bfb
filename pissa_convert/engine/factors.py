"""The factors of adapters, module by module, as float64 products: read from a file, or split again from the model."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import numpy as np
from blake3 import blake3

from pissa_convert.engine.reading import open_to_read, read_exactly
from pissa_convert.errors import ConversionError, PissaError, WeightError
from pissa_convert.formats.adapter_folder import Pair
from pissa_convert.formats.manifest import FileRecord
from pissa_convert.formats.safetensors import TensorInfo
from pissa_convert.linalg import Backend
from pissa_convert.plans.init_planning import Derivation, Init
from pissa_convert.transforms.check import widened
from pissa_convert.transforms.delta import Array, Product


class FactorFile:
    """An adapter's tensors, read by position. A context manager; threads may read at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = open_to_read(path)

    def __enter__(self) -> FactorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def bytes(self, begin: int, count: int) -> memoryview:
        """`count` bytes of the file."""
        data = memoryview(bytearray(count))
        read_exactly(self._descriptor, begin, data, self.path)
        return data

    def raw(self, tensor: TensorInfo, begin: int, end: int) -> memoryview:
        """Bytes `begin`:`end` of a tensor's data."""
        return self.bytes(tensor.begin + begin, end - begin)

    def values(self, tensor: TensorInfo) -> Array:
        """A tensor in float64.

        Raises:
            WeightError: it holds NaN or infinity.
        """
        return _finite(self.raw(tensor, 0, tensor.nbytes), tensor, self.path)

    def rows(self, tensor: TensorInfo, top: int, bottom: int) -> Array:
        """Some rows of a matrix in float64.

        Raises:
            WeightError: they hold NaN or infinity.
        """
        width = tensor.nbytes // tensor.shape[0]
        part = replace(tensor, shape=(bottom - top, *tensor.shape[1:]))
        return _finite(self.raw(tensor, top * width, bottom * width), part, self.path)

    def product(self, pair: Pair) -> Product:
        """s·B and A of a module."""
        return Product(pair.scaling * self.values(pair.b), self.values(pair.a))

    def bias(self, pair: Pair) -> Array:
        """s·b of a module whose B has a bias."""
        assert pair.bias is not None
        return pair.scaling * self.values(pair.bias)


def _finite(data: memoryview, tensor: TensorInfo, path: Path) -> Array:
    values = widened(data, tensor.dtype, tensor.shape)
    if not np.isfinite(values).all():
        fix = "the training diverged, or the file is damaged: take an earlier checkpoint"
        raise WeightError("holds NaN or infinity", file=path, tensor=tensor.name, fix=fix)
    return values


class InitFactors:
    """The initial adapter's products, in the order of its modules and, where they are derived, once only."""

    def __init__(self, init: Init, backend: Backend | None) -> None:
        self._init, self._backend = init, backend
        self._file = None if init.derivations else FactorFile(init.file)
        self._digest = blake3(init.header)

    def __enter__(self) -> InitFactors:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.__exit__(kind, value, trace)

    def product(self, pair: Pair) -> Product:
        """s·B and A of a module."""
        if self._file is not None:
            return self._file.product(pair)
        a, b = self._split(self._init.derivations[pair.module])
        for data in (a, b):
            self._digest.update(data)
        return Product(pair.scaling * _finite(b, pair.b, self._init.file), _finite(a, pair.a, self._init.file))

    def bias(self, pair: Pair) -> Array:
        """s·b of a module whose B has a bias."""
        assert self._file is not None  # what --to pissa makes has none
        return self._file.bias(pair)

    def record(self) -> FileRecord:
        """The derived `adapter_model.safetensors`, all of whose modules have been asked for.

        Raises:
            ConversionError: it is not what the manifest says.
        """
        record = FileRecord(self._init.size, self._digest.hexdigest())
        if self._init.recorded not in (None, record):
            raise ConversionError(
                "the initial adapter was not found again from --base",
                file=self._init.file,
                expected=f"blake3 {self._init.recorded.digest}" if self._init.recorded else None,
                found=record.digest,
                fix="give the model that was split; where that is so, PISSA_CONVERT_KERNEL and a CPU of the same kind",
            )
        return record

    def _split(self, derivation: Derivation) -> tuple[memoryview, memoryview]:
        assert self._backend is not None
        spec, tensor = derivation.spec, derivation.tensor
        with FactorFile(derivation.shard) as shard:
            weight = shard.raw(tensor, 0, tensor.nbytes)
        width = 4 if spec.adapter_dtype == "F32" else 2
        a, b = (memoryview(bytearray(width * rows * cols)) for rows, cols in (spec.a_shape, spec.b_shape))
        try:
            self._backend.split(weight, a, b, spec)
        except WeightError as error:
            raise _named(error, derivation) from error
        return a, b


def _named(error: PissaError, derivation: Derivation) -> WeightError:
    return WeightError(
        error.what,
        file=derivation.shard,
        tensor=derivation.tensor.name,
        expected=error.expected,
        found=error.found,
        fix=error.fix,
    )
