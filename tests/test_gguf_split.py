"""A GGUF split into a residual and a principal adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import llamacpp
import numpy as np
import pytest
from checkpoints import load_all
from gguf_models import add, finish, keys_of, types_of, values_of
from gguf_small import NAMES, small_gguf, split_files

from pissa_convert import convert, plan
from pissa_convert.errors import RequestError


@pytest.mark.parametrize("kind", ["F32", "F16"])
def test_residual_and_principal_adapter_are_the_base(
    kind: str, smol_gguf: dict[str, Path], tokens: list[int], tmp_path: Path
) -> None:
    report = convert(smol_gguf[kind], tmp_path / "out", "pissa", rank=16, alpha=4, rslora=True)
    residual, adapter = split_files(tmp_path / "out")
    assert "RESIDUAL" in residual.name
    assert "RESIDUAL" in keys_of(residual)["general.name"]
    assert types_of(residual) == types_of(smol_gguf[kind])
    base, found = (llamacpp.logits(*given) for given in ((smol_gguf[kind], tokens), (residual, tokens, [adapter])))
    assert llamacpp.divergence(base, found) < (1e-8 if kind == "F32" else 1e-4)
    assert llamacpp.top1(base, found) > 0.98
    assert llamacpp.perplexity(llamacpp.logits(residual, tokens), tokens) > 100 * llamacpp.perplexity(base, tokens)
    assert f"llama-server -m {residual} --lora {adapter}" in report.usage


def test_the_split_is_that_of_an_exact_svd(small: Path, tmp_path: Path) -> None:
    base = small_gguf(load_all(small), tmp_path / "base.gguf", "F32")
    convert(base, tmp_path / "out", "pissa", rank=8, alpha=2)
    residual, adapter = (values_of(path) for path in split_files(tmp_path / "out"))
    scale = keys_of(split_files(tmp_path / "out")[1])["adapter.lora.alpha"] / 8
    assert scale == 0.25
    for name, weight in values_of(base).items():
        if f"{name}.lora_a" not in adapter:
            assert (residual[name] == weight).all()
            continue
        left, sigma, right = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
        principal = (left[:, :8] * sigma[:8]) @ right[:8]
        made = scale * adapter[f"{name}.lora_b"].astype(np.float64) @ adapter[f"{name}.lora_a"]
        assert np.linalg.norm(made - principal) < 2e-3 * np.linalg.norm(principal)
        assert np.linalg.norm(residual[name] + made - weight) < 1e-6 * np.linalg.norm(weight)
    split = {name.removesuffix(".lora_a") for name in adapter if name.endswith("lora_a")}
    assert split == {f"blk.{n}.{side}.weight" for n in range(3) for side in NAMES.values() if "norm" not in side}


@pytest.mark.parametrize(("kind", "outtype"), [("Q8_0", None), ("F16", "q4_0"), ("Q4_0", "f16"), ("BF16", None)])
def test_the_error_that_is_recorded_is_that_of_what_is_stored(
    kind: str, outtype: str | None, small: Path, tmp_path: Path
) -> None:
    base = small_gguf(load_all(small), tmp_path / "base.gguf", kind)
    convert(base, tmp_path / "out", "pissa", rank=4, **({"outtype": outtype} if outtype else {}))
    residual, adapter = (values_of(path) for path in split_files(tmp_path / "out"))
    entries = json.loads((tmp_path / "out" / "pissa_convert.json").read_text())["tensors"]
    for name, weight in values_of(base).items():
        if f"{name}.lora_a" in adapter:
            made = (
                residual[name].astype(np.float64)
                + adapter[f"{name}.lora_b"].astype(np.float64) @ adapter[f"{name}.lora_a"]
            )
            found = np.linalg.norm(weight - made) / np.linalg.norm(weight)
            assert entries[name]["relative_error"] == pytest.approx(found, rel=0.02, abs=1e-7)


def test_every_expert_is_split_by_itself(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "moe.gguf", "qwen3moe")
    writer.add_block_count(1)
    writer.add_expert_count(3)
    values = np.random.default_rng(0).standard_normal((3, 24, 32)).astype(np.float32)
    add(writer, "blk.0.ffn_up_exps.weight", values, "F32")
    add(writer, "blk.0.ffn_gate_inp.weight", values[0], "F32")
    convert(finish(writer), tmp_path / "out", "pissa", rank=4)
    residual, adapter = (values_of(path) for path in split_files(tmp_path / "out"))
    a, b = (adapter[f"blk.0.ffn_up_exps.weight.lora_{side}"] for side in "ab")
    assert (a.shape, b.shape) == ((3, 4, 32), (3, 24, 4))
    assert np.allclose(residual["blk.0.ffn_up_exps.weight"] + b @ a, values, atol=1e-5)
    for number in range(3):
        sigma = np.linalg.svd(b[number] @ a[number], compute_uv=False)[:4]
        assert np.allclose(sigma, np.linalg.svd(values[number], compute_uv=False)[:4], rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target_modules": ["token_embd"]}, "llama.cpp would not add an adapter"),
        ({"target_modules": ["nothing"]}, "no weight is left to split"),
        ({"target_modules": "("}, "--target-modules is not a regular expression"),
        ({"rank": 33}, r"--rank is larger.*expected at most 32"),
        ({"rank": 4, "adapter": "x"}, "--adapter does not apply to --to pissa of a GGUF"),
        ({"outtype": "template"}, "--outtype is unknown"),
    ],
)
def test_splits_that_cannot_be(options: dict[str, Any], said: str, template: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=said):
        plan(template, tmp_path / "out", "pissa", **options)


def test_target_modules_are_names_of_the_gguf(template: Path, tmp_path: Path) -> None:
    convert(
        template,
        tmp_path / "out",
        "pissa",
        rank=4,
        target_modules=["attn_q", "output"],
        exclude_modules=["blk.1.attn_q"],
    )
    names = {name.rpartition(".weight")[0] for name in values_of(split_files(tmp_path / "out")[1])}
    assert names == {"blk.0.attn_q", "blk.2.attn_q", "output"}


def test_a_residual_is_not_split_again(template: Path, tmp_path: Path) -> None:
    convert(template, tmp_path / "out", "pissa", rank=4)
    with pytest.raises(RequestError, match="itself the residual of a split"):
        plan(split_files(tmp_path / "out")[0], tmp_path / "again", "pissa")
