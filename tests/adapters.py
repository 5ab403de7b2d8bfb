"""Adapter folders to order, and what they mean, in float64 by numpy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoints import small_model, write_model
from safetensors.torch import load_file, save_file

from pissa_convert import convert

PREFIX = "base_model.model."
SHAPES = {"model.layers.0.self_attn.q_proj": (40, 24), "model.layers.0.mlp.down_proj": (24, 56)}
"""out × in."""

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]


def factors(rank: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Factors:
    """A (rank × in) and B (out × rank) for the modules of SHAPES."""
    generator = torch.Generator().manual_seed(seed)
    return {
        module: (
            torch.randn(rank, size_in, generator=generator).to(dtype),
            torch.randn(size_out, rank, generator=generator).to(dtype),
        )
        for module, (size_out, size_in) in SHAPES.items()
    }


def moved(start: Factors, by: float = 0.05, seed: int = 9) -> Factors:
    """What training makes of factors, more or less."""
    generator = torch.Generator().manual_seed(seed)
    return {
        module: tuple(t + by * torch.randn(t.shape, generator=generator).to(t.dtype) for t in pair)  # type: ignore[misc]
        for module, pair in start.items()
    }


def tensors_of(pairs: Factors, prefix: str = PREFIX) -> dict[str, torch.Tensor]:
    """PEFT's names."""
    named = {}
    for module, (a, b) in pairs.items():
        named |= {f"{prefix}{module}.lora_A.weight": a, f"{prefix}{module}.lora_B.weight": b}
    return named


def write(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    """An adapter folder; `config` over what the factors' rank asks for."""
    folder.mkdir(parents=True)
    rank = next((tensor.shape[0] for key, tensor in tensors.items() if ".lora_A" in key), 4)
    values = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q_proj", "down_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(values | config))
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


def products(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """B·A of every module of a converted folder, whose scaling is 1 in all of them."""
    raw = load_file(folder / "adapter_model.safetensors")
    suffix = ".lora_A.weight"
    return {
        key.removeprefix(PREFIX).removesuffix(suffix): raw[key.replace("lora_A", "lora_B")].double().numpy()
        @ raw[key].double().numpy()
        for key in raw
        if key.endswith(suffix)
    }


def product(pairs: Factors, module: str, scaling: float = 1.0) -> np.ndarray[Any, Any]:
    """s·B·A."""
    a, b = pairs[module]
    return scaling * (b.double().numpy() @ a.double().numpy())


def distance(found: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> float:
    """Relative, in the Frobenius norm."""
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def trained_pair(folder: Path) -> tuple[Path, Path]:
    """TRAINED and INIT, of rank 4 at scaling 1."""
    start = factors(4)
    return write(folder / "trained", tensors_of(moved(start))), write(folder / "init", tensors_of(start))


def to_lora(pair: tuple[Path, Path], dest: Path, **options: Any) -> Any:
    return convert(pair[0], dest, "lora", init=pair[1], **options)


def lora_for(model: dict[str, torch.Tensor], rank: int = 4, seed: int = 3) -> dict[str, torch.Tensor]:
    """Factors for every projection of a model."""
    generator = torch.Generator().manual_seed(seed)
    return tensors_of(
        {
            name.removesuffix(".weight"): (
                0.05 * torch.randn(rank, tensor.shape[1], generator=generator),
                torch.randn(tensor.shape[0], rank, generator=generator),
            )
            for name, tensor in model.items()
            if name.endswith("_proj.weight")
        }
    )


def to_merged(source: Path, dest: Path, adapter: Path, **options: Any) -> Any:
    return convert(source, dest, "merged", adapter=adapter, **options)


def splits(tmp_path: Path) -> tuple[Path, Path, Path, Path]:
    """A model, its split, an adapter trained on the residual, and the LoRA made of it."""
    source = write_model(tmp_path / "model", small_model(), 2)
    convert(source, tmp_path / "split", rank=4)
    init = load_file(tmp_path / "split" / "pissa_init" / "adapter_model.safetensors")
    trained = {name: tensor + 0.01 * tensor.std() * torch.randn_like(tensor) for name, tensor in init.items()}
    write(tmp_path / "trained", trained)
    convert(tmp_path / "trained", tmp_path / "lora", "lora", init=tmp_path / "split")
    return source, tmp_path / "split", tmp_path / "trained", tmp_path / "lora"
