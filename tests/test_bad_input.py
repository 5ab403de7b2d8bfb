"""What users do wrong and what files hold by accident: one line, the right exit code, nothing left that loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import digests, small_model, write_model
from safetensors.torch import load_file, save_file

from pissa_convert.cli import main

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A good model of three shards."""
    return write_model(tmp_path / "in", small_model(), 3)


def shard_of(source: Path, tensor: str) -> Path:
    index = json.loads((source / "model.safetensors.index.json").read_text())
    return source / index["weight_map"][tensor]


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str]:
    """Exit code and the one line of the error."""
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("error: ")
    return code, lines[0]


def edit_tensor(file: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(file)
    tensors[name] = change(tensors[name])
    save_file(tensors, file, metadata={"format": "pt"})


def assert_does_not_load(dest: Path) -> None:
    assert not (dest / "config.json").exists()
    assert not (dest / "pissa_convert.json").exists()
    assert not (dest / "pissa_init" / "adapter_config.json").exists()


def test_a_missing_shard(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = shard_of(source, Q)
    shard.unlink()
    code, line = run(capsys, source, tmp_path / "out", "--to", "pissa", "--rank", "4")
    assert code == 2
    assert shard.name in line
    assert "missing" in line
    assert not (tmp_path / "out").exists()


def test_a_truncated_shard(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = shard_of(source, Q)
    size = shard.stat().st_size
    os.truncate(shard, size - 100)
    code, line = run(capsys, source, tmp_path / "out", "--to", "pissa", "--rank", "4")
    assert code == 2
    assert shard.name in line
    assert f"expected {size} bytes, found {size - 100}" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["moved", "extra", "absent"])
def test_an_index_that_disagrees_with_the_shards(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    weight_map = index["weight_map"]
    if kind == "moved":
        weight_map[Q] = next(name for name in weight_map.values() if name != weight_map[Q])
    elif kind == "extra":
        weight_map["model.ghost.weight"] = weight_map[Q]
    else:
        del weight_map[Q]
    path.write_text(json.dumps(index))
    code, line = run(capsys, source, tmp_path / "out", "--to", "pissa", "--rank", "4")
    assert code == 2
    assert path.name in line
    assert ("model.ghost.weight" if kind == "extra" else Q) in line
    assert not (tmp_path / "out").exists()


def test_a_rank_that_is_too_large(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, line = run(capsys, source, tmp_path / "out", "--to", "pissa", "--rank", "25")
    assert code == 2
    assert "k_proj.weight" in line
    assert "at most 24" in line
    assert "found 25" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--rank", "0"),
        ("--alpha", "0"),
        ("--alpha", "-1"),
        ("--alpha", "nan"),
        ("--passes", "0"),
        ("--seed", "-1"),
        ("--threads", "0"),
        ("--adapter-dtype", "int8"),
        ("--max-memory", "much"),
        ("--max-memory", "1KB"),
    ],
)
def test_values_out_of_range(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: str
) -> None:
    code, line = run(capsys, source, tmp_path / "out", "--to", "pissa", option, value)
    assert code == 2
    assert option in line
    assert not (tmp_path / "out").exists()


def test_no_tensor_matches_the_targets(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, line = run(capsys, source, tmp_path / "out", "--to", "pissa", "--target-modules", "query", "value")
    assert code == 2
    assert "query" in line
    assert "down_proj" in line, "it names modules that exist"
    assert not (tmp_path / "out").exists()


def test_an_unknown_dtype(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = shard_of(source, Q)
    shard.write_bytes(shard.read_bytes().replace(b'"dtype":"F32"', b'"dtype":"F99"', 1))
    code, line = run(capsys, source, tmp_path / "out", "--to", "pissa", "--rank", "4")
    assert code == 2
    assert shard.name in line
    assert "F99" in line
    assert "tensor '" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_a_target_in_a_dtype_that_cannot_be_split(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: torch.dtype
) -> None:
    edit_tensor(shard_of(source, Q), Q, lambda weight: weight.to(dtype))
    code, line = run(capsys, source, tmp_path / "out", "--to", "pissa", "--rank", "4")
    assert code == 2
    assert Q in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], value: float
) -> None:
    def spoil(weight: torch.Tensor) -> torch.Tensor:
        weight[5, 6] = value
        return weight

    edit_tensor(shard_of(source, Q), Q, spoil)
    before = digests(source)
    code, line = run(capsys, source, tmp_path / "out", "--to", "pissa", "--rank", "4")
    assert code == 1
    assert Q in line
    assert shard_of(source, Q).name in line
    assert "NaN" in line
    assert_does_not_load(tmp_path / "out")
    assert digests(source) == before


def test_a_destination_that_is_not_empty(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    for extra in ([], ["--overwrite"]):
        code, line = run(capsys, source, tmp_path / "out", "--to", "pissa", "--rank", "4", *extra)
        assert code == 2
        assert "thesis.tex" in line
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("inside", [".", "deeper", "a/b"])
def test_a_destination_inside_the_source(source: Path, capsys: pytest.CaptureFixture[str], inside: str) -> None:
    before = digests(source)
    code, line = run(capsys, source, source / inside, "--to", "pissa", "--rank", "4")
    assert code == 2
    assert "SOURCE" in line
    assert digests(source) == before


def test_a_destination_that_reaches_the_source_through_a_link(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "link").symlink_to(source)
    code, _ = run(capsys, source, tmp_path / "link" / "out", "--to", "pissa", "--rank", "4")
    assert code == 2
    assert not (source / "out").exists()


@pytest.mark.parametrize(
    "arguments", [["--to", "pissa", "--sweeps", "5"], ["--to", "nonsense"], [], ["--to", "pissa", "--rank", "x"]]
)
def test_options_that_do_not_exist(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    code, line = run(capsys, source, tmp_path / "out", *arguments)
    assert code == 2
    assert "--help" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["nothing", "bin", "adapter", "file"])
def test_a_source_that_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str) -> None:
    source = tmp_path / "in"
    if content == "file":
        source.write_text("")
    else:
        source.mkdir()
    if content == "bin":
        (source / "pytorch_model.bin").write_bytes(b"pickle")
    if content == "adapter":
        save_file({"x": torch.zeros(1)}, source / "adapter_model.safetensors")
    code, line = run(capsys, source, tmp_path / "out", "--to", "pissa")
    assert code == 2
    assert {"bin": "save_pretrained", "adapter": "adapter", "nothing": "no weights", "file": "folder"}[content] in line
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_quantised_already(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    code, line = run(capsys, source, tmp_path / "out", "--to", "pissa")
    assert code == 2
    assert "gptq" in line


def test_names_cannot_write_to_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "model.\x1b[31mred\nline.weight"
    source = write_model(tmp_path / "in", {name: torch.full((8, 8), torch.nan)})
    code, line = run(capsys, source, tmp_path / "out", "--to", "pissa", "--rank", "2")
    assert code == 1
    assert "\x1b" not in line
    assert "red" in line


def test_a_failed_run_leaves_no_traceback_and_no_torch(source: Path, tmp_path: Path) -> None:
    """The CPU path of the command line never imports torch."""
    code = (
        "import sys; from pissa_convert.cli import main; code = main(sys.argv[1:]);"
        "assert 'torch' not in sys.modules, 'torch was imported'; sys.exit(code)"
    )
    for rank, expected in (("400", 2), ("4", 0)):
        arguments = [str(source), str(tmp_path / "out"), "--to", "pissa", "--rank", rank]
        run = subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert run.returncode == expected, run.stderr
        assert "Traceback" not in run.stderr
