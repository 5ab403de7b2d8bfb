"""The whole command against `cp`, against the official way, and against its own promises of memory and disk.

    python benchmarks/convert.py [speed] [official] [memory] [--folder FOLDER] [--layers N] [--repeat N] [--json FILE]

speed     `pissa-convert SRC DST` and `cp -r SRC DST && sync`, in turns, medians, on Llama-3.1-8B's shape with N layers
          (8: 5.6 GB). Cold: the source was dropped from the page cache before each run; warm: it was read just before.
official  load the model, PEFT `pissa_niter_4` on all linear layers, save adapter, unload, save: Llama-3.2-1B's shape.
          Ours as it is by default, which is more accurate, and with the fewest --passes that are no less accurate than
          niter_4 on 14 weights. Deficit: the share of the best rank-16 energy that A and B as stored do not capture.
memory    peak resident set on 70B's shape with 1 to 4 layers, under --max-memory 1GiB, on 405B's shape, and of
          `--to qpissa`; and what --plan says beforehand of memory and disk, for all 80 layers of 70B, too.

Everything that is measured is a process of its own; its peak is the kernel's VmHWM. FOLDER (default: a new folder in
the current one) needs 33 GB for `memory`, 17 GB for `speed`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median

import torch
from safetensors import safe_open
from split import captured, exact_sigma

GENERATE = str(Path(__file__).with_name("generate.py"))
OFFICIAL = """
import sys, torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
source, dest, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="pissa_niter_4", target_modules="all-linear",
                    task_type="CAUSAL_LM")
