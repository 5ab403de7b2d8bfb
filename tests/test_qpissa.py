"""`--to qpissa` judged by bitsandbytes, transformers and PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import bitsandbytes
import peft_models
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from checkpoints import digests, load_adapter, load_all, small_model, write_model
from four_bit import bases, plainly_quantised
from peft import PeftModel
from training import logits, prose, shortened, tokens_of
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from pissa_convert import convert, plan, verify
from pissa_convert.linalg.torch_backend import TorchBackend
from pissa_convert.linalg.torch_device import Device

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:bitsandbytes.*an autograd kernel was not registered:UserWarning"),
]


@pytest.fixture(scope="module")
def model(smol: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first two layers of SmolLM2, bf16."""
    return shortened(smol, tmp_path_factory.mktemp("model") / "in", 2, "bfloat16")


@pytest.fixture(scope="module")
def result(model: Path) -> Path:
    """The same at rank 16."""
    dest = model.parent / "out"
    convert(model, dest, "qpissa")
    return dest


def test_a_gpu_splits_and_the_cpu_quantises(model: Path, result: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch's arithmetic of a GPU, done by the CPU."""
    gpu = TorchBackend([Device(torch.device("cpu"), 1 << 40)])
    monkeypatch.setattr("pissa_convert.plans.requests.select_backend", lambda *options: gpu)
    dest = model.parent / "gpu"
    convert(model, dest, "qpissa")
    entries, native = (json.loads((folder / "pissa_convert.json").read_text()) for folder in (dest, result))
    assert entries["backend"].startswith("torch")
    assert entries["tensors"].keys() == native["tensors"].keys()
    for name, entry in entries["tensors"].items():
        assert entry["relative_error"] == pytest.approx(native["tensors"][name]["relative_error"], rel=0.01)
    assert verify(dest, model).tensors == len(entries["tensors"])


def quantised_by_transformers(model: Path, dest: Path, code: str, double: bool) -> Path:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=code,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    AutoModelForCausalLM.from_pretrained(model, dtype="auto", quantization_config=config).save_pretrained(dest)
    return dest


@pytest.mark.parametrize(("code", "double"), [("nf4", True), ("fp4", False)])
def test_linears_without_an_adapter_are_what_transformers_stores(
    model: Path, tmp_path: Path, code: str, double: bool
) -> None:
    reference = quantised_by_transformers(model, tmp_path / "bnb", code, double)
    adapted = "model.layers.0.self_attn.k_proj"
    convert(model, tmp_path / "out", "qpissa", target_modules=[adapted], quant=code, double_quant=double)
    ours, theirs = load_all(tmp_path / "out"), load_all(reference)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if name.startswith(adapted):
            continue
        if ".quant_state." in name:
            assert bytes(ours[name].numpy()).rstrip(b" ") == bytes(tensor.numpy())
        else:
            assert ours[name].dtype == tensor.dtype
            assert torch.equal(ours[name], tensor)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", reference)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


def test_the_recorded_errors_are_those_of_what_bitsandbytes_reads(model: Path, result: Path) -> None:
    original, stored = load_all(model), bases(result)
    entries = json.loads((result / "pissa_convert.json").read_text())["tensors"]
    for module, (a, b) in load_adapter(result).items():
        if not module.endswith(("layers.0.self_attn.k_proj", "layers.1.mlp.up_proj")):
            continue
        weight, name = original[f"{module}.weight"].double(), f"{module}.weight"
        difference = weight - stored[name].double() - b.double() @ a.double()
        plain = weight - plainly_quantised(original[name]).double()
        entry = entries[name]
        assert entry["relative_error"] == pytest.approx(float(difference.norm() / weight.norm()), rel=1e-4)
        assert entry["plain_relative_error"] == pytest.approx(float(plain.norm() / weight.norm()), rel=1e-4)
        reduction = 1 - nuclear_norm(difference) / nuclear_norm(plain)
        assert entry["reduction"] == pytest.approx(reduction, abs=1e-4)
        assert reduction > 0


def nuclear_norm(matrix: torch.Tensor) -> float:
    return float(torch.linalg.svdvals(matrix.float()).sum())


def test_transformers_loads_it_in_4_bits_and_peft_puts_the_adapter_on(model: Path, result: Path) -> None:
    tokens = tokens_of(model)
    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    base = AutoModelForCausalLM.from_pretrained(result)
    layer = base.model.layers[0].mlp.up_proj
    assert isinstance(layer, bitsandbytes.nn.Linear4bit)
    assert layer.weight.quant_state.nested
    assert type(base.lm_head) is torch.nn.Linear
    assert torch.equal(
        dequantize_4bit(layer.weight.data, layer.weight.quant_state), bases(result)["model.layers.0.mlp.up_proj.weight"]
    )
    wanted = logits(original, tokens)
    alone = (logits(base, tokens) - wanted).norm()
    adapted = (logits(PeftModel.from_pretrained(base, result, subfolder="pissa_init"), tokens) - wanted).norm()
    assert adapted < 0.3 * alone


def test_it_trains_in_4_bits(model: Path, result: Path) -> None:
    tokens = tokens_of(model)
    base = AutoModelForCausalLM.from_pretrained(result)
    peft = PeftModel.from_pretrained(base, result, subfolder="pissa_init", is_trainable=True)
    optimizer = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=1e-4)
    losses = []
    for _ in range(3):
        loss = peft(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]


