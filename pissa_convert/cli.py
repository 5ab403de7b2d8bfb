"""The command `pissa-convert`: its arguments, its exit codes, its signals. `console` holds what it shows."""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from pissa_convert import __version__
from pissa_convert.errors import DamageError, PissaError, RequestError

if TYPE_CHECKING:
    from types import FrameType


_SIZE_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_SIZE_UNITS |= {f"{unit}i": 1024 ** (power + 1) for power, unit in enumerate("KMGT")}

TARGETS = ("pissa", "qpissa", "lora", "merged", "gguf")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RequestError(message, fix=f"see {self.prog} --help")


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?|)B?", text, re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 800MB or 1.5GiB")
    number, unit = match.groups()
    return int(float(number) * _SIZE_UNITS[unit.capitalize()])


def _count_or_auto(text: str) -> int | str:
    return text if text == "auto" else int(text)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="pissa-convert",
        description="PiSSA as file surgery: split a safetensors model into a residual model and its principal "
        "adapter, and turn what was trained into an ordinary LoRA or a merged model, tensor by tensor, in the memory "
        "of a few matrices. Interrupted at any moment, the same command continues.",
        epilog="example: pissa-convert Llama-3.1-8B/ l8-pissa/ --to pissa --rank 64",
        usage="%(prog)s SOURCE DEST --to {" + ",".join(TARGETS) + "} [options]\n"
        "       %(prog)s DEST --verify [--source SOURCE [--init INIT | --adapter ADAPTER | --base-gguf BASE]]",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "source", metavar="SOURCE", help="folder of a model or a trained adapter, or a GGUF; never written to"
    )
    parser.add_argument("dest", metavar="DEST", help="folder to make, or GGUF")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("--to", required=True, choices=TARGETS, help="what to make")
    _add_common(parser.add_argument_group("for every target"))
    check = parser.add_argument_group("to check a result")
    check.add_argument("--verify", action="store_true", help="compare the files of DEST with its manifest's digests")
    check.add_argument(
        "--source",
        dest="original",
        metavar="SOURCE",
        help="with --verify: compare with what was converted; a LoRA needs --init too, a merged model --adapter",
    )
    _add_splitting(parser.add_argument_group("for --to pissa: a model becomes residual and adapter"))
    _add_quantising(
        parser.add_argument_group(
            "for --to qpissa: a model becomes a 4-bit base and its adapter", "also the options of --to pissa"
        )
    )
    _add_lora(
        parser.add_argument_group(
            "for --to lora: a trained adapter becomes a LoRA for the original model",
            "also --rank K, at most K in each module, or --rank auto; without it nothing is lost",
        )
    )
    _add_merging(parser.add_argument_group("for --to merged: an adapter is added to a model", "also --dtype"))
    _add_gguf(
        parser.add_argument_group(
            "for --to gguf: an adapter or a model becomes a file for llama.cpp, DEST.gguf",
            "an adapter: also --init, with --rank, --tolerance and --uniform-rank, and --base for the base's config "
            "alone; where SOURCE is a GGUF, --to merged and --to pissa take --outtype too",
        )
    )
    return parser


def _add_merging(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--adapter", metavar="ADAPTER", help="a LoRA for an original model, or a trained adapter for its residual"
    )
    group.add_argument(
        "--exact-base",
        action="store_true",
        help="instead of an adapter: write the weights of a 4-bit base out as bitsandbytes reads them",
    )


def _add_gguf(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--base-gguf",
        metavar="BASE",
        help="a GGUF of the base model, of any type; for a model the template of its keys and tokenizer",
    )
    group.add_argument(
        "--outtype",
        metavar="T",
        help="an adapter: f16 (default), f32, bf16, q8_0; a model: template (default; for a GGUF same), f32, f16, "
        "bf16, q8_0, q5_0, q5_1, q4_0, q4_1, q2_k to q6_k",
    )


