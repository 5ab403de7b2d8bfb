"""A finished LoRA against the two adapters that it was made from: is s′·B′·A′ − s·B·A what it holds?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pissa_convert.engine.factors import FactorFile
from pissa_convert.errors import FormatError, PissaError
from pissa_convert.formats.adapter_folder import AdapterFolder, open_adapter
from pissa_convert.formats.manifest import Manifest
from pissa_convert.plans.init_planning import stored_init
from pissa_convert.transforms.delta import difference, exact_norm

_TOLERANCE = 1.01
"""Measured error over the recorded one, which is put together from what was cut off and what was rounded."""

_NOISE = 1e-13
"""What float64 leaves of a difference, as a share of what was subtracted."""


def compare_lora(
    dest: Path, trained_root: Path, init_root: Path, manifest: Manifest
) -> tuple[list[PissaError], list[float]]:
    """Measure every module's ‖ΔW − B·A‖ / ‖ΔW‖ and compare it, and what was carried, with the manifest and TRAINED.

    Returns:
        What differs, and the measured relative errors.
    """
    made, trained = open_adapter(dest, "DEST"), open_adapter(trained_root, "--source")
    init = stored_init(init_root)
    findings: list[PissaError] = [
        FormatError("does not have the modules of DEST", file=path, found=", ".join(sorted(odd)[:2]))
        for path, pairs in ((trained.file.path, trained.pairs), (init.file, init.pairs))
        if (odd := pairs.keys() ^ made.pairs.keys())
    ]
    if findings:
        return findings, []
    errors = []
    files = (FactorFile(path) for path in (made.file.path, trained.file.path, init.file))
    with next(files) as new, next(files) as after, next(files) as before:
        for name, pair in made.pairs.items():
            first, second = after.product(trained.pairs[name]), before.product(init.pairs[name])
            delta = difference(first, second)
            off, norm = exact_norm(difference(delta, new.product(pair))), exact_norm(delta)
            entry = manifest.tensors.get(name, {"relative_error": 0.0})
            bound = _TOLERANCE * entry["relative_error"] * norm + _NOISE * (first.norm + second.norm)
            errors.append(off / norm if norm else 0.0)
            if not off <= bound:  # NaN compares false: it must not pass
                findings.append(_wrong(made, name, entry, errors[-1]))
        findings += _compare_carried(made, trained, new, after)
    return findings, errors


def _wrong(made: AdapterFolder, name: str, entry: Mapping[str, Any], found: float) -> FormatError:
    return FormatError(
        "B·A is not what training changed",
        file=made.file.path,
        tensor=made.pairs[name].b.name,
        expected=f"‖ΔW − B·A‖/‖ΔW‖ of {entry['relative_error']:.2e}",
        found=f"{found:.2e}",
    )


def _compare_carried(
    made: AdapterFolder, trained: AdapterFolder, new: FactorFile, old: FactorFile
) -> Iterator[FormatError]:
    for key, tensor in trained.carried.items():
        copy = made.carried.get(key)
        if copy is None or (copy.dtype, copy.shape) != (tensor.dtype, tensor.shape):
            yield FormatError("it was trained whole and is not carried over", file=made.file.path, tensor=key)
        elif new.raw(copy, 0, copy.nbytes) != old.raw(tensor, 0, tensor.nbytes):
            yield FormatError("it was carried over and differs", file=made.file.path, tensor=key)
