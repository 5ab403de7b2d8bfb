"""The one error family. Each error renders as a single line a user can act on.

A message says what is wrong, in which file and tensor, what was expected, what was found, and what to do::

    model.safetensors: tensor 'a.weight': data is cut short: expected 4096 bytes, found 4000; download the file again

The library raises these and never prints or exits; the command line prints ``error: <message>`` and exits with the
class's ``exit_code``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def _one_line(text: object) -> str:
    """Control characters (names come from hostile files) never reach a terminal or break the line."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


class PissaError(Exception):
    """Base of everything this package raises on purpose.

    Args:
        what: what is wrong, a short clause.
        file: the file it was found in.
        tensor: the tensor it was found in.
        expected, found: the two values that should have agreed.
        fix: what the user can do about it.
    """

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        file: str | Path | None = None,
        tensor: str | None = None,
        expected: object = None,
        found: object = None,
        fix: str | None = None,
    ) -> None:
        self.what, self.file, self.tensor = what, file, tensor
        self.expected, self.found, self.fix = expected, found, fix
        super().__init__(self._render())

    def _render(self) -> str:
        where = [_one_line(self.file)] if self.file is not None else []
        if self.tensor is not None:
            where.append(f"tensor '{_one_line(self.tensor)}'")
        text = ": ".join([*where, _one_line(self.what)])
        comparison = [
            f"{label} {_one_line(value)}"
            for label, value in (("expected", self.expected), ("found", self.found))
            if value is not None
        ]
        if comparison:
            text += ": " + ", ".join(comparison)
        return f"{text}; {_one_line(self.fix)}" if self.fix else text


class RequestError(PissaError):
    """The request cannot be carried out as it was made; nothing was written (exit code 2)."""

    exit_code = 2


class FormatError(RequestError):
    """An input file is not what it claims to be, found from its header or layout before any work (exit code 2)."""


class WeightError(PissaError):
    """A weight's values cannot be converted (NaN, infinity, overflow); found while working (exit code 1)."""


class ConversionError(PissaError):
    """The conversion stopped while working; what is on disk can be resumed (exit code 1)."""


class DamageError(PissaError):
    """A finished conversion is not what its manifest or its source says (exit code 1).

    Attributes:
        findings: every difference that was found, each a one-line error of its own.
    """

    def __init__(self, folder: Path, findings: Sequence[PissaError]) -> None:
        self.findings = tuple(findings)
        more = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
        super().__init__(
            "the conversion and what it is compared with differ",
            file=folder,
            found=f"{findings[0]}{more}",
            fix="repair what is named, or make the conversion again with --overwrite",
        )
