"""After training on a 4-bit base: a LoRA, a merged model, and the base read back."""

from __future__ import annotations

import json
from pathlib import Path

import peft_models
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from checkpoints import digests, load_adapter, load_all
from four_bit import bases
from peft import PeftModel
from training import fit, logits, shortened, tokens_of
from transformers import AutoModelForCausalLM

from pissa_convert import convert, verify
from pissa_convert.errors import DamageError, RequestError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:bitsandbytes.*an autograd kernel was not registered:UserWarning"),
]


@pytest.fixture(scope="module")
def model(smol: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first layer of SmolLM2, bf16."""
    return shortened(smol, tmp_path_factory.mktemp("journey") / "in", 1, "bfloat16")


@pytest.fixture(scope="module")
def base(model: Path) -> Path:
    """The same in 4 bits."""
    convert(model, model.parent / "base", "qpissa")
    return model.parent / "base"


@pytest.fixture(scope="module")
def trained(model: Path, base: Path) -> Path:
    """The adapter after three steps of PEFT on bitsandbytes' layers."""
    live = AutoModelForCausalLM.from_pretrained(base)
    peft = PeftModel.from_pretrained(live, base, subfolder="pissa_init", is_trainable=True)
    fit(peft, tokens_of(model), rate=1e-3)
    peft.save_pretrained(model.parent / "trained")
    return model.parent / "trained"


def factors(adapter: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    link = adapter.parent / "as-split" / "pissa_init"
    if not link.exists():
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(adapter)
    return load_adapter(link.parent)


def test_merged_is_what_was_trained(base: Path, trained: Path, tmp_path: Path) -> None:
    convert(base, tmp_path / "out", "merged", adapter=trained)
    merged, stored = load_all(tmp_path / "out"), bases(base)
    for module, (a, b) in factors(trained).items():
        wanted = (stored[f"{module}.weight"].float() + b @ a).bfloat16()
        found = merged[f"{module}.weight"]
        assert found.dtype == torch.bfloat16
        assert (found != wanted).float().mean() < 1e-3  # where the sum lies between two, the order of adding tells
        assert torch.allclose(found.float(), wanted.float(), rtol=2**-7, atol=0)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert verify(tmp_path / "out", base, adapter=trained).tensors == len(stored)


def test_the_merged_model_says_what_peft_says_in_4_bits(model: Path, base: Path, trained: Path, tmp_path: Path) -> None:
    convert(base, tmp_path / "out", "merged", adapter=trained)
    tokens = tokens_of(model)
    live = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), trained)
    wanted = logits(live, tokens)
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16), tokens)
    assert (found - wanted).norm() < 0.02 * wanted.norm()


def test_the_exact_base_is_what_bitsandbytes_reads(base: Path, tmp_path: Path) -> None:
    convert(base, tmp_path / "out", "merged", exact_base=True)
    found = load_all(tmp_path / "out")
    for name, wanted in bases(base).items():
        assert torch.equal(found[name], wanted)
    assert found.keys() == {name for name in load_all(base) if not name.rpartition(".weight")[2]}
    assert verify(tmp_path / "out", base).files == len(digests(tmp_path / "out"))


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_the_exact_base_loads_as_the_model_did(name: str, tmp_path: Path) -> None:
    """GPT-2 stores its weights in × out, bitsandbytes all of them out × in."""
    peft_models.save(name, tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "base", "qpissa", rank=2, iterations=1)
    convert(tmp_path / "base", tmp_path / "out", "merged", exact_base=True)
    found, compared = peft_models.load(tmp_path / "out"), 0
    for name, layer in peft_models.load(tmp_path / "base").named_modules():
        # bitsandbytes 0.50 misreads weights whose rows are not whole blocks, on CPUs with AVX-512.
        if isinstance(layer, Linear4bit) and layer.in_features % 64 == 0:
            read = found.get_submodule(name)
            wanted = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            assert torch.equal(read.weight, wanted.T if type(read).__name__ == "Conv1D" else wanted)
            compared += 1
    assert compared == 2
    original = peft_models.weights(tmp_path / "in")
    assert {name: tensor.shape for name, tensor in peft_models.weights(tmp_path / "out").items()} == {
        name: tensor.shape for name, tensor in original.items()
    }


def test_a_lora_is_relative_to_the_original_and_says_how_far_from_what_was_trained(
    model: Path, base: Path, trained: Path, tmp_path: Path
) -> None:
    report = convert(trained, tmp_path / "out", "lora", init=base)
    before, after, original, stored = factors(base / "pissa_init"), factors(trained), load_all(model), bases(base)
    lora = factors(tmp_path / "out")
    error = norm = 0.0
    for module, (a, b) in lora.items():
        weight = original[f"{module}.weight"].double()
        (a0, b0), (a1, b1) = before[module], after[module]
        change = b1.double() @ a1.double() - b0.double() @ a0.double()
        assert torch.allclose(b.double() @ a.double(), change, atol=1e-6 * float(change.abs().max()))
        live = stored[f"{module}.weight"].double() + b1.double() @ a1.double()
        error += float((weight + change - live).norm() ** 2)
        norm += float(weight.norm() ** 2)
    said = json.loads((tmp_path / "out" / "pissa_convert.json").read_text())["options"]["base_error"]
    assert said == pytest.approx((error / norm) ** 0.5, rel=1e-3)
    assert any(f"{said:.1e} of ‖W‖ away" in warning for warning in report.warnings)
    assert f"{said:.2%} of ‖W‖" in (tmp_path / "out" / "README.md").read_text()
    assert verify(tmp_path / "out", trained, init=base).tensors == len(lora)


def test_a_lora_for_the_original_does_not_go_on_the_base(base: Path, trained: Path, tmp_path: Path) -> None:
    convert(trained, tmp_path / "lora", "lora", init=base)
    with pytest.raises(RequestError, match="made for the original model"):
        convert(base, tmp_path / "out", "merged", adapter=tmp_path / "lora")


def test_only_a_4_bit_base_is_read_back(model: Path, base: Path, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="SOURCE is none"):
        convert(model, tmp_path / "out", "merged", exact_base=True)
    with pytest.raises(RequestError, match="give --adapter or --exact-base"):
        convert(base, tmp_path / "out", "merged", adapter=trained, exact_base=True)
    with pytest.raises(RequestError, match="cannot be derived"):
        convert(trained, tmp_path / "out", "lora", init=base, base=model)


def test_verify_measures_every_weight_against_the_original(model: Path, base: Path, tmp_path: Path) -> None:
    found = verify(base, model)
    entries = json.loads((base / "pissa_convert.json").read_text())["tensors"]
    assert found.tensors == len(entries)
    assert found.relative_error == pytest.approx(max(e["relative_error"] for e in entries.values()), rel=1e-3)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in model.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    weights = damaged / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-2_000_000:-1_000_000] = bytes(1_000_000)
    weights.write_bytes(data)
    with pytest.raises(DamageError) as error:
        verify(base, damaged)
    assert any("not as near to SOURCE's" in str(finding) for finding in error.value.findings)
