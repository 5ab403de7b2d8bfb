"""A LoRA merged into a GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import llamacpp
import numpy as np
import pytest
from adapters import write
from checkpoints import load_all
from gguf_models import keys_of, types_of, values_of
from gguf_small import NAMES, permuted, random_lora, small_gguf

from pissa_convert import convert


@pytest.mark.parametrize(
    ("kind", "outtype"), [("F32", None), ("F16", None), ("Q8_0", None), ("Q4_0", None), ("Q4_0", "q8_0")]
)
def test_a_lora_is_added_to_what_the_gguf_means(kind: str, outtype: str | None, small: Path, tmp_path: Path) -> None:
    base = small_gguf(load_all(small), tmp_path / "base.gguf", kind)
    adapter = random_lora(small, tmp_path / "lora", scale=0.05)
    convert(base, tmp_path / "out.gguf", "merged", adapter=adapter, **({"outtype": outtype} if outtype else {}))
    before, after, raw = values_of(base), values_of(tmp_path / "out.gguf"), load_all(adapter)
    types = types_of(tmp_path / "out.gguf")
    for name, old in before.items():
        _, _, number_and_kind = name.partition("blk.")
        expected = old.astype(np.float64)
        if number_and_kind and "norm" not in name:
            number, side = number_and_kind.split(".")[:2]
            module = {ours: theirs for theirs, ours in NAMES.items()}[side]
            a, b = (
                raw[f"base_model.model.model.layers.{number}.{module}.lora_{factor}.weight"].double().numpy()
                for factor in "AB"
            )
            heads = {"attn_q": 4, "attn_k": 2}.get(side)
            expected = expected + (permuted(b, heads) if heads else b) @ a
        wanted = kind if old.ndim > 1 and outtype is None else "F32" if old.ndim == 1 else str(outtype).upper()
        assert types[name] == wanted
        if wanted == "F32":
            assert np.allclose(after[name], expected, atol=1e-6)
        else:  # float32 may be one rounding away, rarely
            assert (after[name] == reference(expected, wanted)).mean() > 0.99


def reference(values: Any, kind: str) -> Any:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    number = GGMLQuantizationType[kind]
    return dequantize(quantize(values.astype(np.float32), number), number)


def test_what_a_merge_does_not_change_is_copied_byte_for_byte(small: Path, tmp_path: Path) -> None:
    base = small_gguf(load_all(small), tmp_path / "base.gguf", "Q4_1")
    whole = random_lora(small, tmp_path / "whole")
    kept = {name: t for name, t in load_all(whole).items() if "layers.1.mlp.up_proj" in name}
    adapter = write(tmp_path / "lora", kept)
    report = convert(base, tmp_path / "out.gguf", "merged", adapter=adapter)
    assert report.tensors == 1
    before, after = values_of(base), values_of(tmp_path / "out.gguf")
    assert [name for name in before if not (before[name] == after[name]).all()] == ["blk.1.ffn_up.weight"]
    assert keys_of(tmp_path / "out.gguf") == keys_of(base)


def test_two_adapters_at_once_are_their_sum(
    smol32: Path, smol_gguf: dict[str, Path], tokens: list[int], tmp_path: Path
) -> None:
    loras = [random_lora(smol32, tmp_path / name, seed=seed) for name, seed in (("one", 5), ("two", 6))]
    for lora in loras:
        convert(lora, lora.with_suffix(".gguf"), "gguf", base_gguf=smol_gguf["F32"], outtype="f32")
    convert(smol_gguf["F32"], tmp_path / "first.gguf", "merged", adapter=loras[0])
    convert(tmp_path / "first.gguf", tmp_path / "both.gguf", "merged", adapter=loras[1])
    found = llamacpp.logits(smol_gguf["F32"], tokens, [lora.with_suffix(".gguf") for lora in loras])
    assert np.abs(found - llamacpp.logits(tmp_path / "both.gguf", tokens)).max() < 0.01
