"""`--ray`: the shards of a model as tasks of a Ray cluster that shares a file system.

This process plans (in a task, so that the machine that plans is like those that work), holds the destination's lock
and journal, names what tasks have made, and commits all that makes the folder load. Ray hands out shards as tasks come
free, and does those of a worker or node that died again elsewhere.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pissa_convert import __version__
from pissa_convert.engine.files import take_name
from pissa_convert.engine.ledger import Ledger
from pissa_convert.engine.shard_task import ShardDone, make_shard
from pissa_convert.engine.work import ModelPlan, Shard
from pissa_convert.engine.workers import MakeLanes
from pissa_convert.errors import ConversionError, PissaError, RequestError
from pissa_convert.linalg.native import usable_cpus
from pissa_convert.options import RunOptions
from pissa_convert.plans.requests import choose_backend, plan_request

if TYPE_CHECKING:
    from pissa_convert.engine.journal import Entry
    from pissa_convert.linalg import Backend

_RETRIES = 3
"""Deaths of a task's worker or node after which another begins it again."""

_THREADS = 4
"""Of a task by default: enough for the disk not to wait, and few enough for several tasks on a node."""


_PATHS = ("adapter", "base_gguf", "base", "init")
"""Options that name files: a task has another working folder."""


@dataclass
class RayWorkers:
    """Tasks of a cluster that this process is connected to.

    Attributes:
        options: threads and memory of each task; with device "cuda" each has a GPU.
        warnings: see `Workers.warnings`.
    """

    options: RunOptions
    warnings: list[str] = field(default_factory=list)

    def plan(self, source: Path, dest: Path, to: str, options: Mapping[str, Any]) -> Any:
        """See `plan_request`."""
        known = {name: os.path.abspath(value) if name in _PATHS else value for name, value in options.items()}
        places = os.path.abspath(source), os.path.abspath(dest)
        return self._get(self._remote(_plan, {}).remote(*places, to, known, self.options))

    def work(self, plan: ModelPlan, make_lanes: MakeLanes, remaining: Sequence[Shard], ledger: Ledger) -> None:
        """See `Workers.work`."""
        import ray

        task = self._remote(_make, {"memory": plan.memory.peak, "scheduling_strategy": "SPREAD"})
        numbers = {shard.name: number for number, shard in enumerate(plan.shards)}
        shared = ray.put(plan)
        pending = {
            task.remote(shared, make_lanes, numbers[work.plan.name], ledger.entries_of(work.plan), self.options): work
            for work in remaining
        }
        try:
            while pending:
                ready, _ = ray.wait(list(pending))
                for reference in ready:
                    work = pending.pop(reference)
                    self._commit(plan, work, self._get(reference, work.plan.source.path), ledger)
        finally:
            for reference in pending:
                ray.cancel(reference, force=True)

    def _commit(self, plan: ModelPlan, work: Shard, done: ShardDone, ledger: Ledger) -> None:
        for entry in done.entries:
            ledger.add(work.plan, entry)
        ledger.commit(work.plan, done.digest, done.source_digest, partial(take_name, plan.dest / work.plan.name))
        for each in fields(done.timings):
            total = getattr(ledger.timings, each.name) + getattr(done.timings, each.name)
            setattr(ledger.timings, each.name, total)
        self.warnings.extend(done.warnings)
        ledger.advance(work.plan.source.size - work.offset)

    def _remote(self, function: Any, options: Mapping[str, Any]) -> Any:
        import ray

        gpus = 1 if self.options.device == "cuda" else 0
        threads = self.options.threads
        return ray.remote(function).options(num_cpus=threads, num_gpus=gpus, max_retries=_RETRIES, **options)

    @staticmethod
    def _get(reference: Any, file: Path | None = None) -> Any:
        import ray

        try:
            return ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, PissaError):
                raise error.cause from None
            if "failed to import" in str(error.cause):
                raise ConversionError(
                    "a node of the cluster cannot import pissa_convert",
                    found=str(error.cause).strip().splitlines()[-1].strip(),
                    fix=f"install pissa-convert {__version__} on every node, then run the same command again",
                ) from error
            raise
        except ray.exceptions.RayError as error:
            raise ConversionError(
                "the cluster has lost a task again and again",
                file=file,
                found=str(error).splitlines()[0],
                fix="look at the memory of its nodes, then run the same command again to continue",
            ) from error


@contextmanager
def connect(address: str, options: RunOptions) -> Iterator[RayWorkers]:
    """Workers of the cluster at `address`, or with "local" of one that is started on this machine for as long.

    Raises:
        RequestError: Ray is not installed, nothing answers there, or the options are none of a task's.
    """
    if options.device not in ("auto", "cpu", "cuda"):
        raise RequestError("Ray chooses each task's GPU", found=f"--device {options.device}", fix="give --device cuda")
    try:
        import ray
    except ImportError as error:
        raise RequestError("--ray needs Ray", fix="pip install 'pissa-convert[ray]'") from error
    threads = options.threads or min(_THREADS, usable_cpus())
    options = replace(options, threads=threads, device="cuda" if options.device == "cuda" else "cpu")
    is_ours = not ray.is_initialized()
    if is_ours:
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if address == "local":
            quiet |= {"num_cpus": max(threads, usable_cpus()), "include_dashboard": False}
        try:
            _check_answers(address)
            ray.init(address=address, **quiet)
        except (OSError, ValueError, RuntimeError) as error:  # ConnectionError is an OSError
            fix = "give the address of a running cluster, or --ray local"
            raise RequestError("no Ray cluster answers", found=address, fix=fix) from error
    try:
        yield RayWorkers(options)
    finally:
        if is_ours:
            ray.shutdown()


def _check_answers(address: str) -> None:
    """Ray itself tries for minutes."""
    host, _, port = address.rpartition("/")[2].rpartition(":")
    if host:
        socket.create_connection((host, int(port)), timeout=10).close()


def _plan(source: str, dest: str, to: str, options: dict[str, Any], run_options: RunOptions) -> Any:
    """In a task: what to do."""
    return plan_request(source, dest, to, options, run_options, choose_backend(to, options, run_options))


def _make(
    plan: ModelPlan, make_lanes: MakeLanes, number: int, before: Sequence[Entry], run_options: RunOptions
) -> ShardDone:
    """In a task: one shard."""
    return make_shard(plan, make_lanes, _same_backend(plan.head, run_options), number, before)


def _same_backend(head: Mapping[str, Any], options: RunOptions) -> Backend:
    """The backend that was planned with, so that it does not matter which machine makes a shard.

    Raises:
        ConversionError: this machine does not have it.
    """
    if head["version"] != __version__:
        raise _other_machine("the version of pissa-convert", head["version"], __version__)
    kind, _, kernel = head["backend"].partition("/")
    if kind == "native":
        os.environ["PISSA_CONVERT_KERNEL"] = kernel
    try:
        backend = choose_backend(head["to"], {}, options)
    except RequestError as error:
        raise _other_machine("the device", head["backend"], error.what) from error
    if kind != "numpy" and backend.name != head["backend"]:
        raise _other_machine("the device", head["backend"], backend.name)
    return backend


def _other_machine(what: str, expected: str, found: str) -> ConversionError:
    return ConversionError(
        f"a node of the cluster differs in {what}",
        expected=expected,
        found=f"{found} on {os.uname().nodename}",
        fix="use nodes that are alike, then run the same command again to continue",
    )
