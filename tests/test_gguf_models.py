"""Models as GGUF: from a Hugging Face folder by a template, merged, and split; and what llama.cpp makes of them."""

from __future__ import annotations

import ctypes
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import llamacpp
import numpy as np
import pytest
import smollm2
import torch
from adapters import tensors_of, write
from checkpoints import digests, load_all
from gguf_models import add, finish, keys_of, smollm2_by_type, types_of, values_of
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pissa_convert import convert, gguf_steps, plan, verify
from pissa_convert.cli import main
from pissa_convert.errors import ConversionError, DamageError, RequestError, WeightError
from pissa_convert.formats.gguf import read_gguf
from pissa_convert.formats.gguf_types import TYPES
from pissa_convert.transforms import ggml

DYING = str(Path(__file__).parent / "faults" / "dying.py")
TYPES_WRITTEN = ("f32", "f16", "bf16", "q8_0", "q5_0", "q5_1", "q4_0", "q4_1", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k")


@pytest.fixture(scope="module")
def tokens(smol32: Path) -> list[int]:
    ids = AutoTokenizer.from_pretrained(smol32)(smollm2.TEXT)["input_ids"]
    return list(ids[:100])


@pytest.fixture(scope="module")
def original(smol_gguf: dict[str, Path], tokens: list[int]) -> Any:
    return llamacpp.logits(smol_gguf["F32"], tokens)


# --- the quantisers -------------------------------------------------------------------------------------------------


def by_llama_cpp(values: Any, kind: str) -> Any:
    library = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
    quantize = library.ggml_quantize_chunk
    quantize.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    rows, columns = values.shape
    blocks = np.zeros(rows * TYPES[kind].row_bytes(columns), np.uint8)
    quantize(TYPES[kind].number, values.ctypes.data, blocks.ctypes.data, 0, rows, columns, None)
    return blocks


def encoded(values: Any, kind: str) -> Any:
    out = np.empty(values.shape[0] * TYPES[kind].row_bytes(values.shape[1]), np.uint8)
    ggml.encode(values, kind, out.data)
    return out


@pytest.mark.parametrize("kind", [kind.upper() for kind in TYPES_WRITTEN])
@pytest.mark.parametrize("scale", [1e-7, 0.02, 3.0, 1e3])
def test_every_type_is_bit_identical_to_llama_cpps(kind: str, scale: float) -> None:
    values = np.random.default_rng(1).standard_normal((12, 512)).astype(np.float32) * np.float32(scale)
    values[0] = 0
    values[1, ::2] = 0
    values[2] = values[2, 0]
    values[3] *= np.geomspace(1e-3, 1, 512, dtype=np.float32)
    assert (encoded(values, kind) == by_llama_cpp(values, kind)).all()


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1"])
@given(
    values=arrays.arrays(
        np.float32, (2, 32), elements=st.floats(-60000, 60000, width=32, allow_subnormal=False), fill=st.nothing()
    )
)
@settings(max_examples=60, deadline=None)
def test_any_values_are_stored_as_llama_cpp_stores_them(kind: str, values: Any) -> None:
    assert (encoded(values, kind) == by_llama_cpp(values, kind)).all()


def test_the_types_are_those_of_the_gguf_package() -> None:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    for name, kind in TYPES.items():
        assert GGML_QUANT_SIZES[GGMLQuantizationType[name]] == (kind.block, kind.nbytes)
        assert GGMLQuantizationType[name] == kind.number


# --- a Hugging Face model by a template -----------------------------------------------------------------------------


def test_f32_has_every_value_and_key_of_the_models_own_gguf(
    smol32: Path, smol_gguf: dict[str, Path], tmp_path: Path
) -> None:
    """420 of 420 would be an adapter's; here all tensors, with q and k permuted."""
    convert(smol32, tmp_path / "out.gguf", "gguf", base_gguf=smol_gguf["Q4_K_M"], outtype="f32")
    found, expected = values_of(tmp_path / "out.gguf"), values_of(smol_gguf["F32"])
    assert [*found] == [*values_of(smol_gguf["Q4_K_M"])]
    assert all((found[name] == expected[name]).all() for name in expected)
    made, template = read_gguf(tmp_path / "out.gguf"), read_gguf(smol_gguf["Q4_K_M"])
    assert made.values["general.file_type"] == 0
    differ = {
        name for name in made.pairs.keys() | template.pairs.keys() if made.pairs.get(name) != template.pairs.get(name)
    }
    assert differ == {"general.file_type"}


@pytest.mark.parametrize(("template", "outtype"), [("Q8_0", "template"), ("Q4_K_M", "template"), ("F32", "f16")])
def test_the_file_is_llama_quantizes_own(
    template: str, outtype: str, smol32: Path, smol_gguf: dict[str, Path], tmp_path: Path
) -> None:
    """An _M mix is what the template has, tensor by tensor."""
    report = convert(smol32, tmp_path / "out.gguf", "gguf", base_gguf=smol_gguf[template], outtype=outtype)
    wanted = smol_gguf[template if outtype == "template" else outtype.upper()]
    assert types_of(tmp_path / "out.gguf") == types_of(wanted)
    found, expected = values_of(tmp_path / "out.gguf"), values_of(wanted)
    assert all((found[name] == expected[name]).all() for name in expected)
    worst = max(
        np.linalg.norm(found[name] - exact) / np.linalg.norm(exact)
        for name, exact in values_of(smol_gguf["F32"]).items()
    )
    assert report.relative_error == pytest.approx(worst, rel=1e-3)


@pytest.mark.parametrize("outtype", ["f16", "bf16", "q8_0", "q5_1", "q4_k"])
def test_llama_cpp_runs_what_comes_out(
    outtype: str, smol32: Path, smol_gguf: dict[str, Path], tokens: list[int], original: Any, tmp_path: Path
) -> None:
    report = convert(smol32, tmp_path / "out.gguf", "gguf", base_gguf=smol_gguf["F16"], outtype=outtype)
    found = llamacpp.divergence(original, llamacpp.logits(tmp_path / "out.gguf", tokens))
    assert found < {"f16": 1e-4, "bf16": 2e-3, "q8_0": 0.01, "q5_1": 0.1, "q4_k": 0.3}[outtype]
    assert f"llama-server -m {tmp_path / 'out.gguf'}" in report.usage


def test_a_merged_folder_and_a_merged_gguf_are_the_same_model(
    smol32: Path, smol_gguf: dict[str, Path], tokens: list[int], tmp_path: Path
) -> None:
    adapter = random_lora(smol32, tmp_path / "lora")
    convert(smol32, tmp_path / "merged", "merged", adapter=adapter)
    convert(tmp_path / "merged", tmp_path / "a.gguf", "gguf", base_gguf=smol_gguf["Q8_0"], outtype="f32")
    convert(smol_gguf["F32"], tmp_path / "b.gguf", "merged", adapter=adapter)
    first, second = (llamacpp.logits(tmp_path / name, tokens) for name in ("a.gguf", "b.gguf"))
    assert np.abs(first - second).max() < 0.01
    assert llamacpp.divergence(first, llamacpp.logits(smol_gguf["F32"], tokens)) > 1e-3


def random_lora(model: Path, folder: Path, scale: float = 0.003, rank: int = 4, seed: int = 3) -> Path:
    generator = torch.Generator().manual_seed(seed)
    pairs = {
        name.removesuffix(".weight"): (
            torch.randn(rank, tensor.shape[1], generator=generator),
            scale * torch.randn(tensor.shape[0], rank, generator=generator),
        )
        for name, tensor in load_all(model).items()
        if name.endswith("_proj.weight")
    }
    return write(folder, tensors_of(pairs), target_modules="all-linear")


def test_a_residual_folder_says_so_and_goes_with_its_adapter(
    smol32: Path, smol_gguf: dict[str, Path], tokens: list[int], original: Any, tmp_path: Path
) -> None:
    convert(smol32, tmp_path / "split", rank=16)
    report = convert(tmp_path / "split", tmp_path / "r.gguf", "gguf", base_gguf=smol_gguf["F32"], outtype="f32")
    assert "RESIDUAL" in report.warnings[0]
    assert "RESIDUAL" in keys_of(tmp_path / "r.gguf")["general.name"]
    adapter = tmp_path / "split" / "pissa_init"
    convert(adapter, tmp_path / "a.gguf", "gguf", base_gguf=tmp_path / "r.gguf", outtype="f32")
    assert np.abs(llamacpp.logits(tmp_path / "r.gguf", tokens, [tmp_path / "a.gguf"]) - original).max() < 0.01
    assert llamacpp.divergence(original, llamacpp.logits(tmp_path / "r.gguf", tokens)) > 1
    with pytest.raises(RequestError, match="still holds what the adapter took out"):
        convert(adapter, tmp_path / "b.gguf", "gguf", base_gguf=smol_gguf["Q8_0"])


# --- a small llama, for everything that needs no real model -----------------------------------------------------------

CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "tie_word_embeddings": False,
}


