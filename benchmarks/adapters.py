"""`--to lora` and `--to merged` against PEFT's ways, on a checkpoint of Llama-3.2-1B's shape.

    python benchmarks/adapters.py [--folder FOLDER] [--layers N] [--rank R] [--repeat N] [--json FILE]

lora      from the two adapter folders; PEFT loads the residual and the trained adapter, and saves it with
          path_initial_model_for_weight_conversion. Both results are then cast to bfloat16, as a server does.
merged    the original and that LoRA; PEFT loads both, merge_and_unload, save_pretrained. And `cp -r` with sync.

"Trained" is the initial adapter moved by 3 % of itself. Everything that is measured is a process of its own, in turns,
medians; its peak is the kernel's VmHWM. FOLDER (default: a new one here) needs four times the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import median

from convert import Row, Run, checkpoint, run, size

TRAIN = """
import shutil, sys, torch
from safetensors.torch import load_file, save_file
init, dest = sys.argv[1:]
shutil.copytree(init, dest)
torch.manual_seed(0)
factors = load_file(f"{init}/adapter_model.safetensors")
moved = {name: value + 0.03 * value.norm() / value.numel() ** 0.5 * torch.randn_like(value)
         for name, value in factors.items()}
save_file(moved, f"{dest}/adapter_model.safetensors")
"""
PEFT_LORA = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
residual, trained, dest = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(residual, dtype=torch.bfloat16)
model = PeftModel.from_pretrained(model, trained, is_trainable=True)
model.save_pretrained(dest, path_initial_model_for_weight_conversion=residual + "/pissa_init")
"""
PEFT_MERGE = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model, lora, dest = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16), lora)
model.merge_and_unload().save_pretrained(dest)
"""
CAST = """
import json, sys, torch
from safetensors import safe_open
init, trained, result = (safe_open(f"{folder}/adapter_model.safetensors", "pt") for folder in sys.argv[1:])
error = norm = 0.0
for key in result.keys():
    if ".lora_A." not in key:
        continue
    pair = key, key.replace("lora_A", "lora_B")
    (a0, b0), (a1, b1) = ([file.get_tensor(name).double() for name in pair] for file in (init, trained))
    a, b = (result.get_tensor(name).bfloat16().double() for name in pair)
    change = b1 @ a1 - b0 @ a0
    error += float(torch.linalg.matrix_norm(change - b @ a) ** 2)
    norm += float(torch.linalg.matrix_norm(change) ** 2)
print((error / norm) ** 0.5)
"""


def ours(*arguments: str) -> Run:
    return run(sys.executable, "-m", "pissa_convert", *arguments, "--quiet")


def in_turns(commands: dict[str, list[str]], results: dict[str, Path], repeat: int) -> dict[str, list[Run]]:
    """Each command `repeat` times; what it makes is kept from the last time."""
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for _ in range(repeat):
        for name, command in commands.items():
            shutil.rmtree(results[name], ignore_errors=True)
            runs[name].append(run(*command))
    return runs


def against(claim: str, runs: dict[str, list[Run]], faster: float, smaller: float) -> Iterator[Row]:
    """Ratios of the medians of time and of the peaks."""
    seconds = {name: median(each.seconds for each in found) for name, found in runs.items()}
    peaks = {name: max(each.peak for each in found) for name, found in runs.items()}
    took = f"{seconds['peft']:.1f} s against {seconds['ours']:.1f} s"
    yield Row(f"{claim}: times faster than PEFT", seconds["peft"] / seconds["ours"], faster, True, took)
    held = f"{peaks['peft'] / 1e6:.0f} MB against {peaks['ours'] / 1e6:.0f} MB"
    yield Row(f"{claim}: times less memory than PEFT", peaks["peft"] / peaks["ours"], smaller, True, held)


def measure(folder: Path, layers: int, rank: int, repeat: int) -> Iterator[Row]:
    """All of it, from the split on."""
    python, module = sys.executable, [sys.executable, "-m", "pissa_convert"]
    split, trained = folder / "split", folder / "trained"
    with checkpoint(folder, "Llama-3.2-1B", layers) as source:
        ours(str(source), str(split), "--to", "pissa", "--rank", str(rank))
        run(python, "-c", TRAIN, str(split / "pissa_init"), str(trained))
        made = {"ours": folder / "lora", "peft": folder / "peft-lora"}
        lora = {
            "ours": [*module, str(trained), str(made["ours"]), "--to", "lora", "--init", str(split), "--quiet"],
            "peft": [python, "-c", PEFT_LORA, str(split), str(trained), str(made["peft"])],
        }
        runs = in_turns(lora, made, repeat)
        yield from against("lora", runs, 1.5, 3)
        adapters = 2 * (trained / "adapter_model.safetensors").stat().st_size
        peak = max(each.peak for each in runs["ours"])
        detail = f"{peak / 1e6:.0f} MB; the two have {adapters / 1e6:.0f} MB"
        yield Row("lora: memory in times both adapters", peak / adapters, 3, False, detail)
        cast = {
            name: float(run(python, "-c", CAST, str(split / "pissa_init"), str(trained), str(path)).stdout)
            for name, path in made.items()
        }
        detail = f"relative error of ΔW {cast['ours']:.1e} against {cast['peft']:.1e}"
        yield Row("lora: times closer in bfloat16", cast["peft"] / cast["ours"], 3, True, detail)
        shutil.rmtree(split)
        merged = {"ours": folder / "merged", "peft": folder / "peft-merged", "cp": folder / "copy"}
        merges = {
            "ours": [*module, str(source), str(merged["ours"]), "--to", "merged", "--adapter", str(made["ours"])],
            "peft": [python, "-c", PEFT_MERGE, str(source), str(made["ours"]), str(merged["peft"])],
            "cp": ["sh", "-c", 'cp -r "$0" "$1" && sync', str(source), str(merged["cp"])],
        }
        runs = in_turns(merges, merged, repeat)
        yield from against("merged", runs, 2, 3)
        seconds = {name: median(each.seconds for each in found) for name, found in runs.items()}
        detail = f"{seconds['ours']:.1f} s against {seconds['cp']:.1f} s for {size(source) / 1e9:.1f} GB"
        yield Row("merged: time in times `cp -r` and sync", seconds["ours"] / seconds["cp"], 5, False, detail)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=given.folder or "."))
    rows = []
    try:
        for row in measure(folder.resolve(), given.layers, given.rank, given.repeat):
            row.show()
            rows.append(row)
    finally:
        shutil.rmtree(folder)
    if given.json is not None:
        given.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    main()
