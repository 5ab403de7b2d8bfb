"""Every form of checkpoint that users have, and PEFT's meaning of the options."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from checkpoints import llm_like, load_adapter, load_all, metadata, raw_header, small_model, write_model
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from pissa_convert import convert, plan
from pissa_convert.errors import RequestError

LINEARS = {
    f"model.layers.{layer}.{name}"
    for layer in (0, 1)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj")
}


def assert_is_split(source: Path, dest: Path, modules: set[str], scaling: float = 1.0) -> None:
    """`dest` is `source` with exactly these modules split, and W = W_res + s·B·A."""
    original, residual, adapter = load_all(source), load_all(dest), load_adapter(dest)
    assert set(adapter) == modules
    for name, weight in original.items():
        module = name.removesuffix(".weight")
        assert residual[name].dtype == weight.dtype
        if module not in modules:
            assert torch.equal(residual[name], weight)
            continue
        a, b = adapter[module]
        product = scaling * (b.double() @ a.double())
        tolerance = {torch.float32: 1e-7, torch.float16: 6e-4, torch.bfloat16: 5e-3}[weight.dtype]
        assert torch.linalg.matrix_norm(weight - residual[name].double() - product) < tolerance * weight.double().norm()
        assert not torch.equal(residual[name], weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("shards", "index"), [(1, True), (3, True), (3, False)])
def test_single_files_and_shards_with_and_without_an_index(
    tmp_path: Path, dtype: torch.dtype, shards: int, index: bool
) -> None:
    source = write_model(tmp_path / "in", small_model(dtype=dtype), shards, index)
    convert(source, tmp_path / "out", rank=4)
    assert_is_split(source, tmp_path / "out", LINEARS)
    for file in source.glob("*.safetensors"):
        assert raw_header(tmp_path / "out" / file.name) == raw_header(file)


def test_dtypes_may_be_mixed(tmp_path: Path) -> None:
    tensors = small_model()
    for number, name in enumerate(sorted(tensors)):
        tensors[name] = tensors[name].to([torch.float32, torch.float16, torch.bfloat16][number % 3])
    source = write_model(tmp_path / "in", tensors, 2)
    convert(source, tmp_path / "out", rank=4)
    assert_is_split(source, tmp_path / "out", LINEARS)


def test_an_odd_header_length_leaves_weights_unaligned_and_works(tmp_path: Path) -> None:
    source = write_model(tmp_path / "in", small_model(dtype=torch.bfloat16))
    file = source / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    file.write_bytes((length + 3).to_bytes(8, "little") + data[8 : 8 + length] + b"   " + data[8 + length :])
    convert(source, tmp_path / "out", rank=4)
    assert_is_split(source, tmp_path / "out", LINEARS)


def test_a_hub_cache_snapshot_is_a_folder_of_links(tmp_path: Path) -> None:
    real = write_model(tmp_path / "files", small_model())
    root = tmp_path / "hub" / "models--org--name"
    (root / "blobs").mkdir(parents=True)
    snapshot = root / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(real.iterdir())):
        os.rename(file, root / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    convert(snapshot, tmp_path / "out", rank=4)
    assert_is_split(snapshot, tmp_path / "out", LINEARS)
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


def test_auxiliary_files_come_along_and_other_copies_of_the_weights_do_not(tmp_path: Path) -> None:
    source = write_model(tmp_path / "in", small_model())
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text("{}")
    (source / "original").mkdir()
    for name in ("pytorch_model.bin", "original/consolidated.00.pth", "model-q4.gguf"):
        (source / name).write_bytes(b"another copy of the weights")
    result = plan(source, tmp_path / "out", rank=4)
    assert {skipped.path for skipped in result.checkpoint.skipped} == {
        "pytorch_model.bin",
        "original/",
        "model-q4.gguf",
    }
    convert(source, tmp_path / "out", rank=4)
    names = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert names == {
        "1_Pooling/config.json",
        "README.md",
        "config.json",
        "model.safetensors",
        "pissa_convert.json",
        "pissa_init/adapter_config.json",
        "pissa_init/adapter_model.safetensors",
        "tokenizer.json",
    }


def test_the_sources_card_is_kept_below_ours(tmp_path: Path) -> None:
    source = write_model(tmp_path / "in", small_model())
    (source / "README.md").write_text("---\nlicense: mit\n---\n# The original\nwritten by its authors\n")
    convert(source, tmp_path / "out", rank=4)
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---\n")
    assert card.index("# Residual model") < card.index("# The original\nwritten by its authors\n")


def test_files_are_readable_as_the_umask_says(tmp_path: Path) -> None:
    source = write_model(tmp_path / "in", small_model())
    (source / "model.safetensors").chmod(0o600)
    before = os.umask(0o027)
    try:
        convert(source, tmp_path / "out", rank=4)
    finally:
        os.umask(before)
    for path in (tmp_path / "out").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640)


def test_the_adapter_says_it_is_pytorchs(tmp_path: Path) -> None:
    convert(write_model(tmp_path / "in", small_model()), tmp_path / "out", rank=4)
    assert metadata(tmp_path / "out" / "pissa_init" / "adapter_model.safetensors") == {"format": "pt"}


@pytest.mark.parametrize(
    ("target", "exclude", "expected"),
    [
        ("all-linear", None, LINEARS),
        (["q_proj"], None, {m for m in LINEARS if m.endswith("q_proj")}),
        (["mlp.gate_proj", "k_proj"], None, {m for m in LINEARS if m.endswith(("gate_proj", "k_proj"))}),
        (r".*\.1\..*_proj", None, {m for m in LINEARS if ".1." in m}),
        ("all-linear", ["mlp.down_proj"], {m for m in LINEARS if not m.endswith("down_proj")}),
        ("all-linear", r"model\.layers\.0\..*", {m for m in LINEARS if ".1." in m}),
        (["model.layers.0.self_attn.q_proj"], None, {"model.layers.0.self_attn.q_proj"}),
    ],
)
def test_targets_mean_what_they_mean_to_peft(
    tmp_path: Path, target: str | list[str], exclude: str | list[str] | None, expected: set[str]
) -> None:
    source = write_model(tmp_path / "in", small_model())
    convert(source, tmp_path / "out", rank=4, target_modules=target, exclude_modules=exclude)
    assert_is_split(source, tmp_path / "out", expected)


@pytest.mark.parametrize(("alpha", "rslora", "scaling"), [(8, False, 2.0), (1, False, 0.25), (4, True, 2.0)])
def test_alpha_and_rslora_are_in_the_adapters_config(
    tmp_path: Path, alpha: float, rslora: bool, scaling: float
) -> None:
    source = write_model(tmp_path / "in", small_model())
    convert(source, tmp_path / "out", rank=4, alpha=alpha, rslora=rslora)
    config = json.loads((tmp_path / "out" / "pissa_init" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, alpha, rslora)
    assert config["init_lora_weights"] is True
    assert_is_split(source, tmp_path / "out", LINEARS, scaling)


@pytest.mark.parametrize("options", [{}, {"alpha": 20}, {"rslora": True}, {"rank": 1}, {"rank": 24}])
@pytest.mark.filterwarnings("ignore")
def test_peft_on_the_residual_is_the_original_llama(tmp_path: Path, options: dict[str, object]) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "out", **options)  # type: ignore[arg-type]
    assert_same_outputs(tmp_path / "in", tmp_path / "out")


@pytest.mark.filterwarnings("ignore")
def test_peft_on_the_residual_is_the_original_gpt2_whose_weights_are_stored_in_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=48, n_layer=2, n_head=4, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "out", rank=6)
    assert json.loads((tmp_path / "out" / "pissa_init" / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    assert_same_outputs(tmp_path / "in", tmp_path / "out")


def assert_same_outputs(source: Path, dest: Path) -> None:
    tokens = torch.arange(20)[None]

    def logits(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(tokens).logits

    reference = logits(AutoModelForCausalLM.from_pretrained(source))
    residual = AutoModelForCausalLM.from_pretrained(dest)
    alone = logits(residual)
    result = logits(PeftModel.from_pretrained(residual, dest, subfolder="pissa_init"))
    assert (result - reference).abs().max() < 1e-5 * reference.abs().max()
    assert (alone - reference).abs().max() > 1e-2 * reference.abs().max()


def test_a_result_is_not_split_again(tmp_path: Path) -> None:
    source = write_model(tmp_path / "in", small_model())
    convert(source, tmp_path / "out", rank=4)
    with pytest.raises(RequestError, match="itself the residual"):
        convert(tmp_path / "out", tmp_path / "again", rank=4)


def test_float64_is_copied_where_it_is_not_a_target(tmp_path: Path) -> None:
    tensors = small_model() | {"model.rotary.inv_freq": torch.arange(9, dtype=torch.float64)}
    source = write_model(tmp_path / "in", tensors)
    convert(source, tmp_path / "out", rank=4)
    assert_is_split(source, tmp_path / "out", LINEARS)


def test_an_empty_tensor_is_copied(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "in", small_model())
    tensors = load_all(folder) | {"nothing": torch.zeros(0, 7)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    convert(folder, tmp_path / "out", rank=4)
    assert load_all(tmp_path / "out")["nothing"].shape == (0, 7)


def test_the_largest_matrix_may_be_taller_than_the_target(tmp_path: Path) -> None:
    tensors = {"a.up_proj.weight": llm_like(900, 64), "a.down_proj.weight": llm_like(64, 900)}
    source = write_model(tmp_path / "in", tensors)
    convert(source, tmp_path / "out", rank=64)
    assert_is_split(source, tmp_path / "out", {"a.up_proj", "a.down_proj"})
