"""The command `pissa-convert`. Only this module prints, exits, or handles signals."""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from pissa_convert import __version__
from pissa_convert.errors import PissaError, RequestError

if TYPE_CHECKING:
    from types import FrameType

    from pissa_convert.engine.run import ProgressCallback
    from pissa_convert.planning import Plan
    from pissa_convert.report import Report, Timings

_SIZE_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_SIZE_UNITS |= {f"{unit}i": 1024 ** (power + 1) for power, unit in enumerate("KMGT")}

TARGETS = ("pissa",)
_SPLITTING = ("pissa",)
_APPLIES_TO = {
    "rank": _SPLITTING,
    "alpha": _SPLITTING,
    "rslora": _SPLITTING,
    "target_modules": _SPLITTING,
    "exclude_modules": _SPLITTING,
    "adapter_dtype": _SPLITTING,
    "passes": _SPLITTING,
}
"""The targets that each option means something for; options not named here are common to all."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RequestError(message, fix=f"see {self.prog} --help")


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?|)B?", text, re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 800MB or 1.5GiB")
    number, unit = match.groups()
    return int(float(number) * _SIZE_UNITS[unit.capitalize()])


def _passes(text: str) -> int | str:
    return text if text == "auto" else int(text)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="pissa-convert",
        description="PiSSA as file surgery: split a safetensors model into a residual model and its principal "
        "adapter, tensor by tensor, in the memory of a few matrices. Interrupted at any moment, the same command "
        "continues.",
        epilog="example: pissa-convert Llama-3.1-8B/ l8-pissa/ --to pissa --rank 64",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("source", metavar="SOURCE", help="folder of a Hugging Face model; never written to")
    parser.add_argument("dest", metavar="DEST", help="folder to make")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("--to", required=True, choices=TARGETS, help="what to make")
    common = parser.add_argument_group("for every target")
    common.add_argument("--plan", action="store_true", help="print what would be done, write nothing")
    common.add_argument("--seed", type=int, metavar="N", help="of all randomness (default 0)")
    common.add_argument("--threads", type=int, metavar="N", help="default: every CPU this process may use")
    common.add_argument("--max-memory", type=_size, metavar="SIZE", help="peak of memory to stay under, as in 2GiB")
    common.add_argument("--overwrite", action="store_true", help="replace an earlier conversion in DEST")
    common.add_argument("--quiet", action="store_true", help="no progress and no closing lines")
    common.add_argument("--log-json", metavar="FILE", help="write the run's report to FILE")
    split = parser.add_argument_group("for --to pissa")
    split.add_argument("--rank", type=int, metavar="R", help="singular directions in the adapter (default 16)")
    split.add_argument("--alpha", type=float, metavar="A", help="lora_alpha (default: the rank, so that s = 1)")
    split.add_argument("--rslora", action="store_true", help="s = alpha/√rank instead of alpha/rank")
    split.add_argument(
        "--target-modules",
        nargs="+",
        metavar="M",
        help="all-linear (default), a regular expression for whole module names, or names or name endings, as in PEFT",
    )
    split.add_argument("--exclude-modules", nargs="+", metavar="M", help="what to leave as it is, in the same forms")
    split.add_argument(
        "--adapter-dtype", metavar="DTYPE", help="float32 (default), bfloat16 or float16, of the adapter's file"
    )
    split.add_argument(
        "--passes", type=_passes, metavar="N", help="passes over each weight; auto (default) stops at 0.1%% of error"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0 done, 1 failed and resumable, 2 the request was wrong."""
    try:
        _run(vars(_parser().parse_args(arguments)))
    except PissaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("error: interrupted; run the same command again to continue", file=sys.stderr)
        return 1
    except BrokenPipeError:
        return 1
    return 0


def _run(given: dict[str, Any]) -> None:
    to = given["to"]
    for name, targets in _APPLIES_TO.items():
        if name in given and to not in targets:
            raise RequestError(f"--{name.replace('_', '-')} does not apply to --to {to}")
    only_plan, quiet, log = (given.pop(name, None) for name in ("plan", "quiet", "log_json"))
    overwrite = given.pop("overwrite", False)
    from pissa_convert.targets import parse_targets

    for name in ("target_modules", "exclude_modules"):
        if name in given:
            given[name] = parse_targets(given[name])
    signal.signal(signal.SIGTERM, _interrupt)
    from pissa_convert import api

    if only_plan:
        _print_plan(api.plan(**given))
        return
    progress = None if quiet or not sys.stderr.isatty() else _progress_bar()
    report = api.convert(**given, overwrite=overwrite, progress=progress)
    if log is not None:
        try:
            with open(log, "w", encoding="utf-8") as file:
                file.write(json.dumps(report.as_json(), indent=2) + "\n")
        except OSError as error:
            raise PissaError(f"cannot write the report: {error.strerror}", file=log) from error
    if not quiet:
        _print_report(report)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _progress_bar() -> ProgressCallback:
    from tqdm import tqdm

    bar: tqdm[NoReturn] | None = None

    def show(done: int, total: int, timings: Timings) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm(total=total, initial=done, unit="B", unit_scale=True, dynamic_ncols=True)
        bar.set_postfix_str(f"bound by {timings.bottleneck}", refresh=False)
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    return show


def _amount(nbytes: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"


def _print_plan(plan: Plan) -> None:
    """The plan on stdout: it is what was asked for, so it can be piped."""
    from pissa_convert.estimate import estimate_seconds

    width = max(len(decision.tensor) for decision in plan.decisions)
    for decision in plan.decisions:
        print(f"{decision.action.value:6} {decision.tensor:{width}}  {decision.reason}")
    for skipped in plan.checkpoint.skipped:
        print(f"{'skip':6} {skipped.path:{width}}  {skipped.reason}")
    split = list(plan.splits)
    split_bytes = sum(step.end - step.begin for step in split)
    compute = estimate_seconds(plan)
    print(
        f"""
split      {len(split)} of {len(plan.decisions)} tensors, {_amount(split_bytes)} of {_amount(plan.source_bytes)}
adapter    {plan.adapter.name}, rank {plan.options.rank}, {_amount(plan.adapter.size)}
disk       {sum(plan.output_sizes.values())} bytes in {len(plan.output_sizes)} files
memory     {plan.memory.peak} bytes at peak ({_amount(plan.memory.budget)} in flight at most)
time       about {compute:.0f} s of computing with {plan.backend}, beside moving {_amount(plan.source_bytes)}"""
    )


def _print_report(report: Report) -> None:
    if report.complete_before:
        print(f"{report.dest} is complete already; every digest fits", file=sys.stderr)
        return
    timings = report.timings
    peak = f", peak memory {_amount(report.peak_memory)}" if report.peak_memory else ""
    print(
        f"""{"continued and finished" if report.resumed else "finished"} {report.dest} in {report.wall_seconds:.1f} s: \
{report.tensors} weights split{peak}
read {_amount(timings.source_bytes)} in {timings.read_seconds:.1f} s, computed {timings.compute_seconds:.1f} s, \
wrote {_amount(timings.written_bytes)} in {timings.write_seconds:.1f} s, all at once; bound by {timings.bottleneck}
W = W_res + s·B·A within {report.relative_error:.1e} of ‖W‖; \
a full SVD would capture at most about {report.estimated_deficit:.2%} more
the residual needs its adapter: load {report.dest} with PEFT and subfolder="pissa_init\"""",
        file=sys.stderr,
    )
