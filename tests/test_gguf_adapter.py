"""`--to gguf` of an adapter: its place in a base model's GGUF, exactly; and what llama.cpp makes of it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import llamacpp
import numpy as np
import pytest
import torch
from adapters import tensors_of, write
from blake3 import blake3
from checkpoints import load_all
from gguf_models import keys_of, packaged_smollm2, types_of, values_of
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from pissa_convert import convert, plan
from pissa_convert.cli import main
from pissa_convert.errors import RequestError, WeightError
from pissa_convert.formats.gguf import read_gguf

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

Q, K, V = (f"model.layers.0.self_attn.{side}_proj" for side in "qkv")
SHAPES = {Q: (24, 16), K: (8, 16), V: (8, 16)}
"""A llama of 6 heads, 2 key heads, 4 values each."""


@pytest.fixture(scope="module")
def trained(smol32: Path, tokens: list[int], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A LoRA of several ranks and scalings on SmolLM2, and the logits of PEFT's model."""
    model = AutoModelForCausalLM.from_pretrained(smol32, dtype=torch.float32)
    torch.manual_seed(0)
    config = LoraConfig(
        r=8,
        lora_alpha=24,
        use_rslora=True,
        target_modules="all-linear",
        rank_pattern={"down_proj": 12},
        alpha_pattern={"q_proj": 5},
    )
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.004 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("adapters") / "lora"
    adapted.save_pretrained(folder)
    with torch.no_grad():
        return folder, adapted.eval()(torch.tensor([tokens])).logits[0].double().numpy()


def to_gguf(source: Path, dest: Path, **options: Any) -> Any:
    return convert(source, dest, "gguf", **options)


def test_on_an_f32_base_the_logits_are_those_of_peft(
    trained: tuple[Path, Any], smol_gguf: dict[str, Path], tokens: list[int], tmp_path: Path
) -> None:
    folder, expected = trained
    to_gguf(folder, tmp_path / "lora.gguf", base_gguf=smol_gguf["F32"], outtype="f32")
    found = llamacpp.logits(smol_gguf["F32"], tokens, [tmp_path / "lora.gguf"])
    assert llamacpp.divergence(expected, llamacpp.logits(smol_gguf["F32"], tokens)) > 1e-3  # it does something
    assert np.abs(found - expected).max() < 0.01


def test_on_an_f16_base_the_distributions_are_those_of_peft(
    trained: tuple[Path, Any], smol_gguf: dict[str, Path], tokens: list[int], tmp_path: Path
) -> None:
    folder, expected = trained
    report = to_gguf(folder, tmp_path / "lora.gguf", base_gguf=smol_gguf["F16"])
    found = llamacpp.logits(smol_gguf["F16"], tokens, [tmp_path / "lora.gguf"])
    assert llamacpp.divergence(expected, found) < 1e-4
    assert llamacpp.top1(expected, found) > 0.99
    assert report.relative_error < 1e-3
    assert "--lora" in report.usage
    assert f"ADAPTER {tmp_path / 'lora.gguf'}" in report.usage


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K_M"])
def test_on_a_quantised_base_it_leads_towards_the_trained_model(
    kind: str, trained: tuple[Path, Any], smol_gguf: dict[str, Path], tokens: list[int], tmp_path: Path
) -> None:
    folder, expected = trained
    to_gguf(folder, tmp_path / "lora.gguf", base_gguf=smol_gguf[kind], outtype="q8_0")
    found = llamacpp.logits(smol_gguf[kind], tokens, [tmp_path / "lora.gguf"])
    assert llamacpp.divergence(expected, found) < llamacpp.divergence(
        expected, llamacpp.logits(smol_gguf[kind], tokens)
    )


def test_the_base_may_be_given_by_its_config_alone(
    trained: tuple[Path, Any], smol32: Path, smol_gguf: dict[str, Path], tmp_path: Path
) -> None:
    to_gguf(trained[0], tmp_path / "config.gguf", base=smol32)
    to_gguf(trained[0], tmp_path / "header.gguf", base_gguf=smol_gguf["F16"])
    found, expected = values_of(tmp_path / "config.gguf"), values_of(tmp_path / "header.gguf")
    assert found.keys() == expected.keys()
    assert all((found[name] == expected[name]).all() for name in found)


