"""Small checkpoints to order, and what tests look at in results."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from blake3 import blake3
from safetensors import safe_open
from safetensors.torch import load_file, save_file

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def llm_like(rows: int, cols: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A matrix whose spectrum decays as slowly as a language model's: i^-0.4 under a random rotation."""
    generator = torch.Generator().manual_seed(seed)
    size = min(rows, cols)
    left = torch.linalg.qr(torch.randn(rows, size, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(cols, size, generator=generator))[0]
    sigma = torch.arange(1, size + 1, dtype=torch.float32) ** -0.4
    return ((left * sigma) @ right.T).to(dtype)


def small_model(seed: int = 0, dtype: torch.dtype = torch.float32, layers: int = 2) -> dict[str, torch.Tensor]:
    """The tensors of a little Llama: hidden 48, feed-forward 80."""
    tensors = {
        "model.embed_tokens.weight": llm_like(96, 48, seed, dtype),
        "model.norm.weight": torch.ones(48, dtype=dtype),
    }
    for layer in range(layers):
        for number, (name, rows, cols) in enumerate(
            [
                ("self_attn.q_proj", 48, 48),
                ("self_attn.k_proj", 24, 48),
                ("mlp.gate_proj", 80, 48),
                ("mlp.down_proj", 48, 80),
            ]
        ):
            key = f"model.layers.{layer}.{name}.weight"
            tensors[key] = llm_like(rows, cols, seed + 100 * layer + number + 1, dtype)
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = torch.ones(48, dtype=dtype)
    return tensors


def write_model(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1, index: bool = True) -> Path:
    """A Hugging Face folder with the given tensors in `shards` files."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    (folder / "tokenizer.json").write_text("{}")
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[number::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    if index:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder's top-level shards."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def load_adapter(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A and B of `folder`/pissa_init by module name."""
    raw = load_file(folder / "pissa_init" / "adapter_model.safetensors")
    modules = {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in raw}
    return {
        module: (raw[f"base_model.model.{module}.lora_A.weight"], raw[f"base_model.model.{module}.lora_B.weight"])
        for module in modules
    }


def digests(folder: Path) -> dict[str, str]:
    """BLAKE3 of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): blake3(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def raw_header(file: Path) -> bytes:
    """Length field and header of a safetensors file."""
    data = file.read_bytes()
    return data[: 8 + int.from_bytes(data[:8], "little")]


def metadata(file: Path) -> dict[str, str]:
    """The `__metadata__` of a safetensors file."""
    with safe_open(file, "pt") as opened:
        return dict(opened.metadata() or {})
