"""`--to merged`: never with an adapter of another model; what is refused, by name; and what `--plan` says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from adapters import lora_for, splits, to_merged, write
from checkpoints import small_model, write_model

from pissa_convert.cli import main
from pissa_convert.errors import ConversionError, RequestError, WeightError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_model(tmp_path / "in", small_model(), 2)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write(tmp_path / "adapter", lora_for(small_model()))


def copied(folder: Path, dest: Path, *without: str) -> Path:
    return Path(shutil.copytree(folder, dest, ignore=shutil.ignore_patterns(*without)))


@pytest.mark.parametrize(
    ("model", "adapter", "without", "named"),
    [
        ("split", "lora", (), "made for the original model"),
        ("split", "lora", ("pissa_convert.json",), "SOURCE is not the original model"),
        ("model", "trained", (), "still holds what the adapter took out of it"),
        ("model", "split/pissa_init", (), "is not the residual model beside it"),
        ("split", "foreign", (), "did not begin as its principal adapter"),
    ],
)
def test_the_wrong_base_is_caught_before_anything_is_written(
    tmp_path: Path, model: str, adapter: str, without: tuple[str, ...], named: str
) -> None:
    splits(tmp_path)
    write(tmp_path / "foreign", lora_for(small_model()))
    source = copied(tmp_path / model, tmp_path / "source", *without)
    with pytest.raises(RequestError, match=named):
        to_merged(source, tmp_path / "out", tmp_path / adapter)
    assert not (tmp_path / "out").exists()


def test_an_adapter_whose_manifest_is_lost_is_told_by_the_values(tmp_path: Path) -> None:
    source, split, adapter, lora = splits(tmp_path)
    bare = copied(lora, tmp_path / "bare", "pissa_convert.json")
    to_merged(source, tmp_path / "right", bare)
    with pytest.raises(RequestError, match="did not begin as its principal adapter"):
        to_merged(split, tmp_path / "wrong", bare)
    residual = copied(split, tmp_path / "residual", "pissa_convert.json", "pissa_init")
    to_merged(residual, tmp_path / "fine", adapter)


def test_a_shard_of_another_model_is_not_committed(tmp_path: Path) -> None:
    source, _, _, lora = splits(tmp_path)
    large = max(source.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    data = bytearray(large.read_bytes())
    data[-3] ^= 1
    large.write_bytes(data)
    with pytest.raises(ConversionError, match="not the model that the adapter belongs to"):
        to_merged(source, tmp_path / "out", lora)
    assert not (tmp_path / "out" / large.name).exists()
    assert not (tmp_path / "out" / "config.json").exists()


def test_the_same_model_in_other_files_is_merged_with_a_warning(tmp_path: Path) -> None:
    _, _, _, lora = splits(tmp_path)
    single = write_model(tmp_path / "single", small_model())
    report = to_merged(single, tmp_path / "out", lora)
    assert "only names and shapes were compared" in report.warnings[0]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"base_model.model.model.layers.7.self_attn.q_proj": (48, 48)}, "no weight for it"),
        ({"base_model.model.model.layers.0.self_attn.k_proj": (48, 48)}, "does not fit"),
        ({"base_model.model.model.layers.0.input_layernorm": (48, 48)}, "does not fit"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_by_name(
    source: Path, tmp_path: Path, change: dict[str, tuple[int, int]], named: str
) -> None:
    extra = {}
    for stem, (out, size_in) in change.items():
        extra |= {f"{stem}.lora_A.weight": torch.ones(4, size_in), f"{stem}.lora_B.weight": torch.ones(out, 4)}
    adapter = write(tmp_path / "a", lora_for(small_model()) | extra)
    with pytest.raises(RequestError, match=named) as caught:
        to_merged(source, tmp_path / "out", adapter)
    assert next(iter(change)) in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "tensor", "named"),
    [
        ("model.embed_tokens.weight", torch.zeros(99, 48), "the vocabulary grew"),
        ("model.embed_tokens.token_adapter.trainable_tokens_delta", torch.zeros(2, 48), "trainable_token_indices"),
        ("model.missing.weight", torch.zeros(2), "no weight for it"),
    ],
)
def test_what_was_trained_whole_and_has_no_place_is_refused(
    source: Path, tmp_path: Path, key: str, tensor: torch.Tensor, named: str
) -> None:
    adapter = write(tmp_path / "a", lora_for(small_model()) | {f"base_model.model.{key}": tensor})
    with pytest.raises(RequestError, match=named):
        to_merged(source, tmp_path / "out", adapter)


def test_quantised_models_are_refused(source: Path, adapter: Path, tmp_path: Path) -> None:
    (source / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(RequestError, match="quantised already"):
        to_merged(source, tmp_path / "out", adapter)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_named(tmp_path: Path, adapter: Path, value: float) -> None:
    model = small_model()
    model["model.layers.1.mlp.down_proj.weight"][3, 5] = value
    with pytest.raises(WeightError, match=r"layers\.1\.mlp\.down_proj.*NaN"):
        to_merged(write_model(tmp_path / "in", model), tmp_path / "out", adapter)
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_value_that_overflows_the_new_dtype_is_named(tmp_path: Path, adapter: Path) -> None:
    model = small_model()
    model["model.norm.weight"][7] = 1e6
    source = write_model(tmp_path / "in", model)
    with pytest.raises(WeightError, match=r"model\.norm\.weight.*overflows.*--dtype"):
        to_merged(source, tmp_path / "out", adapter, dtype="float16")
    to_merged(source, tmp_path / "fine", adapter, dtype="bfloat16")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "give --adapter"),
        (["--adapter", "ADAPTER", "--rank", "3"], "--rank does not apply to --to merged"),
        (["--adapter", "ADAPTER", "--init", "x"], "--init does not apply to --to merged"),
        (["--adapter", "ADAPTER", "--dtype", "int4"], "--dtype is unknown"),
        (["--adapter", "SOURCE"], "not a PEFT adapter"),
    ],
)
def test_options_are_refused_by_name(
    source: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    places = {"ADAPTER": str(adapter), "SOURCE": str(source)}
    words = [places.get(word, word) for word in arguments]
    assert main([str(source), str(tmp_path / "out"), "--to", "merged", *words]) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_plan_names_every_tensor_and_writes_nothing(
    source: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(source), str(tmp_path / "out"), "--to", "merged", "--adapter", str(adapter), "--plan"]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in small_model():
        line = next(line for line in lines if name in line)
        assert line.startswith("merge" if name.endswith("_proj.weight") else "copy")
    assert not (tmp_path / "out").exists()