def test_a_trained_pissa_adapter_becomes_a_lora_for_the_original_on_the_way(
    smol32: Path, smol_gguf: dict[str, Path], tokens: list[int], tmp_path: Path
) -> None:
    convert(smol32, tmp_path / "split", rank=8, target_modules=["q_proj", "v_proj", "down_proj"])
    residual = AutoModelForCausalLM.from_pretrained(tmp_path / "split", dtype=torch.float32)
    model = PeftModel.from_pretrained(residual, tmp_path / "split", subfolder="pissa_init", is_trainable=True)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.02 * parameter.std() * torch.randn_like(parameter)
        expected = model.eval()(torch.tensor([tokens])).logits[0].double().numpy()
    model.save_pretrained(tmp_path / "trained")
    to_gguf(
        tmp_path / "trained",
        tmp_path / "lora.gguf",
        base_gguf=smol_gguf["F32"],
        init=tmp_path / "split",
        outtype="f32",
    )
    assert types_of(tmp_path / "lora.gguf")["blk.0.attn_q.weight.lora_a"] == "F32"
    assert values_of(tmp_path / "lora.gguf")["blk.0.attn_q.weight.lora_a"].shape == (16, 576)
    found = llamacpp.logits(smol_gguf["F32"], tokens, [tmp_path / "lora.gguf"])
    assert np.abs(found - expected).max() < 0.01
    report = to_gguf(
        tmp_path / "trained",
        tmp_path / "auto.gguf",
        base_gguf=smol_gguf["F32"],
        init=tmp_path / "split",
        rank="auto",
        tolerance=0.3,
    )
    ranks = {value.shape[0] for name, value in values_of(tmp_path / "auto.gguf").items() if name.endswith("lora_a")}
    assert max(ranks) < 16
    assert 0.01 < report.relative_error <= 0.3 * 1.01


BY_LLAMA_CPP = {
    "f32": "2b200be03946a4052ec9421a1785b36d388c4d4e9d5066734d74eacf25e2789d",
    "f16": "86cdc2b0b6844c66aacadc090108bea83a6d245c14d3131a23625ef41ee020cf",
    "q8_0": "cdff769b59fcc42c15b37096f285c261bb572abb8ac32e5b71886b8dd1c1525c",
}
"""SHA-256 over names, types and bytes of what llama.cpp's convert_lora_to_gguf.py made of the adapter below."""

SMOLLM2 = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}


@pytest.mark.parametrize("outtype", BY_LLAMA_CPP)
def test_every_byte_is_that_of_llama_cpps_own_conversion(outtype: str, tmp_path: Path) -> None:
    dice = np.random.default_rng(6)
    pairs = {
        f"model.layers.{number}.{module}": tuple(
            torch.tensor(dice.standard_normal(shape, np.float32)) for shape in ((4, columns), (rows, 4))
        )
        for number in (0, 29)
        for module, (rows, columns) in SMOLLM2.items()
    }
    folder = write(tmp_path / "lora", tensors_of(pairs), lora_alpha=4)  # type: ignore[arg-type]
    to_gguf(folder, tmp_path / "out.gguf", base_gguf=packaged_smollm2(), outtype=outtype)
    digest, data = hashlib.sha256(), (tmp_path / "out.gguf").read_bytes()
    for tensor in sorted(read_gguf(tmp_path / "out.gguf").tensors, key=lambda tensor: tensor.name):
        digest.update(tensor.name.encode() + tensor.dtype.encode() + data[tensor.begin : tensor.end])
    assert digest.hexdigest() == BY_LLAMA_CPP[outtype]


def tiny_base(folder: Path, architecture: str = "llama", **extra: tuple[int, ...]) -> Path:
    """A header to place adapters by: 6 heads and 2 key heads."""
    from gguf import GGUFWriter
    from gguf_models import add, finish

    writer = GGUFWriter(folder / f"{architecture}.gguf", architecture)
    writer.add_block_count(1)
    writer.add_head_count(6)
    writer.add_head_count_kv(2)
    shapes = {"blk.0.attn_q": (24, 16), "blk.0.attn_k": (8, 16), "blk.0.attn_v": (8, 16)}
    for name, shape in (extra or shapes).items():
        add(writer, f"{name}.weight", np.zeros(shape), "F32")
    if "blk.0.ffn_gate_exps" in extra:
        writer.add_expert_count(extra["blk.0.ffn_gate_exps"][0])
    return finish(writer)


def lora(folder: Path, shapes: dict[str, tuple[int, int]] = SHAPES, rank: int = 3, **config: Any) -> Path:
    generator = torch.Generator().manual_seed(5)
    pairs = {
        name: (torch.randn(rank, shape[1], generator=generator), torch.randn(shape[0], rank, generator=generator))
        for name, shape in shapes.items()
    }
    return write(folder, tensors_of(pairs), **config)


