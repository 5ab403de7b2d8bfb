"""A few real training steps with PEFT, on whatever adapter a test needs."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import smollm2
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load(folder: Path, dtype: str = "float32") -> torch.nn.Module:
    """A causal language model."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=_DTYPES[dtype])


def tokens_of(folder: Path, length: int = 48) -> torch.Tensor:
    """The first tokens of a fixed text."""
    return AutoTokenizer.from_pretrained(folder)(smollm2.TEXT, return_tensors="pt")["input_ids"][:, :length]


def prose(folder: Path, length: int = 1500) -> torch.Tensor:
    """The first tokens of this project's README: on a short text it is chance which of two good models does better."""
    text = (Path(__file__).parents[1] / "README.md").read_text()
    return AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"][:, :length]


def fit(model: torch.nn.Module, tokens: torch.Tensor, steps: int = 3, rate: float = 1e-3) -> None:
    """Train what is trainable."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    model.train()
    for _ in range(steps):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Next-token scores."""
    with torch.no_grad():
        return model.eval()(input_ids=tokens).logits[0].float()


def with_adapter(base: torch.nn.Module, adapter: Path, **options: Any) -> PeftModel:
    """The model that PEFT makes of a base and an adapter folder; PEFT must find nothing odd about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return PeftModel.from_pretrained(base, adapter, **options)


def with_pissa(base: torch.nn.Module, init: Path, **options: Any) -> PeftModel:
    """PEFT's own PiSSA of a model, whose initial adapter it saves in `init` as its documentation says."""
    settings: dict[str, Any] = {"r": 8, "lora_alpha": 8, "init_lora_weights": "pissa", "task_type": "CAUSAL_LM"}
    model = get_peft_model(base, LoraConfig(**(settings | options)))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(init)
    return model


def shortened(source: Path, dest: Path, layers: int, dtype: str) -> Path:
    """The first layers of a real model, as a model of their own."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=_DTYPES[dtype], num_hidden_layers=layers)
    model.save_pretrained(dest)
    AutoTokenizer.from_pretrained(source).save_pretrained(dest)
    return dest
