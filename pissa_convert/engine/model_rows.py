"""Rows of a Hugging Face model's tensors as a GGUF has them, read by position."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import numpy as np

from pissa_convert.engine.factors import FactorFile
from pissa_convert.errors import WeightError
from pissa_convert.formats.gguf_types import TYPES
from pissa_convert.plans.gguf.names import permute
from pissa_convert.plans.gguf.origins import Origin, as_rows
from pissa_convert.transforms.ggml import Array, decode


class ModelRows:
    """A model's files, each opened once. A context manager; threads may read at once after `open_all`."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._files: dict[Path, FactorFile] = {}

    def __enter__(self) -> ModelRows:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _file(self, path: Path) -> FactorFile:
        if path not in self._files:
            self._files[path] = self._stack.enter_context(FactorFile(path))
        return self._files[path]

    def open_all(self, origins: list[Origin]) -> None:
        """Open every file that these come from."""
        for origin in origins:
            for path, _ in origin.parts:
                self._file(path)

    def rows(self, origin: Origin, top: int, bottom: int) -> Array:
        """Rows `top`:`bottom` of all parts one after the other, float32; they lie in one part and are whole groups.

        Raises:
            WeightError: they hold NaN or infinity; names file and tensor.
        """
        path, tensor = origin.parts[top // origin.rows]
        columns = as_rows(tensor.shape)[1]
        width = TYPES[tensor.dtype].row_bytes(columns)
        first = top % origin.rows
        data = self._file(path).raw(tensor, first * width, (first + bottom - top) * width)
        values = decode(data, tensor.dtype, columns)
        if not np.isfinite(values).all():
            raise WeightError("holds NaN or infinity", file=path, tensor=tensor.name, fix="repair the checkpoint")
        if origin.heads is not None:
            values = permute(values, (bottom - top) // origin.group)
        return values + np.float32(origin.added) if origin.added else values