def interleaved(rows: int, heads: int) -> list[int]:
    """Which row of q goes where: within a head of n, rows 0, n/2, 1, n/2 + 1, …"""
    width = rows // heads
    return [head * width + half * width // 2 + i for head in range(heads) for i in range(width // 2) for half in (0, 1)]


def test_names_shapes_keys_and_the_order_of_rows(tmp_path: Path) -> None:
    folder = lora(tmp_path / "lora", lora_alpha=6)  # s = 2
    to_gguf(folder, tmp_path / "out.gguf", base_gguf=tiny_base(tmp_path), outtype="f32")
    assert {
        name: value for name, value in keys_of(tmp_path / "out.gguf").items() if "." in name and "GGUF" not in name
    } == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 0.0,
    }
    raw, found = load_all(folder), values_of(tmp_path / "out.gguf")
    assert [*found] == [f"blk.0.attn_{side}.weight.lora_{factor}" for side in "qkv" for factor in "ab"]
    for module, side, heads in ((Q, "q", 6), (K, "k", 2), (V, "v", None)):
        a, b = (raw[f"base_model.model.{module}.lora_{factor}.weight"].numpy() for factor in "AB")
        order = list(range(len(b))) if heads is None else interleaved(len(b), heads)
        assert (found[f"blk.0.attn_{side}.weight.lora_a"] == a).all()
        assert (found[f"blk.0.attn_{side}.weight.lora_b"] == 2 * b[order]).all()


def test_a_base_in_several_files_is_a_base_too(tmp_path: Path) -> None:
    from gguf import GGUFWriter
    from gguf_models import add, finish

    for number, (name, shape) in enumerate((("blk.0.attn_q", (24, 16)), ("blk.0.attn_k", (8, 16)))):
        writer = GGUFWriter(tmp_path / f"big-{number + 1:05d}-of-00002.gguf", "llama")
        writer.add_uint16("split.count", 2)
        writer.add_block_count(1)
        writer.add_head_count(6)
        writer.add_head_count_kv(2)
        add(writer, f"{name}.weight", np.zeros(shape), "F32")
        finish(writer)
    folder = lora(tmp_path / "lora", {Q: (24, 16), K: (8, 16)})
    to_gguf(folder, tmp_path / "out.gguf", base_gguf=tmp_path / "big-00002-of-00002.gguf", outtype="f32")
    to_gguf(folder, tmp_path / "one.gguf", base_gguf=tiny_base(tmp_path), outtype="f32")
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "one.gguf").read_bytes()
    with pytest.raises(RequestError, match="llama-gguf-split --merge"):
        plan(tmp_path / "big-00001-of-00002.gguf", tmp_path / "m.gguf", "merged", adapter=folder)
    (tmp_path / "big-00001-of-00002.gguf").unlink()
    with pytest.raises(RequestError, match=r"big-00001-of-00002\.gguf: the part is missing"):
        plan(folder, tmp_path / "again.gguf", "gguf", base_gguf=tmp_path / "big-00002-of-00002.gguf")


def test_qwen_keeps_the_order_of_its_rows(tmp_path: Path) -> None:
    folder = lora(tmp_path / "lora")
    to_gguf(folder, tmp_path / "out.gguf", base_gguf=tiny_base(tmp_path, "qwen3"), outtype="f32")
    b = load_all(folder)[f"base_model.model.{Q}.lora_B.weight"].numpy()
    assert (values_of(tmp_path / "out.gguf")["blk.0.attn_q.weight.lora_b"] == b).all()


def test_parts_of_a_fused_weight_are_put_side_by_side(tmp_path: Path) -> None:
    gate, up = "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"
    shapes = {Q: (24, 16), V: (8, 16), gate: (10, 16), up: (10, 16)}
    folder = lora(tmp_path / "lora", shapes)
    base = tiny_base(tmp_path, "phi3", **{"blk.0.attn_qkv": (40, 16), "blk.0.ffn_up": (20, 16)})
    to_gguf(folder, tmp_path / "out.gguf", base_gguf=base, outtype="f32")
    raw, found = load_all(folder), values_of(tmp_path / "out.gguf")

    def delta(module: str) -> Any:
        a, b = (raw[f"base_model.model.{module}.lora_{factor}.weight"].numpy() for factor in "AB")
        return b @ a

    def made(name: str) -> Any:
        return found[f"{name}.weight.lora_b"] @ found[f"{name}.weight.lora_a"]

    assert found["blk.0.attn_qkv.weight.lora_a"].shape == (6, 16)
    assert np.allclose(made("blk.0.attn_qkv"), np.vstack([delta(Q), np.zeros((8, 16)), delta(V)]), atol=1e-5)
    assert np.allclose(made("blk.0.ffn_up"), np.vstack([delta(gate), delta(up)]), atol=1e-5)


