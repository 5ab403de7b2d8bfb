"""One matrix's split against PEFT's own layer path, side by side in one run.

    python benchmarks/split.py [--shapes 4096x4096,4096x14336] [--ranks 16,64,128] [--dtypes bfloat16] [--repeat 5]
                               [--smollm2 FOLDER] [--full-svd] [--json FILE]

Peer: what PEFT does for `pissa_niter_N`: W.float(), torch.svd_lowrank(q=r, niter=N), scale, residual, cast back.
Ours: `--passes auto`, bytes of W in, bytes of W_res, A and B out. Both on the same matrices, interleaved, medians:
PEFT's in tensors of torch's, ours in memory of the kind that the engine reads into and writes from (huge pages, used
before).
Deficit: the share of the best rank-r energy that the factors do not capture; ours from A and B as stored,
1 − (‖W‖² − ‖W − sBA‖²)/Σσ² in double, the peer's from its singular values before they are rounded.

The large matrices are made: random singular vectors, and σ_i = i^-0.15·(1 − 0.9·(i − 1)/n), the geometric mean of what
SmolLM2's linear layers have at i = 64, between its flattest (up_proj) and steepest (q_proj). They are split one at a
time by all threads.

With --smollm2 all linears of a real checkpoint are measured too (examples/smollm2.py writes
one), singular values then being those of an eigendecomposition in double. The matrices of a shape are measured
together, as a converter meets them: PEFT takes one after the other, by all threads; ours takes as many at once as there
are threads, each by one. Deficits are means; `worse` counts matrices whose deficit is above that of niter_16.

With --full-svd, PEFT's `pissa` is timed too, once: its full SVD takes minutes.

The roofline columns compare the sweeps with torch's own product in the weight's dtype, and the whole split's traffic,
each pass reading W once, with a copy: on this machine, in this run.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from safetensors.torch import load_file

from pissa_convert import _core
from pissa_convert.engine.buffers import Buffers
from pissa_convert.linalg import SplitSpec, tensor_key
from pissa_convert.linalg.native import usable_cpus

Result = tuple[_core.SplitResult, torch.Tensor, torch.Tensor]
CODES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def made(rows: int, cols: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A float32 matrix with a language model's spectrum, and its singular values."""
    generator = torch.Generator().manual_seed(rows * 31 + cols)
    size = min(rows, cols)
    index = torch.arange(size, dtype=torch.float32)
    sigma = (index + 1) ** -0.15 * (1 - 0.9 * index / size)
    left = torch.linalg.qr(torch.randn(rows, size, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(cols, size, generator=generator))[0]
    return (left * sigma) @ right.T, sigma.double()


def like_the_engine(weight: torch.Tensor) -> torch.Tensor:
    """A copy in memory of the kind that the engine's buffers are in."""
    return torch.frombuffer(Buffers(weight.nbytes).memory, dtype=weight.dtype).view(weight.shape).copy_(weight)


def exact_sigma(weight: torch.Tensor) -> torch.Tensor:
    """Singular values in double, descending."""
    wide = weight.double() if weight.shape[0] <= weight.shape[1] else weight.double().T
    return torch.linalg.eigvalsh(wide @ wide.T).flip(0).clamp(min=0).sqrt()


def captured(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> float:
    """‖W‖² − ‖W − B·A‖², from the factors as stored, in double."""
    a, b = a.double(), b.double()
    inner = sum(
        float(((weight[at : at + 1024].double() @ a.T) * b[at : at + 1024]).sum()) for at in range(0, len(b), 1024)
    )
    return 2 * inner - float(((b.T @ b) * (a @ a.T)).sum())


def peer(weight: torch.Tensor, rank: int, niter: int | None) -> torch.Tensor:
    """PEFT's steps for one layer, with a full SVD where niter is None; returns the singular values."""
    full = weight.float()
    if niter is None:
        left, sigma, rows = torch.linalg.svd(full, full_matrices=False)
        left, sigma, right = left[:, :rank], sigma[:rank], rows[:rank].T
    else:
        left, sigma, right = torch.svd_lowrank(full, q=rank, niter=niter)
    a = torch.diag(torch.sqrt(sigma)) @ right.T
    b = left @ torch.diag(torch.sqrt(sigma))
    (full - b @ a).to(weight.dtype)
    return sigma.double()


class Ours:
    """The C++ core on preallocated buffers: one matrix by all threads, or several at once by one thread each."""

    def __init__(self) -> None:
        self.whole = _core.Splitter(usable_cpus())
        self.single = [_core.Splitter(1) for _ in range(usable_cpus())]
        self.lanes = ThreadPoolExecutor(usable_cpus())

    def __call__(self, weights: Sequence[torch.Tensor], rank: int) -> tuple[float, list[Result]]:
        work = []
        for weight in weights:
            rows, cols = weight.shape
            spec = SplitSpec(rows, cols, CODES[weight.dtype], rank, 1.0, "F32", False, None, tensor_key(0, "benchmark"))
            raw = like_the_engine(weight).view(torch.int16 if weight.itemsize == 2 else torch.int32).numpy()
            a, b = (like_the_engine(torch.empty(shape)).numpy() for shape in (spec.a_shape, spec.b_shape))
            work.append((spec, raw, a, b))
        time.sleep(0.02)  # torch's threads spin for a while after its last operation: they would hold our CPUs
        started = time.perf_counter()
        if len(work) == 1:
            results = [self._split(self.whole, *work[0])]
        else:
            numbered: list[Result | None] = [None] * len(work)
            waiting = iter(enumerate(work))  # each lane takes the next as soon as it is free

            def lane(splitter: _core.Splitter) -> None:
                for index, item in waiting:
                    numbered[index] = self._split(splitter, *item)

            list(self.lanes.map(lane, self.single))
            results = [result for result in numbered if result is not None]
        return time.perf_counter() - started, results

    @staticmethod
    def _split(splitter: _core.Splitter, spec: SplitSpec, raw: Any, a: Any, b: Any) -> Result:
        stats = splitter.split(
            raw.data, spec.rows, spec.cols, spec.dtype, spec.rank, 1.0, False, a.data, b.data, "F32", 0, spec.key
        )
        return stats, torch.from_numpy(a), torch.from_numpy(b)


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    value = function()
    return time.perf_counter() - started, value


def cases(arguments: argparse.Namespace) -> Iterator[tuple[str, list[torch.Tensor], torch.Tensor | None]]:
    """Names, float32 matrices of one shape, and their singular values where these are known."""
    for shape in arguments.shapes.split(",") if arguments.shapes else []:
        rows, cols = map(int, shape.split("x"))
        weight, sigma = made(rows, cols)
        yield shape, [weight], sigma
    if arguments.smollm2 is None:
        return
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(arguments.smollm2.glob("*.safetensors")):
        tensors |= load_file(file)
    for names in (("q_proj", "o_proj"), ("k_proj", "v_proj"), ("gate_proj", "up_proj"), ("down_proj",)):
        weights = [tensor.float() for name, tensor in tensors.items() if name.split(".")[-2] in names]
        rows, cols = weights[0].shape
        yield f"smollm2 {len(weights)} of {rows}x{cols}", weights, None


def roofline(weight: torch.Tensor) -> dict[str, float]:
    """What this machine does: torch's product (GFLOP/s) and a copy of the weight (GB/s).

    torch multiplies float16 on a CPU without the hardware for it in scalar code: that is compared with float32.
    """
    if weight.dtype == torch.float16:
        weight = weight.float()
    operand = torch.ones(weight.shape[1], 1024, dtype=weight.dtype)
    target = torch.empty_like(weight)
    product = min(timed(lambda: weight @ operand)[0] for _ in range(3))
    copy = min(timed(lambda: target.copy_(weight))[0] for _ in range(3))
    return {
        "gemm_gflops": 2 * weight.numel() * 1024 / product / 1e9,
        "copy_gbs": 2 * weight.numel() * weight.itemsize / copy / 1e9,
    }


def measure(
    name: str,
    weights: list[torch.Tensor],
    energies: list[torch.Tensor],
    rank: int,
    repeat: int,
    ours: Ours,
    full_svd: bool,
) -> dict[str, Any]:
    times: dict[str, list[float]] = {"ours": [], "niter_4": [], "niter_16": []}
    deficits: dict[str, list[float]] = {}
    best = [float(energy[rank - 1]) for energy in energies]
    for _ in range(repeat):
        seconds, results = ours(weights, rank)
        times["ours"].append(seconds)
        deficits["ours"] = [1 - captured(w, a, b) / e for w, (_, a, b), e in zip(weights, results, best, strict=True)]
        for niter in (4, 16):
            seconds, sigmas = timed(lambda niter=niter: [peer(weight, rank, niter) for weight in weights])
            times[f"niter_{niter}"].append(seconds)
            deficits[f"niter_{niter}"] = [
                1 - float(sigma.square().sum()) / e for sigma, e in zip(sigmas, best, strict=True)
            ]
    if full_svd:
        times["full"] = [timed(lambda: [peer(weight, rank, None) for weight in weights])[0]]
    medians = {key: median(values) for key, values in times.items()}
    stats = [result for result, _, _ in results]
    size = weights[0].numel()
    # A pass multiplies twice, but the last only once.
    products = sum(2 * size * s.block * (2 * s.passes - 1) for s in stats if s.passes)
    faster = {f"faster_than_{key}": value / medians["ours"] for key, value in medians.items() if key != "ours"}
    return {
        "matrix": name,
        "dtype": CODES[weights[0].dtype],
        "rank": rank,
        "seconds": medians,
        **faster,
        "deficit": {key: mean(values) for key, values in deficits.items()},
        "worse_than_niter_16": sum(o > p for o, p in zip(deficits["ours"], deficits["niter_16"], strict=True)),
        "estimated_deficit": mean(s.estimated_deficit for s in stats),
        "passes": [s.passes for s in stats],
        "phases": {
            phase: sum(getattr(s, f"{phase}_seconds") for s in stats) for phase in ("sweep", "ritz", "residual")
        },
        "sweep_gflops": products / max(sum(s.sweep_seconds for s in stats), 1e-9) / 1e9,
        "traffic_gbs": sum((s.passes + 3) * size * weights[0].itemsize for s in stats) / medians["ours"] / 1e9,
        **roofline(weights[0]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="4096x4096,4096x14336,14336x4096,8192x28672")
    parser.add_argument("--ranks", default="16,64,128")
    parser.add_argument("--dtypes", default="bfloat16")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--smollm2", type=Path)
    parser.add_argument("--full-svd", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(usable_cpus())
    ours = Ours()
    print(f"kernel {ours.whole.kernel}, {usable_cpus()} threads, torch {torch.__version__}")
    print(
        f"{'matrix':24} {'dtype':5} {'rank':>4} {'ours ms':>8} {'×niter_4':>8} {'×niter_16':>9}"
        f" {'deficit':>8} {'est.':>7} {'niter_4':>8} {'niter_16':>8} {'worse':>5} {'GFLOP/s':>8} {'of GEMM':>7}"
        f" {'GB/s':>5} {'of copy':>7}"
    )
    rows = []
    for name, full, sigma in cases(arguments):
        for dtype in arguments.dtypes.split(","):
            weights = [weight.to(getattr(torch, dtype)) for weight in full]
            energies = [(exact_sigma(w) if sigma is None else sigma).square().cumsum(0) for w in weights]
            for rank in map(int, arguments.ranks.split(",")):
                row = measure(name, weights, energies, rank, arguments.repeat, ours, arguments.full_svd)
                rows.append(row)
                deficit = row["deficit"]
                print(
                    f"{name:24} {row['dtype']:5} {rank:4} {row['seconds']['ours'] * 1e3:8.1f}"
                    f" {row['faster_than_niter_4']:8.1f} {row['faster_than_niter_16']:9.1f}"
                    f" {deficit['ours']:8.3%} {row['estimated_deficit']:7.3%}"
                    f" {deficit['niter_4']:8.2%} {deficit['niter_16']:8.3%} {row['worse_than_niter_16']:5}"
                    f" {row['sweep_gflops']:8.0f} {row['sweep_gflops'] / row['gemm_gflops']:7.0%}"
                    f" {row['traffic_gbs']:5.1f} {row['traffic_gbs'] / row['copy_gbs']:7.0%}"
                    + (f"  a full SVD takes {row['faster_than_full']:.0f}×" if arguments.full_svd else ""),
                    flush=True,
                )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
