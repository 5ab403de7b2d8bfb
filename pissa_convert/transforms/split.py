"""Split one weight: W becomes W_res in place, and A and B appear beside it."""

from __future__ import annotations

from pathlib import Path

from pissa_convert.errors import WeightError
from pissa_convert.linalg import Backend, SplitStats
from pissa_convert.plans.steps import Split


def split_step(step: Split, file: Path, buffer: memoryview, backend: Backend) -> SplitStats:
    """Split the weight that lies at the front of `buffer`, laid out as `step.parts` says.

    Raises:
        WeightError: the weight holds NaN or infinity, or its residual does not fit its dtype; names file and tensor.
    """
    weight, a, b = (buffer[part] for part in step.parts)
    try:
        return backend.split(weight, a, b, step.spec)
    except WeightError as error:
        raise WeightError(
            error.what, file=file, tensor=step.tensor, expected=error.expected, found=error.found, fix=error.fix
        ) from error