def test_a_fused_module_on_a_fused_weight(tmp_path: Path) -> None:
    folder = lora(tmp_path / "lora", {"model.layers.0.mlp.gate_up_proj": (20, 16)})
    base = tiny_base(tmp_path, "phi3", **{"blk.0.ffn_up": (20, 16)})
    to_gguf(folder, tmp_path / "out.gguf", base_gguf=base, outtype="f32")
    assert values_of(tmp_path / "out.gguf")["blk.0.ffn_up.weight.lora_b"].shape == (20, 3)


EXPERTS = {f"model.layers.0.mlp.experts.{number}.gate_proj": (10, 16) for number in range(4)}


def test_experts_are_stacked(tmp_path: Path) -> None:
    folder = lora(tmp_path / "lora", EXPERTS, rank_pattern={}, lora_alpha=3)
    base = tiny_base(tmp_path, "qwen3moe", **{"blk.0.ffn_gate_exps": (4, 10, 16)})
    to_gguf(folder, tmp_path / "out.gguf", base_gguf=base, outtype="f32")
    raw, found = load_all(folder), values_of(tmp_path / "out.gguf")
    for number, module in enumerate(EXPERTS):
        for side in "AB":
            expected = raw[f"base_model.model.{module}.lora_{side}.weight"].numpy()
            assert (found[f"blk.0.ffn_gate_exps.weight.lora_{side.lower()}"][number] == expected).all()


@pytest.mark.parametrize("count", [3, 5])
def test_another_number_of_experts_is_refused(count: int, tmp_path: Path) -> None:
    """llama.cpp does not look, and writes past the end."""
    folder = lora(tmp_path / "lora", EXPERTS)
    base = tiny_base(tmp_path, "qwen3moe", **{"blk.0.ffn_gate_exps": (count, 10, 16)})
    with pytest.raises(RequestError, match=f"expected {count} experts"):
        plan(folder, tmp_path / "out.gguf", "gguf", base_gguf=base)


def with_tensors(folder: Path, more: dict[str, torch.Tensor], **config: Any) -> Path:
    generator = torch.Generator().manual_seed(5)
    pairs = {Q: (torch.randn(3, 16, generator=generator), torch.randn(24, 3, generator=generator))}
    return write(folder, tensors_of(pairs) | more, **config)


PREFIX = "base_model.model."


def of(module: str, rows: int, columns: int, rank: int = 3) -> dict[str, tuple[int, ...]]:
    """Shapes of a module's factors."""
    return {f"{PREFIX}{module}.lora_A.weight": (rank, columns), f"{PREFIX}{module}.lora_B.weight": (rows, rank)}


EMBEDDING = f"{PREFIX}model.embed_tokens.lora_embedding"