model = get_peft_model(model, config)
model.peft_config["default"].init_lora_weights = True
model.save_pretrained(dest + "/pissa_init")
model.unload().save_pretrained(dest)
"""
RANK = 16
MODULES = [
    f"model.layers.{layer}.{module}"
    for layer in (0, 8)
    for module in (*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down")))
]
"""Whose deficits are measured."""

GIB = 1 << 30


@dataclass(frozen=True)
class Run:
    """Seconds and peak resident bytes of a process."""

    seconds: float
    peak: int
    stdout: str = ""


@dataclass(frozen=True)
class Row:
    """One measured claim: `value` is compared with `bar`."""

    claim: str
    value: float
    bar: float
    at_least: bool
    detail: str

    @property
    def met(self) -> bool:
        return self.value >= self.bar if self.at_least else self.value <= self.bar

    def show(self) -> None:
        sign = "≥" if self.at_least else "≤"
        mark = "met" if self.met else "NOT MET"
        print(f"{self.claim:58} {self.value:8.3f}  {sign} {self.bar:<6g} {mark:8} {self.detail}", flush=True)


def run(*command: str) -> Run:
    """Run a command to its end."""
    peak = 0
    # Installed packages come with bytecode: a checkout that must not write any would be compiled in every run.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    pipe = subprocess.PIPE
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment) as process:
        status = Path(f"/proc/{process.pid}/status")
        done = threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.02):
                try:
                    match = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
                except OSError:
                    return
                peak = max(peak, int(match[1]) * 1024) if match else peak

        watcher = threading.Thread(target=watch)
        watcher.start()
        stdout, stderr = process.communicate()
        seconds = time.perf_counter() - started
        done.set()
        watcher.join()
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}\n{stderr}")
    return Run(seconds, peak, stdout)


def convert(source: Path, dest: Path, *options: str) -> Run:
    target = () if "--to" in options else ("--to", "pissa")
    command = [sys.executable, "-m", "pissa_convert", str(source), str(dest), *target, *options]
    return run(*command) if "--plan" in options else run(*command, "--quiet")


@contextmanager
def checkpoint(folder: Path, shape: str, layers: int, *options: str) -> Iterator[Path]:
    """A made checkpoint, removed afterwards."""
    source = folder / f"{shape}-{layers}"
    run(sys.executable, GENERATE, shape, str(source), "--layers", str(layers), *options)
    try:
        yield source
    finally:
        shutil.rmtree(source)


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def settle(source: Path, dest: Path, *, cold: bool) -> None:
    """No result, nothing waiting to be written, and the source in the page cache or not."""
    shutil.rmtree(dest, ignore_errors=True)
    os.sync()
    for file in source.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        if cold:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            while os.read(descriptor, 8 << 20):
                pass
        os.close(descriptor)
    time.sleep(1)


def planned(source: Path, dest: Path, *options: str) -> dict[str, int]:
    """Bytes of memory and on disk that --plan says."""
    said = convert(source, dest.with_name("unmade"), "--plan", *options).stdout
    return {key: int(re.search(rf"^{key} +(\d+) bytes", said, re.M)[1]) for key in ("memory", "disk")}  # type: ignore[index]


def promises(label: str, source: Path, dest: Path, found: Run, *options: str) -> Iterator[Row]:
    """What --plan says of a conversion that was made just now, against what was measured."""
    plan, written = planned(source, dest, *options), size(dest)
    off = abs(plan["memory"] / found.peak - 1)
    yield Row(f"--plan's peak is off by, {label}", off, 0.2, False, f"predicted {plan['memory'] / GIB:.3f} GiB")
    yield Row(f"--plan's disk bytes are off by, {label}", abs(plan["disk"] - written), 0, False, f"{written} bytes")


def speed(folder: Path, layers: int, repeat: int) -> Iterator[Row]:
    with checkpoint(folder, "Llama-3.1-8B", layers) as source:
        dest, nbytes = folder / "result", size(source)
        label = f"8B × {layers} layers, {nbytes / 1e9:.1f} GB"
        contestants: dict[str, Callable[[], Run]] = {
            "cp": lambda: run("sh", "-c", 'cp -r "$0" "$1" && sync', str(source), str(dest)),
            "ours": lambda: convert(source, dest),
        }
        for cold in (True, False):
            times: dict[str, list[float]] = {name: [] for name in contestants}
            for _ in range(repeat):
                for name, contestant in contestants.items():
                    settle(source, dest, cold=cold)
                    found = contestant()
                    times[name].append(found.seconds)
            ours, copy = median(times["ours"]), median(times["cp"])
            runs = " ".join(f"{a:.1f}/{b:.1f}" for a, b in zip(times["ours"], times["cp"], strict=True))
            yield Row(
                f"wall time × cp -r && sync, {label}, {'cold' if cold else 'warm'}",
                ours / copy,
                1.15,
                False,
                f"{ours:.1f} s, cp {copy:.1f} s, {nbytes / ours / 1e9:.2f} GB/s (ours/cp: {runs})",
            )
        yield from promises(label, source, dest, found)  # ours comes last
        shutil.rmtree(dest)


def official(folder: Path, layers: int, repeat: int) -> Iterator[Row]:
    with checkpoint(folder, "Llama-3.2-1B", 16) as source:
        dest = folder / "result"
        settle(source, dest, cold=False)
        theirs = run(sys.executable, "-c", OFFICIAL, str(source), str(dest), str(RANK))
        spectra = [exact_sigma(weight) for weight in sampled(source)]
        bar = deficits(source, dest, spectra)
        passes = None
        for options in ([], ["--passes", "N"]):
            if options:
                passes = enough_passes(source, dest, spectra, bar)
                options[1] = str(passes)
            runs = []
            for _ in range(repeat):
                settle(source, dest, cold=False)
                runs.append(convert(source, dest, "--rank", str(RANK), *options))
            ours = sorted(runs, key=lambda item: item.seconds)[len(runs) // 2]
            found = deficits(source, dest, spectra)
            how = f"--passes {passes}, equal accuracy" if options else "as it is by default"
            yield Row(
                f"times faster than PEFT pissa_niter_4, 1B shape, {how}",
                theirs.seconds / ours.seconds,
                8,
                True,
                f"{ours.seconds:.1f} s and {ours.peak / GIB:.2f} GiB, "
                f"PEFT {theirs.seconds:.1f} s and {theirs.peak / GIB:.2f} GiB; "
                f"deficit {mean(found):.3%} (worst {max(found):.3%}), PEFT {mean(bar):.3%} ({max(bar):.3%})",
            )
            yield from promises("Llama-3.2-1B", source, dest, runs[-1], "--rank", str(RANK), *options)
        shutil.rmtree(dest)


def enough_passes(source: Path, dest: Path, spectra: list[torch.Tensor], bar: list[float]) -> int:
    """The fewest passes with which our deficits, on average and at worst, are not above PEFT's."""
    for passes in itertools.count(1):
        shutil.rmtree(dest, ignore_errors=True)
        convert(source, dest, "--rank", str(RANK), "--passes", str(passes))
        found = deficits(source, dest, spectra)
        if mean(found) <= mean(bar) and max(found) <= max(bar):
            return passes
    raise AssertionError


