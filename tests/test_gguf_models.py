"""Models as GGUF by a template; and what llama.cpp makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import llamacpp
import numpy as np
import pytest
import torch
from adapters import tensors_of, write
from checkpoints import load_all
from gguf_models import add, finish, keys_of, types_of, values_of
from gguf_small import permuted, random_lora, small_gguf
from safetensors.torch import save_file

from pissa_convert import convert, plan
from pissa_convert.cli import main
from pissa_convert.errors import RequestError, WeightError
from pissa_convert.formats.gguf import read_gguf
from pissa_convert.plans.gguf import steps
from pissa_convert.transforms import ggml


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
    outtype: str, smol32: Path, smol_gguf: dict[str, Path], tokens: list[int], smol_logits: Any, tmp_path: Path
) -> None:
    report = convert(smol32, tmp_path / "out.gguf", "gguf", base_gguf=smol_gguf["F16"], outtype=outtype)
    found = llamacpp.divergence(smol_logits, llamacpp.logits(tmp_path / "out.gguf", tokens))
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


def test_a_residual_folder_says_so_and_goes_with_its_adapter(
    smol32: Path, smol_gguf: dict[str, Path], tokens: list[int], smol_logits: Any, tmp_path: Path
) -> None:
    convert(smol32, tmp_path / "split", rank=16)
    report = convert(tmp_path / "split", tmp_path / "r.gguf", "gguf", base_gguf=smol_gguf["F32"], outtype="f32")
    assert "RESIDUAL" in report.warnings[0]
    assert "RESIDUAL" in keys_of(tmp_path / "r.gguf")["general.name"]
    adapter = tmp_path / "split" / "pissa_init"
    convert(adapter, tmp_path / "a.gguf", "gguf", base_gguf=tmp_path / "r.gguf", outtype="f32")
    assert np.abs(llamacpp.logits(tmp_path / "r.gguf", tokens, [tmp_path / "a.gguf"]) - smol_logits).max() < 0.01
    assert llamacpp.divergence(smol_logits, llamacpp.logits(tmp_path / "r.gguf", tokens)) > 1
    with pytest.raises(RequestError, match="still holds what the adapter took out"):
        convert(adapter, tmp_path / "b.gguf", "gguf", base_gguf=smol_gguf["Q8_0"])


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
    monkeypatch.setattr(steps, "VALUES", 64 * 6)
    convert(small, tmp_path / "b.gguf", "gguf", base_gguf=template, outtype="q5_0")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


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