def _add_common(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--plan", action="store_true", help="print what would be done, write nothing")
    group.add_argument("--threads", type=int, metavar="N", help="default: every CPU this process may use")
    group.add_argument("--max-memory", type=_size, metavar="SIZE", help="peak of memory to stay under, as in 2GiB")
    group.add_argument(
        "--device", metavar="D", help="that splits: auto (default: a GPU if there is one), cpu, cuda, cuda:N"
    )
    group.add_argument("--max-vram", type=_size, metavar="SIZE", help="memory of each GPU to stay under")
    group.add_argument("--ray", metavar="ADDRESS", help="work on a Ray cluster that shares the files, or local")
    group.add_argument("--overwrite", action="store_true", help="replace an earlier conversion in DEST")
    group.add_argument("--quiet", action="store_true", help="no progress and no closing lines")
    group.add_argument("--log-json", metavar="FILE", help="write the run's report to FILE")


def _add_splitting(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--rank", type=_count_or_auto, metavar="R", help="directions in the adapter (default 16)")
    group.add_argument("--alpha", type=float, metavar="A", help="lora_alpha (default: the rank, so that s = 1)")
    group.add_argument("--rslora", action="store_true", help="s = alpha/√rank instead of alpha/rank")
    group.add_argument(
        "--target-modules",
        nargs="+",
        metavar="M",
        help="all-linear (default), a regular expression for whole module names, or names or name endings, as in PEFT",
    )
    group.add_argument("--exclude-modules", nargs="+", metavar="M", help="what to leave as it is, in the same forms")
    group.add_argument(
        "--adapter-dtype", metavar="DTYPE", help="float32 (default), bfloat16 or float16, of the adapter's file"
    )
    group.add_argument(
        "--passes",
        type=_count_or_auto,
        metavar="N",
        help="passes over each weight; auto (default) stops at an estimated 0.25%% of error",
    )
    group.add_argument("--seed", type=int, metavar="N", help="of all randomness (default 0)")


def _add_quantising(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--iterations",
        type=int,
        metavar="T",
        help="quantisations of each weight at most, each with a refit (default 5)",
    )
    group.add_argument("--quant", metavar="CODE", help="nf4 (default) or fp4")
    group.add_argument(
        "--double-quant",
        action=argparse.BooleanOptionalAction,
        help="store the statistics of the blocks in 8 bits (default)",
    )
    group.add_argument("--compute-dtype", metavar="DTYPE", help="bfloat16 (default), float16 or float32")
    group.add_argument(
        "--quantize-only-targets", action="store_true", help="leave linear layers without an adapter as they are"
    )
    group.add_argument("--compare-loftq", action="store_true", help="report what LoftQ's order would have reached")


def _add_lora(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--init", metavar="INIT", help="the adapter before training: the split's folder, or an adapter folder"
    )
    group.add_argument(
        "--base",
        metavar="MODEL",
        help="where that is lost: the original model, to split again (with --seed, --passes and --adapter-dtype as "
        "then, or what is left of the split's folder as --init)",
    )
    group.add_argument(
        "--tolerance", type=float, metavar="T", help="of --rank auto: each module's relative error (default 1e-3)"
    )
    group.add_argument("--uniform-rank", action="store_true", help="the same rank in every module")
    group.add_argument("--dtype", metavar="DTYPE", help="float32, bfloat16 or float16, of the result")


def _verify_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="pissa-convert",
        usage="%(prog)s DEST --verify [--source SOURCE [--init INIT | --adapter ADAPTER | --base-gguf BASE]]"
        " [--threads N] [--quiet]",
    )
    parser.add_argument("dest", metavar="DEST")
    parser.add_argument("--verify", action="store_true")
    parser.add_argument("--source", metavar="SOURCE")
    parser.add_argument("--init", metavar="INIT")
    parser.add_argument("--adapter", metavar="ADAPTER")
    parser.add_argument("--base-gguf", metavar="BASE")
    parser.add_argument("--base", metavar="MODEL")
    parser.add_argument("--threads", type=int, metavar="N")
    parser.add_argument("--quiet", action="store_true")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        Its exit code: 0 done; 1 failed (and can be resumed), or damage was found; 2 the request was wrong.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if "--verify" in arguments:
            _verify(_verify_parser().parse_args(arguments))
        else:
            _run(vars(_parser().parse_args(arguments)))
    except DamageError as error:
        for finding in error.findings:
            print(f"error: {finding}", file=sys.stderr)
        return error.exit_code
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
    if "original" in given:
        raise RequestError("--source goes with --verify", fix="give SOURCE and DEST without it to convert")
    only_plan, quiet, log = (given.pop(name, None) for name in ("plan", "quiet", "log_json"))
    overwrite = given.pop("overwrite", False)
    from pissa_convert.plans.targets import parse_targets

    for name in ("target_modules", "exclude_modules"):
        if name in given:
            given[name] = parse_targets(given[name])
    signal.signal(signal.SIGTERM, _interrupt)
    from pissa_convert import api
    from pissa_convert.console import ProgressBar, print_plan, print_report

    if only_plan:
        if "ray" in given:
            raise RequestError("--plan reads headers alone and needs no cluster", fix="leave --ray out")
        print_plan(api.plan(**given), given.get("device", "auto"))
        return
    progress = None if quiet or not sys.stderr.isatty() else ProgressBar()
    report = api.convert(**given, overwrite=overwrite, progress=progress)
    if log is not None:
        try:
            with open(log, "w", encoding="utf-8") as file:
                file.write(json.dumps(report.as_json(), indent=2) + "\n")
        except OSError as error:
            raise PissaError(f"cannot write the report: {error.strerror}", file=log) from error
    for warning in report.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if not quiet:
        print_report(report)


def _verify(given: argparse.Namespace) -> None:
    signal.signal(signal.SIGTERM, _interrupt)
    from pissa_convert import api
    from pissa_convert.console import ProgressBar, print_verification

    bar = None if given.quiet or not sys.stderr.isatty() else ProgressBar()
    found = api.verify(
        given.dest,
        given.source,
        init=given.init,
        adapter=given.adapter,
        base_gguf=given.base_gguf,
        base=given.base,
        threads=given.threads,
        progress=bar,
    )
    if not given.quiet:
        print_verification(found, given.source)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