def permuted(rows: Any, heads: int) -> Any:
    width = rows.shape[0] // heads
    order = [
        head * width + half * width // 2 + i for head in range(heads) for i in range(width // 2) for half in (0, 1)
    ]
    return rows[order]


NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def small_gguf(
    model: dict[str, torch.Tensor],
    path: Path,
    kind: str = "F16",
    skip: str = "nothing",
    architecture: str = "llama",
    is_permuted: bool = True,
    norms: float = 0.0,
) -> Path:
    """A llama's GGUF, written with the gguf package and the names above."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_block_count(3)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    for name, tensor in model.items():
        values = tensor.float().numpy()
        if name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
            named = {"model.e": "token_embd", "lm_head": "output", "model.n": "output_norm"}[name[:7]]
        else:
            _, _, number, module = name.removesuffix(".weight").split(".", 3)
            named = f"blk.{number}.{NAMES[module]}"
            if module.endswith(("q_proj", "k_proj")) and is_permuted:
                values = permuted(values, 4 if "q_" in module else 2)
        if named.endswith("norm"):
            values = values + np.float32(norms)
        if skip != named:
            add(writer, f"{named}.weight", values, kind if values.ndim > 1 else "F32")
    add(writer, "rope_freqs.weight", np.ones(8), "F32")
    return finish(writer)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).to(torch.bfloat16)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.rand_like(parameter)
    model.save_pretrained(tmp_path / "model", max_shard_size="60KB")
    return tmp_path / "model"


@pytest.fixture
def template(small: Path, tmp_path: Path) -> Path:
    return small_gguf(load_all(small), tmp_path / "template.gguf")


def test_plan_says_what_becomes_of_every_tensor(
    small: Path, template: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(small), str(tmp_path / "out.gguf"), "--to", "gguf", "--base-gguf", str(template)]
    assert main([*command, "--outtype", "q8_0", "--plan"]) == 0
    shown = capsys.readouterr().out
    assert "copy   rope_freqs.weight" in shown
    assert "encode blk.0.attn_q.weight       model.layers.0.self_attn.q_proj.weight rows permuted → Q8_0" in shown
    assert not (tmp_path / "out.gguf").exists()
    sizes = plan(small, tmp_path / "out.gguf", "gguf", base_gguf=template, outtype="q8_0").output_sizes
    assert main([*command, "--outtype", "q8_0", "--quiet"]) == 0
    assert {name: (tmp_path / name).stat().st_size for name in sizes} == sizes


def test_threads_and_memory_change_no_byte(small: Path, template: Path, tmp_path: Path) -> None:
    for name, options in (("a", {"threads": 1}), ("b", {"threads": 3})):
        convert(small, tmp_path / f"{name}.gguf", "gguf", base_gguf=template, outtype="q4_1", **options)  # type: ignore[arg-type]
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_many_steps_give_the_bytes_of_one(
    small: Path, template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(small, tmp_path / "a.gguf", "gguf", base_gguf=template, outtype="q5_0")
    monkeypatch.setattr(gguf_steps, "VALUES", 64 * 6)
    convert(small, tmp_path / "b.gguf", "gguf", base_gguf=template, outtype="q5_0")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


@pytest.mark.parametrize("kind", ["model", "adapter", "merged", "split"])
def test_killed_at_any_rename_the_same_command_continues(
    kind: str, small: Path, template: Path, tmp_path: Path
) -> None:
    lora = random_lora(small, tmp_path / "lora")
    command = {
        "model": [str(small), "out.gguf", "--to", "gguf", "--base-gguf", str(template), "--outtype", "q8_0"],
        "adapter": [str(lora), "out.gguf", "--to", "gguf", "--base-gguf", str(template)],
        "merged": [str(template), "out.gguf", "--to", "merged", "--adapter", str(lora)],
        "split": [str(template), "out", "--to", "pissa", "--rank", "4"],
    }[kind]
    run_in(tmp_path / "whole", [sys.executable, "-m", "pissa_convert", *command])
    killed = 0
    for rename in range(1, 5):
        folder = tmp_path / f"killed-{rename}"
        if run_in(folder, [sys.executable, DYING, "replace", str(rename), "before", *command]) == 0:
            break
        killed += 1
        assert not [*folder.rglob("*pissa_convert.json")]
        assert run_in(folder, [sys.executable, "-m", "pissa_convert", *command]) == 0
        assert digests(folder) == digests(tmp_path / "whole")
    assert killed == (3 if kind == "split" else 2)


def run_in(folder: Path, command: list[str]) -> int:
    folder.mkdir(exist_ok=True)
    code = subprocess.run([*command, "--quiet"], cwd=folder).returncode
    assert code in (0, -signal.SIGKILL)
    return code


def test_the_peak_of_memory_is_what_the_plan_says(tmp_path: Path) -> None:
    """A model far larger than the budget, in a process of its own."""
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "big.gguf", "llama")
    writer.add_block_count(8)
    writer.add_head_count(8)
    dice = np.random.default_rng(0)
    for number in range(8):
        add(writer, f"blk.{number}.ffn_up.weight", dice.standard_normal((4096, 2048), np.float32), "F32")
    base = finish(writer)
    pairs = {f"model.layers.{n}.mlp.up_proj": (torch.randn(4, 2048), torch.randn(4096, 4)) for n in range(8)}
    lora = write(tmp_path / "lora", tensors_of(pairs))
    limit = 320 << 20
    command = [str(base), "out.gguf", "--to", "merged", "--adapter", str(lora), "--outtype", "q4_1"]
    command += ["--max-memory", str(limit), "--log-json", "log.json"]
    assert run_in(tmp_path, [sys.executable, "-m", "pissa_convert", *command]) == 0
    assert base.stat().st_size > 250 << 20
    assert json.loads((tmp_path / "log.json").read_text())["peak_memory"] <= limit


def test_an_interrupted_run_keeps_what_its_digests_prove(
    small: Path, template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pissa_convert.engine import gguf as engine

    dest, asked = tmp_path / "out.gguf", {"base_gguf": template, "outtype": "q8_0", "threads": 1}
    convert(small, tmp_path / "whole.gguf", "gguf", **asked)
    done = []

    def failing(*arguments: Any) -> Any:
        done.append(arguments)
        if len(done) == 9:
            raise ConversionError("the power fails")
        return ggml.store(*arguments)

    monkeypatch.setattr(engine, "store", failing)
    with pytest.raises(ConversionError, match="power"):
        convert(small, dest, "gguf", **asked)
    assert not dest.exists()
    assert (tmp_path / ".out.gguf.pissa-convert.journal").exists()
    with pytest.raises(RequestError, match="interrupted conversion in which --outtype"):
        convert(small, dest, "gguf", base_gguf=template, outtype="f16")
    del done[:]
    done += [()] * 9
    before = len(done)
    assert convert(small, dest, "gguf", **asked).resumed
    assert len(done) - before < len(values_of(dest)) - 4
    assert dest.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert convert(small, dest, "gguf", **asked).complete_before


def changed(model: Path, dest: Path, change: Any) -> Path:
    """A copy of a model in one file, with its tensors changed."""
    tensors = load_all(model)
    change(tensors)
    dest.mkdir()
    (dest / "config.json").write_bytes((model / "config.json").read_bytes())
    save_file(tensors, dest / "model.safetensors", metadata={"format": "pt"})
    return dest


def another(tensors: dict[str, torch.Tensor]) -> None:
    torch.manual_seed(9)
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = torch.randn_like(tensors[name])


def unpermuted(tensors: dict[str, torch.Tensor]) -> None:
    for name in tensors:
        if name.endswith("q_proj.weight"):
            tensors[name] = torch.tensor(permuted(tensors[name].float().numpy(), 4)).bfloat16()


def more_words(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.embed_tokens.weight"] = torch.zeros(129, 64)


def a_layer_more(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.3.mlp.up_proj.weight"] = torch.zeros(96, 64)


def a_tensor_less(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"]


def an_odd_one(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.odd.weight"] = torch.zeros(96, 64)


def integers(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(96, 64, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (another, r"blk\.1\.ffn_down\.weight.*nothing in common"),
        (unpermuted, r"blk\.0\.attn_q\.weight.*nothing in common"),
        (more_words, r"model\.embed_tokens\.weight.*expected shape \[128, 64\]"),
        (a_layer_more, r"model\.layers\.3"),
        (a_tensor_less, r"blk\.1\.ffn_up\.weight"),
        (an_odd_one, r"model\.layers\.1\.mlp\.odd\.weight"),
        (integers, r"up_proj.*dtype"),
    ],
)
def test_a_template_of_another_model_is_refused_by_name(
    change: Any, said: str, small: Path, template: Path, tmp_path: Path
) -> None:
    model = changed(small, tmp_path / "changed", change)
    with pytest.raises(RequestError, match=said):
        plan(model, tmp_path / "out.gguf", "gguf", base_gguf=template)


@pytest.mark.parametrize("is_permuted", [True, False])
@pytest.mark.parametrize("norms", [0.0, 1.0])
def test_the_order_of_an_architecture_that_is_not_known_is_what_the_templates_values_show(
    is_permuted: bool, norms: float, small: Path, tmp_path: Path
) -> None:
    tensors = load_all(small)
    other: dict[str, Any] = {"architecture": "xverse", "is_permuted": is_permuted, "norms": norms}
    template = small_gguf(tensors, tmp_path / "t.gguf", "Q4_0", **other)
    convert(small, tmp_path / "out.gguf", "gguf", base_gguf=template, outtype="f32")
    found, expected = (
        values_of(tmp_path / "out.gguf"),
        values_of(small_gguf(tensors, tmp_path / "e.gguf", "F32", **other)),
    )
    assert all((found[name] == expected[name]).all() for name in expected)
    with pytest.raises(RequestError, match="how this architecture orders the rows"):
        plan(random_lora(small, tmp_path / "lora"), tmp_path / "a.gguf", "gguf", base_gguf=template)


def test_a_template_whose_head_is_tied_is_no_template_of_a_model_whose_head_is_not(small: Path, tmp_path: Path) -> None:
    template = small_gguf(load_all(small), tmp_path / "tied.gguf", skip="output")
    with pytest.raises(RequestError, match=r"lm_head\.weight.*expected a tensor output\.weight"):
        plan(small, tmp_path / "out.gguf", "gguf", base_gguf=template)


def test_values_that_are_no_numbers_stop_the_work_by_name(small: Path, template: Path, tmp_path: Path) -> None:
    def broken(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.2.mlp.up_proj.weight"][95, 3] = float("nan")

    model = changed(small, tmp_path / "changed", broken)
    with pytest.raises(WeightError, match=r"model\.layers\.2\.mlp\.up_proj\.weight.*NaN"):
        convert(model, tmp_path / "out.gguf", "gguf", base_gguf=template)
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "takes the tokenizer and all keys of a model from a template"),
        ({"base_gguf": "t", "outtype": "iq2_xs"}, "--outtype is unknown"),
        ({"base_gguf": "t", "rank": 4}, "--rank does not apply to --to gguf of a model"),
        ({"base_gguf": "t", "dtype": "float16"}, "--dtype does not apply to --to gguf of a model"),
    ],
)
def test_requests_that_are_wrong_in_themselves(
    options: dict[str, Any], said: str, small: Path, template: Path, tmp_path: Path
) -> None:
    options = {name: template if value == "t" else value for name, value in options.items()}
    with pytest.raises(RequestError, match=said):
        plan(small, tmp_path / "out.gguf", "gguf", **options)


def test_without_ggml_k_quants_are_refused_with_what_to_install(
    small: Path, template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ggml, "_library", lambda: None)
    model = small_gguf_of_width_256(tmp_path)
    with pytest.raises(RequestError, match="pip install libggml-python"):
        plan(model, tmp_path / "out.gguf", "merged", adapter=wide_lora(tmp_path), outtype="q4_k")


def small_gguf_of_width_256(folder: Path) -> Path:
    from gguf import GGUFWriter

    writer = GGUFWriter(folder / "wide.gguf", "llama")
    writer.add_block_count(1)
    writer.add_head_count(4)
    add(writer, "blk.0.attn_v.weight", np.random.default_rng(0).standard_normal((32, 256)), "F16")
    return finish(writer)


def wide_lora(folder: Path) -> Path:
    pairs = {"model.layers.0.self_attn.v_proj": (torch.randn(2, 256), torch.randn(32, 2))}
    return write(folder / "wide-lora", tensors_of(pairs))


# --- merged -----------------------------------------------------------------------------------------------------------


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


# --- split ------------------------------------------------------------------------------------------------------------


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


def split_files(folder: Path) -> tuple[Path, Path]:
    """The residual and the adapter."""
    residual, adapter = sorted(folder.glob("*.gguf"))  # in this order: capitals come first
    return residual, adapter


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


# --- verify -----------------------------------------------------------------------------------------------------------


def results(small: Path, template: Path, folder: Path) -> dict[str, tuple[Path, Path, dict[str, Any]]]:
    """Each kind of result, with what it was made from."""
    lora = random_lora(small, folder / "lora", scale=0.05)
    convert(small, folder / "split", rank=4)
    initial = load_all(folder / "split" / "pissa_init")
    trained = write(
        folder / "trained",
        {name: t + 0.1 * t.std() * torch.randn_like(t) for name, t in initial.items()},
        r=4,
        lora_alpha=4,
        target_modules="all-linear",
    )
    made: dict[str, tuple[Path, Path, dict[str, Any], str]] = {
        "model": (folder / "m.gguf", small, {"base_gguf": template}, "gguf"),
        "adapter": (folder / "a.gguf", lora, {"base_gguf": template}, "gguf"),
        "delta": (folder / "d.gguf", trained, {"base_gguf": template, "init": folder / "split"}, "gguf"),
        "merged": (folder / "g.gguf", template, {"adapter": lora}, "merged"),
        "split": (folder / "out", template, {}, "pissa"),
    }
    own = {"model": {"outtype": "q5_1"}, "delta": {"rank": "auto", "tolerance": 0.4}, "split": {"rank": 4}}
    for name, (dest, source, others, to) in made.items():
        convert(source, dest, to, **others, **own.get(name, {}))  # type: ignore[call-overload]
    return {name: (dest, source, others) for name, (dest, source, others, _) in made.items()}


def test_every_result_is_verified_and_every_flipped_bit_is_found(small: Path, template: Path, tmp_path: Path) -> None:
    for name, (dest, source, others) in results(small, template, tmp_path).items():
        assert verify(dest).files in (2, 3)
        found = verify(dest, source, **others)
        assert found.tensors > 0, name
        weights = dest if dest.is_file() else split_files(dest)[0]
        data = bytearray(weights.read_bytes())
        data[len(data) * 2 // 3] ^= 0x40
        weights.write_bytes(data)
        for origins in ({}, {"source": source, **others}):
            with pytest.raises(DamageError, match=weights.name):
                verify(dest, **origins)


def test_another_adapter_than_the_one_that_was_merged_is_found(small: Path, template: Path, tmp_path: Path) -> None:
    lora = random_lora(small, tmp_path / "lora", scale=0.05)
    convert(template, tmp_path / "out.gguf", "merged", adapter=lora)
    other = random_lora(small, tmp_path / "other", scale=0.05, seed=8)
    with pytest.raises(DamageError) as caught:
        verify(tmp_path / "out.gguf", template, adapter=other)
    assert any("its values are not what they should be" in str(finding) for finding in caught.value.findings)


def test_verify_from_the_command_line(
    small: Path, template: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(small, tmp_path / "out.gguf", "gguf", base_gguf=template, outtype="q8_0")
    command = [str(tmp_path / "out.gguf"), "--verify", "--source", str(small), "--base-gguf", str(template)]
    assert main(command) == 0
    assert "what is stored within" in capsys.readouterr().err
    assert main([str(tmp_path / "nothing.gguf"), "--verify"]) == 2
    assert "no finished conversion" in capsys.readouterr().err


# --- the whole of SmolLM2 ---------------------------------------------------------------------------------------------


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