def sampled(source: Path) -> Iterator[torch.Tensor]:
    """The weights of two layers."""
    with safe_open(source / "model.safetensors", "pt") as file:
        for module in MODULES:
            yield file.get_tensor(f"{module}.weight")


def deficits(source: Path, dest: Path, spectra: list[torch.Tensor]) -> list[float]:
    """1 − captured/Σσ² over the leading singular values of these weights, from A and B as stored (scaling 1)."""
    found = []
    with safe_open(dest / "pissa_init" / "adapter_model.safetensors", "pt") as file:
        for module, weight, sigma in zip(MODULES, sampled(source), spectra, strict=True):
            a, b = (file.get_tensor(f"base_model.model.{module}.lora_{side}.weight") for side in "AB")
            found.append(1 - captured(weight, a, b) / float(sigma[:RANK].square().sum()))
    return found


def memory(folder: Path, layers: int, repeat: int) -> Iterator[Row]:
    dest = folder / "result"

    def measure(name: str, source: Path, bar: float, *options: str, peaks: list[int] | None = None) -> Iterator[Row]:
        found = convert(source, dest, *options)
        if peaks is not None:
            peaks.append(found.peak)
        label = " ".join([name, *options])
        yield Row(f"peak GiB, {label}", found.peak / GIB, bar, False, f"{found.seconds:.1f} s")
        yield from promises(label, source, dest, found, *options)
        shutil.rmtree(dest)

    peaks: list[int] = []
    for count in (1, 2, 3, 4):
        with checkpoint(folder, "Llama-3.1-70B", count) as source:
            yield from measure(f"70B × {count}", source, 1.6, peaks=peaks)
            if count == 1:
                yield from measure(f"70B × {count}", source, 1.0, "--max-memory", "1GiB")
    spread = max(abs(peak * len(peaks) / sum(peaks) - 1) for peak in peaks)
    yield Row("peak's spread around its mean, 70B × 1 to 4", spread, 0.05, False, "")
    quantised = ("--to", "qpissa", "--rank", "64")
    with checkpoint(folder, "Llama-3.1-70B", 1) as source:
        yield from measure("70B × 1", source, 4, *quantised)
    with checkpoint(folder, "Llama-3.1-70B", 80, "--empty") as source:
        plan = planned(source, dest, *quantised)
        detail = f"from {size(source) / 1e9:.1f} GB; {plan['memory'] / GIB:.3f} GiB of memory"
        yield Row("GB on disk, 70B as QPiSSA, planned", plan["disk"] / 1e9, 45, False, detail)
    with checkpoint(folder, "Llama-3.1-405B", 1) as source:
        yield from measure("405B × 1", source, 4.5)


PARTS = {"speed": speed, "official": official, "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="speed, official, memory; default: all")
    parser.add_argument("--folder", type=Path, default=Path())
    parser.add_argument("--layers", type=int, default=8, help="of `speed` (8)")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each (3)")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for part in arguments.parts or PARTS:
            for row in PARTS[part](Path(folder), arguments.layers, arguments.repeat):
                row.show()
                rows.append(row)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([{**asdict(row), "met": row.met} for row in rows], indent=1) + "\n")
    sys.exit(not all(row.met for row in rows))


if __name__ == "__main__":
    main()