def test_smollm2_begins_nearer_to_the_original_than_qlora(smol: Path, tmp_path: Path) -> None:
    """Loss on real text before any step, with the weights that bitsandbytes reads back."""
    convert(smol, tmp_path / "out", "qpissa", rank=64)
    tokens, original, stored = prose(smol), load_all(smol), bases(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(smol, dtype=torch.float32)
    weights = dict(model.named_parameters())

    @torch.no_grad()
    def loss() -> float:
        return float(model(input_ids=tokens, labels=tokens).loss)

    losses = {"original": loss()}
    for module, (a, b) in load_adapter(tmp_path / "out").items():
        weights[f"{module}.weight"].data = stored[f"{module}.weight"].float() + b @ a
    losses["qpissa"] = loss()
    for name in stored:
        weights[name].data = plainly_quantised(original[name]).float()
    losses["qlora"] = loss()
    assert losses["qpissa"] - losses["original"] < 0.5 * (losses["qlora"] - losses["original"])


ARCHITECTURES = [name for name in peft_models.NAMES if name not in {"falcon", "nomic_bert", "qwen2_moe"}]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_quantised_is_what_transformers_makes_4_bit_layers_of(name: str, tmp_path: Path) -> None:
    peft_models.save(name, tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "out", "qpissa", rank=2, iterations=1)
    entries = json.loads((tmp_path / "out" / "pissa_convert.json").read_text())["tensors"]
    loaded = peft_models.load(tmp_path / "out")
    layers = {name: module for name, module in loaded.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
    assert layers.keys() == {entry["module"] for entry in entries.values()}
    stored = bases(tmp_path / "out")
    for tensor, entry in entries.items():
        weight = layers[entry["module"]].weight
        assert torch.equal(dequantize_4bit(weight.data, weight.quant_state), stored[tensor])


def test_the_plan_says_to_the_byte_what_is_written(model: Path, result: Path) -> None:
    sizes = plan(model, result.parent / "elsewhere", "qpissa").output_sizes
    assert sizes == {
        path.relative_to(result).as_posix(): path.stat().st_size for path in result.rglob("*") if path.is_file()
    }


def test_threads_change_no_byte(result: Path, model: Path, tmp_path: Path) -> None:
    convert(model, tmp_path / "out", "qpissa", threads=1)
    assert digests(tmp_path / "out") == digests(result)


def test_every_digest_fits(result: Path) -> None:
    assert verify(result).files == len([path for path in result.rglob("*") if path.is_file()])


def test_what_follows_in_a_file_stays_aligned(tmp_path: Path) -> None:
    """safetensors' loaders want every tensor at a multiple of its dtype's size."""
    tensors = small_model(dtype=torch.bfloat16)
    tensors["model.layers.0.odd.weight"] = torch.ones(3, 5, dtype=torch.bfloat16)
    source = write_model(tmp_path / "in", tensors, shards=2)
    made = plan(source, tmp_path / "out", "qpissa", rank=2)
    sizes = {"F32": 4, "BF16": 2, "U8": 1}
    for places in made.places.values():
        assert all(place.begin % sizes[place.dtype] == 0 for place in places)
