"""All of SmolLM2 in llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import llamacpp
import numpy as np
import pytest
import smollm2
import torch
from gguf_models import smollm2_by_type
from gguf_small import random_lora, split_files
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from pissa_convert import convert


@pytest.mark.long
def test_all_of_smollm2(tmp_path: Path) -> None:
    """What the tests above say of its first layers, for all 30, with the numbers that the README gives."""
    smollm2.write_checkpoint(tmp_path / "model", torch.float32)
    ggufs = smollm2_by_type(tmp_path, 30)
    tokens = AutoTokenizer.from_pretrained(tmp_path / "model")(smollm2.TEXT)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    lora = random_lora(tmp_path / "model", tmp_path / "lora", scale=0.002, rank=8)
    with torch.no_grad():
        original = model.eval()(torch.tensor([tokens])).logits[0].double().numpy()
        adapted = PeftModel.from_pretrained(model, lora).eval()
        trained = adapted(torch.tensor([tokens])).logits[0].double().numpy()

    def told(what: str, expected: Any, *given: Any) -> tuple[float, float, float]:
        found = llamacpp.logits(*given)
        sizes = np.abs(found - expected).max(), llamacpp.divergence(expected, found), llamacpp.top1(expected, found)
        print(f"{what}: max |Δlogit| {sizes[0]:.1e}, KL {sizes[1]:.1e}, top-1 {sizes[2]:.2%}")
        return sizes

    assert told("no adapter", trained, ggufs["F32"], tokens)[1] > 1e-3
    for kind in ("F32", "F16", "Q8_0", "Q4_K_M"):
        made = tmp_path / f"lora-{kind}.gguf"
        convert(lora, made, "gguf", base_gguf=ggufs[kind], outtype="f32" if kind == "F32" else "f16")
        far, kl, same = told(f"adapter on {kind}", trained, ggufs[kind], tokens, [made])
        if kind == "F32":
            assert far < 0.01
        elif kind == "F16":
            assert kl < 1e-4
            assert same > 0.99
        else:
            assert kl < told(f"{kind} without it", trained, ggufs[kind], tokens)[1]
    convert(ggufs["F32"], tmp_path / "merged.gguf", "merged", adapter=lora)
    assert told("merged GGUF", trained, tmp_path / "merged.gguf", tokens)[0] < 0.01
    convert(tmp_path / "model", tmp_path / "merged", "merged", adapter=lora)
    convert(tmp_path / "merged", tmp_path / "folder.gguf", "gguf", base_gguf=ggufs["Q4_K_M"], outtype="f16")
    assert told("merged folder as F16", trained, tmp_path / "folder.gguf", tokens)[1] < 1e-4
    for kind, outtype in (("F16", "same"), ("F16", "q4_0")):
        convert(ggufs[kind], tmp_path / outtype, "pissa", outtype=outtype)
        residual, adapter = split_files(tmp_path / outtype)
        kl = told(f"residual {outtype} and adapter", original, residual, tokens, [adapter])[1]
        assert kl < (1e-4 if outtype == "same" else 0.5)
        told(f"residual {outtype} alone", original, residual, tokens)
