"""A small llama as a model and as a GGUF, adapters for it, and how results are looked at."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from adapters import tensors_of, write
from checkpoints import load_all
from gguf_models import add, finish

DYING = str(Path(__file__).parent / "faults" / "dying.py")


CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "tie_word_embeddings": False,
}


def permuted(rows: Any, heads: int) -> Any:
    width = rows.shape[0] // heads
    order = [
        head * width + half * width // 2 + i for head in range(heads) for i in range(width // 2) for half in (0, 1)
    ]
    return rows[order]


NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def small_gguf(
    model: dict[str, torch.Tensor],
    path: Path,
    kind: str = "F16",
    skip: str = "nothing",
    architecture: str = "llama",
    is_permuted: bool = True,
    norms: float = 0.0,
) -> Path:
    """A llama's GGUF, written with the gguf package and the names above."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_block_count(3)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    for name, tensor in model.items():
        values = tensor.float().numpy()
        if name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
            named = {"model.e": "token_embd", "lm_head": "output", "model.n": "output_norm"}[name[:7]]
        else:
            _, _, number, module = name.removesuffix(".weight").split(".", 3)
            named = f"blk.{number}.{NAMES[module]}"
            if module.endswith(("q_proj", "k_proj")) and is_permuted:
                values = permuted(values, 4 if "q_" in module else 2)
        if named.endswith("norm"):
            values = values + np.float32(norms)
        if skip != named:
            add(writer, f"{named}.weight", values, kind if values.ndim > 1 else "F32")
    add(writer, "rope_freqs.weight", np.ones(8), "F32")
    return finish(writer)


def random_lora(model: Path, folder: Path, scale: float = 0.003, rank: int = 4, seed: int = 3) -> Path:
    generator = torch.Generator().manual_seed(seed)
    pairs = {
        name.removesuffix(".weight"): (
            torch.randn(rank, tensor.shape[1], generator=generator),
            scale * torch.randn(tensor.shape[0], rank, generator=generator),
        )
        for name, tensor in load_all(model).items()
        if name.endswith("_proj.weight")
    }
    return write(folder, tensors_of(pairs), target_modules="all-linear")


def split_files(folder: Path) -> tuple[Path, Path]:
    """The residual and the adapter."""
    residual, adapter = sorted(folder.glob("*.gguf"))  # in this order: capitals come first
    return residual, adapter


def run_in(folder: Path, command: list[str]) -> int:
    folder.mkdir(exist_ok=True)
    code = subprocess.run([*command, "--quiet"], cwd=folder).returncode
    assert code in (0, -signal.SIGKILL)
    return code
