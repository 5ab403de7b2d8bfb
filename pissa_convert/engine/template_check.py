"""Is a template GGUF of this model? Names and shapes are the same for many, so values must tell, and the order of rows.

A few rows of every kind of tensor are compared, in the first, a middle and the last layer. What training or a split
changes leaves the values alike; another model's, or rows in another order, have nothing in common with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from pissa_convert.engine.factors import FactorFile
from pissa_convert.engine.model_rows import ModelRows
from pissa_convert.errors import RequestError
from pissa_convert.formats.gguf_types import TYPES
from pissa_convert.formats.safetensors import TensorInfo
from pissa_convert.plans.gguf.model import BaseGguf
from pissa_convert.plans.gguf.names import Layout
from pissa_convert.plans.gguf.origins import Origin, as_rows, kinds_of
from pissa_convert.plans.gguf.planning import check_decodable
from pissa_convert.transforms.ggml import Array, decode

_SAMPLE = 1 << 16
"""Values of a tensor that are compared, about."""

_ALIKE = 0.2
"""Correlation of the values of a matrix: 0.9 and more for a quantised template or a trained model, 0.5 and
more for the residual of a split, and about 1/√_SAMPLE for what has nothing in common."""

_APART = 0.5
"""Relative difference of a vector, a norm's or a bias."""


def proven_origins(template: BaseGguf, origins: Mapping[str, Origin], layout: Layout) -> dict[str, Origin]:
    """The origins with the order of their rows and what is added, as the template's values show.

    Raises:
        RequestError: a tensor of the template has other values than the model's.
    """
    proven = dict(origins)
    with ModelRows() as model, FactorFile(template.file.path) as file:
        for names in kinds_of(origins).values():
            found = [_proven(name, template, origins[name], layout, model, file) for name in _spread(names)]
            heads, added = found[0].heads is not None, found[0].added
            for name, other in zip(_spread(names), found, strict=True):
                if (other.heads is not None, other.added) != (heads, added):
                    raise _stranger(name, origins[name], file)
            for name in names:
                wanted = _heads(name, layout) if heads else None
                proven[name] = replace(origins[name], heads=wanted, added=added)
    return proven


def _spread(names: list[str]) -> list[str]:
    return list(dict.fromkeys((names[0], names[len(names) // 2], names[-1])))


def _heads(name: str, layout: Layout) -> int | None:
    block, kind = (int(name.split(".")[1]), name.split(".")[2]) if name.startswith("blk.") else (0, "")
    return layout.rotated(kind, block)


def _proven(
    name: str, template: BaseGguf, origin: Origin, layout: Layout, model: ModelRows, file: FactorFile
) -> Origin:
    tensor = template.tensors[name]
    check_decodable(tensor, file.path)
    candidates = [origin] if layout.is_known else list(_candidates(name, origin, layout))
    distances = [_distance(tensor, candidate, model, file) for candidate in candidates]
    best = int(np.argmin(distances))
    # A bias may have been zero before the training.
    if not distances[best] < 1.0 and not name.endswith(".bias"):
        raise _stranger(name, origin, file)
    return candidates[best]


def _stranger(name: str, origin: Origin, file: FactorFile) -> RequestError:
    return RequestError(
        "the template is not a GGUF of this model: its values have nothing in common with the model's",
        file=file.path,
        tensor=name,
        expected=f"those of {origin.parts[0][1].name}",
        fix="give a GGUF of the model itself, or of the one that it was trained from, as --base-gguf",
    )


def _candidates(name: str, origin: Origin, layout: Layout) -> Iterator[Origin]:
    """What converters are known to do with a tensor."""
    yield origin
    heads = _heads(name, layout)
    if heads and origin.rows % (2 * heads) == 0:
        yield replace(origin, heads=heads)
    if name.endswith("norm.weight"):
        yield replace(origin, added=1.0)


def _distance(tensor: TensorInfo, origin: Origin, model: ModelRows, file: FactorFile) -> float:
    """Below 1 where the values of template and model are alike."""
    rows, columns = as_rows(tensor.shape)
    group = origin.group
    count = min(rows, origin.rows, max(1, _SAMPLE // columns // group) * group)
    width = TYPES[tensor.dtype].row_bytes(columns)
    stored = decode(file.raw(tensor, 0, count * width), tensor.dtype, columns)
    return _apart(stored, model.rows(origin, 0, count), is_vector=columns == 1)


def _apart(first: Array, second: Array, is_vector: bool) -> float:
    one, other = (values.astype(np.float64).ravel() for values in (first, second))
    if not is_vector:
        one, other = one - one.mean(), other - other.mean()
    norms = float(np.linalg.norm(one)), float(np.linalg.norm(other))
    if not any(norms):
        return 0.0
    if is_vector:
        return float(np.linalg.norm(one - other)) / max(norms) / _APART
    correlation = float(one @ other) / (norms[0] * norms[1]) if all(norms) else 0.0
    return _ALIKE / correlation if correlation > 0 else np.inf
