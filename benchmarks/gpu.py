"""The torch backend on a GPU: one matrix against PEFT's layer path, and a model against moving its bytes.

    python benchmarks/gpu.py [layers] [stream] [--device cuda] [--shapes 4096x4096,4096x14336] [--ranks 16,64,128]
                             [--repeat 5] [--folder FOLDER] [--layers N] [--json FILE]

layers  Weights that lie on the GPU already: W in, W_res, A and B out, all there. Peer: what PEFT does for
        `pissa_niter_N`: W.float(), torch.svd_lowrank(q=r, niter=N), scale, residual, cast back. In turns, medians.
        Deficit: as in benchmarks/split.py, whose matrices these are. VRAM: the peak of a split, and the bound that
        --max-vram is compared with. Bars: 5 times niter_4's speed, no larger deficit than niter_16's.
stream  Llama-3.1-8B's shape with N layers (default: all 32, 16 GB; FOLDER needs twice that) split at rank 64, and the
        same engine with lanes that only copy each weight to the GPU and back: disk → GPU → disk. Bar: 1.15 times.

With --device cpu it shows that it runs, and measures nothing of interest.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from split import CODES, captured, made, peer

from pissa_convert import plan
from pissa_convert.engine.lanes import MakeTransform
from pissa_convert.engine.run import carry_out, run
from pissa_convert.engine.workers import InProcess
from pissa_convert.linalg import SplitSpec, SplitStats, tensor_key
from pissa_convert.linalg.torch_backend import TorchBackend, split_values
from pissa_convert.linalg.torch_device import Device, find_devices
from pissa_convert.linalg.torch_matrix import CHUNK
from pissa_convert.linalg.torch_schedule import device_bytes
from pissa_convert.plans.split_plan import Plan
from pissa_convert.plans.steps import Split


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(device: torch.device, work: Callable[[], Any]) -> tuple[float, Any]:
    synchronize(device)
    started = time.perf_counter()
    value = work()
    synchronize(device)
    return time.perf_counter() - started, value


def measure_layer(
    full: torch.Tensor, sigma: torch.Tensor, rank: int, device: torch.device, repeat: int
) -> dict[str, Any]:
    """One matrix in bfloat16, by us and by PEFT, in turns."""
    weight = full.bfloat16().to(device)
    spec = SplitSpec(*weight.shape, CODES[weight.dtype], rank, 1.0, "F32", False, None, tensor_key(0, "benchmark"))
    energy = float(sigma[:rank].square().sum())
    times: dict[str, list[float]] = {"ours": [], "niter_4": [], "niter_16": []}
    deficit: dict[str, float] = {}
    peak = 0
    for turn in range(repeat + 1):  # the first warms up
        work = weight.clone()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device) - work.nbytes
        seconds, (a, b, stats) = timed(device, lambda work=work: split_values(work, spec, print))
        if device.type == "cuda":
            peak = max(peak, torch.cuda.max_memory_allocated(device) - before)
        deficit["ours"] = 1 - captured(full.bfloat16(), a.cpu(), b.cpu()) / energy
        times["ours"].append(seconds)
        for niter in (4, 16):
            seconds, found = timed(device, lambda niter=niter: peer(weight, rank, niter))
            times[f"niter_{niter}"].append(seconds)
            deficit[f"niter_{niter}"] = 1 - float(found.square().sum()) / energy
        if turn == 0:
            times = {name: [] for name in times}
    return {
        "shape": list(weight.shape),
        "rank": rank,
        "seconds": {name: median(values) for name, values in times.items()},
        "deficit": deficit,
        "passes": stats.passes,
        "vram": peak,
        "vram_bound": device_bytes(spec, CHUNK),
    }


def layers(arguments: argparse.Namespace, device: Device) -> list[dict[str, Any]]:
    print(f"{'matrix':12} {'rank':>4} {'ours ms':>8} {'×niter_4':>8} {'×niter_16':>9} {'deficit':>8} {'niter_16':>8}"
          f" {'passes':>6} {'VRAM MB':>8} {'bound':>6}")  # fmt: skip
    rows = []
    for shape in arguments.shapes.split(","):
        full, sigma = made(*map(int, shape.split("x")))
        for rank in map(int, arguments.ranks.split(",")):
            row = measure_layer(full, sigma, rank, device.device, arguments.repeat)
            seconds, deficit = row["seconds"], row["deficit"]
            rows.append(row)
            print(
                f"{shape:12} {rank:4} {seconds['ours'] * 1e3:8.2f} {seconds['niter_4'] / seconds['ours']:8.1f}"
                f" {seconds['niter_16'] / seconds['ours']:9.1f} {deficit['ours']:8.3%} {deficit['niter_16']:8.3%}"
                f" {row['passes']:6} {row['vram'] / 1e6:8.0f} {row['vram_bound'] / 1e6:6.0f}",
                flush=True,
            )
    return rows


class MovingLane:
    """Copies a weight to the device and back, and leaves it as it was."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, step: Split, file: Path, buffer: memoryview) -> SplitStats:
        """See `Transform`."""
        with torch.cuda.stream(self._stream):
            host = torch.frombuffer(buffer[step.parts[0]], dtype=torch.uint8)
            host.copy_(host.to(self._device, non_blocking=True), non_blocking=True)
            if self._stream is not None:
                self._stream.synchronize()
        return SplitStats.blank(step.spec.rank)


def stream(arguments: argparse.Namespace, device: Device) -> dict[str, Any]:
    """The same plan carried out with and without computing, in turns."""
    backend = TorchBackend([device])

    @contextmanager
    def moving(work: Plan, _: Any) -> Iterator[MakeTransform]:
        yield lambda threads: MovingLane(device.device)

    arguments.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    source, dest = folder / "source", folder / "dest"
    generate = Path(__file__).with_name("generate.py")
    command = [sys.executable, str(generate), "Llama-3.1-8B", str(source), "--layers", str(arguments.layers)]
    subprocess.run(command, check=True)
    times: dict[str, list[float]] = {"split": [], "move": []}
    try:
        for _ in range(arguments.repeat):
            for name in times:
                work = plan(source, dest, rank=64, device=str(device.device))
                started = time.perf_counter()
                if name == "split":
                    run(work, InProcess(backend))
                else:
                    carry_out(work, moving, InProcess(backend))
                times[name].append(time.perf_counter() - started)
                shutil.rmtree(dest)
        size = sum(path.stat().st_size for path in source.iterdir())
    finally:
        shutil.rmtree(folder)
    seconds = {name: median(values) for name, values in times.items()}
    ratio = seconds["split"] / seconds["move"]
    print(f"{size / 1e9:.1f} GB: split {seconds['split']:.1f} s, moved {seconds['move']:.1f} s, {ratio:.2f} times")
    return {"bytes": size, "seconds": seconds, "ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=["layers", "stream"], default=["layers", "stream"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shapes", default="4096x4096,4096x14336,14336x4096,8192x28672")
    parser.add_argument("--ranks", default="16,64,128")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path())
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    is_cpu = arguments.device == "cpu"
    device = Device(torch.device("cpu"), 1 << 40) if is_cpu else find_devices(0, None, is_needed=True)[0]
    name = "the CPU, by torch" if is_cpu else torch.cuda.get_device_name(0)
    print(f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    results: dict[str, Any] = {"device": name, "torch": torch.__version__, "cuda": torch.version.cuda}
    if "layers" in arguments.what:
        results["layers"] = layers(arguments, device)
    if "stream" in arguments.what:
        results["stream"] = stream(arguments, device)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
