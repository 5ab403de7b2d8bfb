"""The destination folder before work starts: empty, ours and interrupted, ours and complete, or not ours."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from contextlib import suppress
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from pissa_convert.engine.files import PARTIAL, sync_folder
from pissa_convert.engine.journal import Journal, journal_name
from pissa_convert.engine.reading import check_file
from pissa_convert.errors import RequestError
from pissa_convert.formats.manifest import manifest_name, read_manifest


class Work(Protocol):
    """What a plan, of whichever target, says of its destination."""

    @property
    def dest(self) -> Path:
        """The folder to make, or that of the one file to make."""

    @property
    def alone(self) -> str | None:
        """The name of the one file to make, in a folder that may hold others; None where the folder is the result."""

    @property
    def output_sizes(self) -> Mapping[str, int]:
        """Bytes of every file of the result."""

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """What must be unchanged for a partial result to be continued."""


class State(Enum):
    """What `begin` found and did: the journal of a fresh or a resumed run is ready; a complete one has none."""

    FRESH = "fresh"
    RESUMED = "resumed"
    COMPLETE = "complete"


def check(plan: Work, overwrite: bool) -> None:
    """Refuse, before anything is written, a destination that holds other things or has no room.

    Raises:
        RequestError: DEST is not empty and not ours, or the disk is too small.
    """
    dest = plan.dest
    names = os.listdir(dest) if dest.exists() else []
    ours = journal_name(plan.alone) in names or manifest_name(plan.alone) in names
    if plan.alone is not None:
        _check_file(dest / plan.alone, ours)
    elif names and not ours:
        raise RequestError(
            "DEST is not empty and holds no earlier conversion",
            file=dest,
            found=", ".join(sorted(names)[:3]),
            fix="choose a new folder, or empty this one" + (" (--overwrite only replaces conversions)" * overwrite),
        )
    _check_space(plan)


def _check_file(path: Path, ours: bool) -> None:
    if path.is_dir():
        raise RequestError("DEST is a folder", file=path, expected="the name of a file to make")
    if os.path.lexists(path) and not ours:
        raise RequestError(
            "DEST exists and was not made by pissa-convert",
            file=path,
            expected=f"{manifest_name(path.name)} beside it",
            fix="choose a new name, or remove it",
        )


def _check_space(plan: Work) -> None:
    existing = next(folder for folder in (plan.dest, *plan.dest.parents) if folder.exists())
    disk = os.statvfs(existing)
    present = 0
    for name in plan.output_sizes:
        for path in (plan.dest / name, plan.dest / (name + PARTIAL)):
            if path.is_file():
                present += path.stat().st_blocks * 512
    needed = sum(plan.output_sizes.values()) - present
    available = disk.f_bavail * disk.f_frsize
    if needed > available:
        raise RequestError(
            "the disk is too small",
            file=plan.dest,
            expected=f"{needed} bytes free",
            found=f"{available}",
            fix=f"make room for {needed - available} bytes more, or choose another disk",
        )


def begin(plan: Work, journal: Journal, overwrite: bool) -> State:
    """Decide, under the journal's lock, whether this run starts, continues, or finds all done.

    Raises:
        RequestError: an interrupted run was made with other options or sources; the message names what changed.
    """
    if overwrite:
        _remove_earlier(plan, journal)
        journal.restart()
    elif journal.entries:
        _check_fingerprint(plan, journal.entries[0].get("fingerprint", {}))
        return State.RESUMED
    elif (plan.dest / manifest_name(plan.alone)).exists():
        return State.COMPLETE
    journal.append({"fingerprint": plan.fingerprint, "files": sorted(plan.output_sizes)}, durable=True)
    sync_folder(plan.dest)
    return State.FRESH


def verify_complete(
    plan: Work, head: Mapping[str, Any], sources: Mapping[str, Path], derived: Collection[str] = ()
) -> Mapping[str, Mapping[str, Any]]:
    """Check that a finished destination is what a plan would make, by the digests of every file on both sides.

    Args:
        head: what the plan says of the conversion as a whole.
        sources: the files that it reads, by their names in the manifest.
        derived: names of records there that are of no file.

    Returns:
        The manifest's entry of each weight or module.

    Raises:
        RequestError: it is not; the message names the first difference.
    """
    dest = plan.dest
    manifest = read_manifest(dest / manifest_name(plan.alone))
    fix = "choose a new name for DEST, or replace it with --overwrite"
    for name, value in head.items():
        if manifest.head[name] != json.loads(json.dumps(value)):
            raise RequestError(
                f"DEST holds a finished conversion with another {name}",
                file=dest,
                expected=json.dumps(manifest.head[name]),
                found=json.dumps(value),
                fix=fix,
            )
    read = [(sources.get(name, Path(name)), record) for name, record in manifest.source.items() if name not in derived]
    for path, record in [*read, *((dest / name, record) for name, record in manifest.output.items())]:
        for finding in check_file(path, record):
            raise RequestError("a file differs from what DEST's manifest says", found=finding, fix=fix)
    return manifest.tensors


def _check_fingerprint(plan: Work, before: dict[str, Any]) -> None:
    now = json.loads(json.dumps(plan.fingerprint))
    for name in {**now, **before}:
        if before.get(name) != now.get(name):
            raise RequestError(
                f"DEST holds an interrupted conversion in which {name} was different",
                file=plan.dest,
                expected=_describe(before.get(name)),
                found=_describe(now.get(name)),
                fix="run it again as it was, or start over with --overwrite",
            )


def _describe(value: object) -> str:
    return "none" if value is None else json.dumps(value)


def _remove_earlier(plan: Work, journal: Journal) -> None:
    """Remove what an earlier conversion wrote, and nothing else; what makes the folder load goes first."""
    dest, manifest = plan.dest, manifest_name(plan.alone)
    names: set[str] = {manifest}
    if journal.entries:
        names.update(journal.entries[0].get("files", []))
    # There may be no manifest, or not one that could name files.
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        names.update(json.loads((dest / manifest).read_bytes())["output"])
    for name in sorted(names, key=lambda name: (name not in (manifest, "config.json"), name)):
        parts = PurePosixPath(name).parts
        if not parts or parts[0] == "/" or ".." in parts:
            continue  # a manifest is only a file: it cannot point us outside
        for path in (dest / name, dest / (name + PARTIAL)):
            if not any(parent.is_symlink() for parent in path.parents if dest in parent.parents):
                path.unlink(missing_ok=True)
