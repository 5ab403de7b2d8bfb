"""What `--to qpissa` refuses, and what it takes although it looks odd."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from checkpoints import load_all, small_model, write_model

from pissa_convert import convert, plan
from pissa_convert.cli import main
from pissa_convert.errors import RequestError, WeightError
from pissa_convert.plans.quant_stats import overall

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_model(tmp_path / "in", small_model(dtype=torch.bfloat16))


def error(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line of a request that is refused."""
    assert main([str(argument) for argument in arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--quant", "int4"], "--quant is unknown: expected nf4 or fp4, found int4"),
        (["--iterations", "0"], "--iterations is out of range"),
        (["--compute-dtype", "float8"], "--compute-dtype is unknown"),
        (["--rank", "64"], "--rank is larger than the weight allows: expected at most 48"),
        (["--device", "tpu"], "--device is unknown: expected auto, cpu, cuda or cuda:N, found tpu"),
        (["--dtype", "float16"], "--dtype does not apply to --to qpissa"),
    ],
)
def test_options(
    capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path, options: list[str], said: str
) -> None:
    assert said in error(capsys, source, tmp_path / "out", "--to", "qpissa", *options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--iterations=2", "--quant=nf4", "--no-double-quant", "--quantize-only-targets"])
def test_its_options_are_refused_for_other_targets(
    capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path, option: str
) -> None:
    assert "does not apply to --to pissa" in error(capsys, source, tmp_path / "out", "--to", "pissa", option)


def test_a_quantised_model_is_refused(capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "4-bit", "qpissa", rank=4, iterations=1)
    again = [tmp_path / "4-bit", tmp_path / "out", "--to", "qpissa"]
    assert "itself the residual of a split" in error(capsys, *again)
    (tmp_path / "4-bit" / "pissa_convert.json").unlink()
    for file in (tmp_path / "4-bit" / "pissa_init").iterdir():
        file.unlink()
    assert "the model is quantised already" in error(capsys, *again)


def test_a_weight_that_is_not_finite_is_named(source: Path, tmp_path: Path) -> None:
    for number, name in enumerate((Q, "model.layers.1.mlp.down_proj.weight")):  # with and without an adapter
        tensors = small_model(dtype=torch.bfloat16)
        tensors[name][3, 5] = float("nan")
        broken = write_model(tmp_path / f"in-{number}", tensors)
        with pytest.raises(WeightError, match=f"{name}.*NaN or infinity"):
            convert(broken, tmp_path / f"out-{number}", "qpissa", rank=4, target_modules=["q_proj"])


def test_weights_that_are_not_whole_blocks_are_stored_as_bitsandbytes_stores_them(tmp_path: Path) -> None:
    tensors = small_model(dtype=torch.bfloat16)
    odd = {"model.layers.0.mlp.up_proj.weight": (7, 9), "model.layers.1.mlp.up_proj.weight": (3, 70)}
    generator = torch.Generator().manual_seed(0)
    tensors |= {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in odd.items()}
    convert(write_model(tmp_path / "in", tensors), tmp_path / "out", "qpissa", rank=4, target_modules=["q_proj"])
    stored = load_all(tmp_path / "out")
    for name in odd:
        packed, state = quantize_4bit(tensors[name], quant_type="nf4", compress_statistics=True)
        assert torch.equal(stored[name], packed)
        assert torch.equal(stored[f"{name}.absmax"], state.absmax)
        assert torch.equal(stored[f"{name}.nested_absmax"], state.state2.absmax)


def test_only_targets(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", "qpissa", rank=4, target_modules=["q_proj"], quantize_only_targets=True)
    before, after = load_all(source), load_all(tmp_path / "out")
    kept = {name for name, tensor in before.items() if name in after and torch.equal(tensor, after[name])}
    assert kept == {name for name in before if not name.endswith("q_proj.weight")}
    skipped = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    assert {"lm_head", "model.layers.0.mlp.gate_proj", "model.layers.1.self_attn.k_proj"} <= set(skipped)
    assert not any("q_proj" in name for name in skipped)


def test_a_name_that_ends_another_is_refused(tmp_path: Path) -> None:
    """transformers skips every module whose name ends as one in its list."""
    tensors = {"xlayer.weight": torch.randn(64, 64), "layer.weight": torch.randn(64, 64)}
    source = write_model(tmp_path / "in", tensors)
    with pytest.raises(RequestError, match="transformers would not quantise it"):
        plan(source, tmp_path / "out", "qpissa", rank=4, target_modules="xlayer", quantize_only_targets=True)


def test_a_model_whose_linear_layers_stay_whole_is_refused(tmp_path: Path) -> None:
    name = "transformer.h.0.self_attention.query_key_value.weight"
    source = write_model(tmp_path / "in", {name: torch.randn(96, 64)})
    (source / "config.json").write_text(
        json.dumps({"model_type": "falcon", "architectures": ["FalconForCausalLM"], "num_hidden_layers": 1})
    )
    with pytest.raises(RequestError, match="keeps all linear layers of this model in full precision"):
        plan(source, tmp_path / "out", "qpissa", rank=4)


def test_the_table_compares_with_loftq(capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path) -> None:
    arguments = [str(source), str(tmp_path / "out"), "--to", "qpissa", "--rank", "8", "--compare-loftq"]
    assert main(arguments) == 0
    table = capsys.readouterr().err
    assert "LoftQ's" in table
    entries = json.loads((tmp_path / "out" / "pissa_convert.json").read_text())["tensors"]
    together = overall(entries.values())
    assert together.loftq_reduction is not None
    assert f"{together.reduction:.1%}" in table
    assert f"{together.loftq_reduction:.1%}" in table
    assert together.reduction > together.loftq_reduction


def test_more_turns_are_never_worse(source: Path, tmp_path: Path) -> None:
    errors = []
    for turns in (1, 2, 5, 20):
        convert(source, tmp_path / str(turns), "qpissa", rank=8, iterations=turns)
        entries = json.loads((tmp_path / str(turns) / "pissa_convert.json").read_text())["tensors"]
        assert all(1 <= entry["iterations"] <= turns for entry in entries.values())
        errors.append({name: entry["relative_error"] for name, entry in entries.items()})
    for fewer, more in pairwise(errors):
        assert all(more[name] <= fewer[name] for name in fewer)
    assert overall_error(errors[3]) < overall_error(errors[0])


def overall_error(errors: dict[str, float]) -> float:
    return sum(value**2 for value in errors.values())


def test_zero_weights(tmp_path: Path) -> None:
    tensors = small_model(dtype=torch.bfloat16)
    tensors[Q] = torch.zeros_like(tensors[Q])
    report = convert(write_model(tmp_path / "in", tensors), tmp_path / "out", "qpissa", rank=4)
    assert report.tensors[Q]["relative_error"] == 0
