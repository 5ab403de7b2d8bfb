"""Does an adapter belong on a GGUF? As for a model's folder, names and shapes fit original and residual alike."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import numpy as np

from pissa_convert.engine.factors import FactorFile
from pissa_convert.errors import RequestError
from pissa_convert.formats.adapter_folder import AdapterFolder
from pissa_convert.formats.gguf_types import TYPES
from pissa_convert.plans.gguf.adapter import AdaptedTensor
from pissa_convert.plans.gguf.model import BaseGguf
from pissa_convert.transforms.delta import Array, Product
from pissa_convert.transforms.ggml import can_decode, decode
from pissa_convert.transforms.repetition import REPEATED, distance_from_part

_PROBES = 3
"""Weights that are read, the smallest ones."""

_VALUES = 1 << 21
"""Values that are read of each, at most."""


def check_gguf_base(base: BaseGguf, adapter: AdapterFolder, tensors: Sequence[AdaptedTensor]) -> None:
    """Refuse a principal adapter, trained or not, on its original model: it holds a part of the model twice then.

    Raises:
        RequestError: it is one.
    """
    probes = [tensor for tensor in tensors if len(tensor.shape) == 2 and can_decode(base.tensors[tensor.name].dtype)]
    probes.sort(key=lambda tensor: (base.tensors[tensor.name].nbytes, tensor.name))
    found = []
    with FactorFile(adapter.file.path) as factors:
        for tensor in probes[:_PROBES]:
            a, b = tensor.factors(lambda module: factors.product(adapter.pairs[module]))
            distance = distance_from_part(_first_rows(base, tensor.name), Product(b, a))
            if distance is not None:
                found.append(distance)
    if found and median(found) < REPEATED:
        raise RequestError(
            "the base still holds what the adapter took out of it: it is the original of a principal adapter",
            file=base.file.path,
            tensor=probes[0].name,
            expected=f"‖W·Aᵀ − s·B·A·Aᵀ‖ / ‖s·B·A·Aᵀ‖ of about 1, as in a residual, or more (at least {REPEATED})",
            found=f"{median(found):.3f}",
            fix="give what the training began with as --init of --to lora or --to gguf, or a GGUF of the residual",
        )


def _first_rows(base: BaseGguf, name: str) -> Array:
    """As many rows as make a good sample."""
    tensor = base.tensors[name]
    rows, columns = tensor.shape
    count = min(rows, max(1, _VALUES // columns))
    with FactorFile(base.homes[name]) as file:
        data = file.raw(tensor, 0, count * TYPES[tensor.dtype].row_bytes(columns))
    return decode(data, tensor.dtype, columns).astype(np.float64)