@pytest.mark.parametrize(
    ("more", "config", "said"),
    [
        ({f"{EMBEDDING}_A": (3, 32), f"{EMBEDDING}_B": (16, 3)}, {}, "aborts"),
        (of("lm_head", 32, 16), {}, "tied to the embedding"),
        ({f"{PREFIX}lm_head.weight": (32, 16)}, {"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({f"{PREFIX}model.norm.weight": (16,)}, {}, "trained whole"),
        ({f"{PREFIX}{Q}.lora_B.bias": (24,)}, {"lora_bias": True}, "bias"),
        ({f"{PREFIX}{Q}.lora_magnitude_vector.weight": (24,)}, {"use_dora": True}, "DoRA"),
        ({f"{PREFIX}{K}.lora_A.weight": (3, 16)}, {}, "lora_B is missing"),
        (of(K, 9, 16), {}, "8 rows of blk.0.attn_k"),
        (of("model.layers.0.mlp.up_proj", 9, 16), {}, "a tensor blk.0.ffn_up.weight in it"),
        (of("model.layers.7.self_attn.q_proj", 24, 16), {}, "does not fit the base model"),
        (of("model.layers.0.odd", 24, 16), {}, r"model\.layers\.0\.odd"),
    ],
)
def test_what_llama_cpp_would_abort_on_or_ignore_is_refused(
    more: dict[str, tuple[int, ...]], config: dict[str, Any], said: str, tmp_path: Path
) -> None:
    tensors = {name: torch.ones(shape) for name, shape in more.items()}
    folder = with_tensors(tmp_path / "lora", tensors, **config)
    with pytest.raises(RequestError, match=said):
        to_gguf(folder, tmp_path / "out.gguf", base_gguf=tiny_base(tmp_path))
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("architecture", ["deepseek2", "gemma3n", "rwkv6", "minicpm3", "plm", "mamba"])
def test_architectures_that_do_not_apply_adapters_everywhere_are_refused(architecture: str, tmp_path: Path) -> None:
    base = tiny_base(tmp_path, architecture)
    with pytest.raises(RequestError, match="architecture"):
        plan(lora(tmp_path / "lora"), tmp_path / "out.gguf", "gguf", base_gguf=base)


def test_a_factor_whose_rows_are_no_whole_blocks_stays_f16(tmp_path: Path) -> None:
    shapes = {Q: (24, 32)}
    base = tiny_base(tmp_path, "qwen2", **{"blk.0.attn_q": (24, 32)})
    to_gguf(lora(tmp_path / "lora", shapes), tmp_path / "out.gguf", base_gguf=base, outtype="q8_0")
    assert types_of(tmp_path / "out.gguf") == {
        "blk.0.attn_q.weight.lora_a": "Q8_0",
        "blk.0.attn_q.weight.lora_b": "F16",
    }


def test_values_that_overflow_are_refused_by_name(tmp_path: Path) -> None:
    folder = lora(tmp_path / "lora", lora_alpha=3e6)
    with pytest.raises(WeightError, match=r"blk\.0\.attn_q\.weight.*overflows"):
        to_gguf(folder, tmp_path / "out.gguf", base_gguf=tiny_base(tmp_path))


def test_the_manifest_lies_beside_the_file_and_the_command_is_idempotent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, base, dest = lora(tmp_path / "lora"), tiny_base(tmp_path), tmp_path / "out" / "a.gguf"
    dest.parent.mkdir()
    (dest.parent / "other.txt").write_text("not ours")
    command = [str(folder), str(dest), "--to", "gguf", "--base-gguf", str(base)]
    assert main([*command, "--plan"]) == 0
    sizes = plan(folder, dest, "gguf", base_gguf=base).output_sizes
    assert f"{sum(sizes.values())} bytes in 2 files" in capsys.readouterr().out
    assert main(command) == 0
    assert sorted(path.name for path in dest.parent.iterdir()) == ["a.gguf", "a.gguf.pissa_convert.json", "other.txt"]
    assert {path.name: path.stat().st_size for path in dest.parent.glob("a*")} == sizes
    manifest = json.loads((dest.parent / "a.gguf.pissa_convert.json").read_text())
    assert manifest["output"]["a.gguf"]["blake3"] == blake3(dest.read_bytes()).hexdigest()
    assert manifest["tensors"]["blk.0.attn_q.weight"]["rank"] == 3
    assert convert(folder, dest, "gguf", base_gguf=base).complete_before
    before = dest.read_bytes()
    convert(folder, dest, "gguf", base_gguf=base, overwrite=True, threads=1)
    assert dest.read_bytes() == before


def test_a_file_that_is_not_ours_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "out.gguf").write_bytes(b"precious")
    with pytest.raises(RequestError, match="was not made by pissa-convert"):
        to_gguf(lora(tmp_path / "lora"), tmp_path / "out.gguf", base_gguf=tiny_base(tmp_path), overwrite=True)
    assert (tmp_path / "out.gguf").read_bytes() == b"precious"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "needs the base model"),
        ({"base_gguf": "base", "base": "base"}, "needs the base model"),
        ({"base_gguf": "base", "rank": 4}, "--rank goes with --init"),
        ({"base_gguf": "base", "seed": 4}, "--seed does not apply to --to gguf"),
        ({"base_gguf": "base", "outtype": "q4_k"}, "--outtype is unknown"),
        ({"base_gguf": "nowhere"}, "is not a file"),
    ],
)
def test_requests_that_are_wrong_in_themselves(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    base = tiny_base(tmp_path)
    options = {name: str(base) if value == "base" else value for name, value in options.items()}
    with pytest.raises(RequestError, match=said):
        plan(lora(tmp_path / "lora"), tmp_path / "out.gguf", "gguf", **options)


def test_the_name_of_the_result_ends_in_gguf_and_is_no_input(tmp_path: Path) -> None:
    base, folder = tiny_base(tmp_path), lora(tmp_path / "lora")
    for dest, said in ((tmp_path / "out", "ends in .gguf"), (base, "DEST is"), (folder / "o.gguf", "lies inside")):
        with pytest.raises(RequestError, match=said):
            plan(folder, dest, "gguf", base_gguf=base)


def test_the_packaged_model_of_another_type_is_a_base_too(
    trained: tuple[Path, Any], smol_layers: int, tmp_path: Path
) -> None:
    made = plan(trained[0], tmp_path / "out.gguf", "gguf", base_gguf=packaged_smollm2())
    assert len(made.tensors) == 7 * smol_layers
