"""`--verify`: what is whole passes, and a single flipped bit anywhere is found and named."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import digests, llm_like, small_model, write_model
from safetensors.torch import load_file, save_file

from pissa_convert import convert, verify
from pissa_convert.cli import main
from pissa_convert.errors import DamageError
from pissa_convert.formats.manifest import MANIFEST_NAME, _sealed

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_model(tmp_path_factory.mktemp("source") / "in", small_model(), 2)
    (folder / "README.md").write_text("# a model\n")
    return folder


@pytest.fixture(scope="module")
def whole(source: Path) -> Path:
    convert(source, source.parent / "whole", rank=4)
    return source.parent / "whole"


@pytest.fixture
def dest(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "out"))


def flip(file: Path, position: int, bit: int = 0) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1 << bit
    file.write_bytes(data)


def reseal(dest: Path, change: Any) -> None:
    """Change the manifest and give it a seal that fits."""
    path = dest / MANIFEST_NAME
    values = json.loads(path.read_bytes())
    del values["manifest_blake3"]
    change(values)
    path.write_bytes(_sealed(json.dumps(values).encode()[:-1]))


def test_a_whole_conversion_passes_and_nothing_is_written(source: Path, dest: Path) -> None:
    before = digests(dest)
    alone, compared = verify(dest), verify(dest, source)
    assert alone.files == compared.files == len(before)
    assert (alone.tensors, compared.tensors) == (0, 8)
    assert alone.unexpected == ()
    assert digests(dest) == before


@pytest.mark.parametrize("with_source", [False, True])
def test_a_flipped_bit_in_any_file_is_found_and_the_file_is_named(source: Path, dest: Path, with_source: bool) -> None:
    dice = random.Random(with_source)
    for name in digests(dest):
        size = (dest / name).stat().st_size
        for position in {0, size - 1, *(dice.randrange(size) for _ in range(4))}:
            bit = dice.randrange(8)
            flip(dest / name, position, bit)
            with pytest.raises(DamageError) as caught:
                verify(dest, source if with_source else None)
            assert any(Path(finding.file or "").name == Path(name).name for finding in caught.value.findings)
            flip(dest / name, position, bit)
    verify(dest)


def test_every_bit_of_the_manifest_is_covered(dest: Path) -> None:
    data = bytearray((dest / MANIFEST_NAME).read_bytes())
    for position in range(len(data)):
        data[position] ^= 1 << (position % 8)
        (dest / MANIFEST_NAME).write_bytes(data)
        with pytest.raises(DamageError, match=r"pissa_convert\.json"):
            verify(dest)
        data[position] ^= 1 << (position % 8)


def test_a_missing_and_a_truncated_file_are_named_together(dest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = sorted(dest.glob("*.safetensors"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    assert main([str(dest), "--verify"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert first.name in lines[0]
    assert "missing" in lines[0]
    assert second.name in lines[1]
    assert "size" in lines[1]


def test_files_that_the_manifest_does_not_name_are_shown_but_are_no_damage(
    dest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (dest / "notes.txt").write_text("mine")
    assert verify(dest).unexpected == ("notes.txt",)
    assert main([str(dest), "--verify"]) == 0
    assert "notes.txt" in capsys.readouterr().err


def rehash(dest: Path, name: str) -> None:
    """Make the manifest agree with a changed file: only the comparison with the source can find it now."""
    digest = digests(dest)[name]

    def change(values: Any) -> None:
        values["output"][name] = {"bytes": (dest / name).stat().st_size, "blake3": digest}

    reseal(dest, change)


def edit(file: Path, name: str, change: Any) -> None:
    tensors = load_file(file)
    tensors[name] = change(tensors[name].clone())
    save_file(tensors, file, metadata={"format": "pt"})


def scaled(tensor: torch.Tensor) -> torch.Tensor:
    return tensor * 1.001


def home(folder: Path, tensor: str) -> Path:
    return next(file for file in folder.glob("*.safetensors") if tensor in load_file(file))


@pytest.mark.parametrize("tensor", [Q, "model.norm.weight"])
def test_a_wrong_tensor_with_a_right_digest_is_found_by_comparing_with_the_source(
    source: Path, dest: Path, tensor: str
) -> None:
    file = home(dest, tensor)
    edit(file, tensor, scaled)
    rehash(dest, file.name)
    verify(dest)
    with pytest.raises(DamageError, match=tensor) as caught:
        verify(dest, source)
    assert len(caught.value.findings) == 1


def test_a_wrong_adapter_with_a_right_digest_is_found_by_comparing_with_the_source(source: Path, dest: Path) -> None:
    name = "pissa_init/adapter_model.safetensors"
    edit(dest / name, "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight", scaled)
    rehash(dest, name)
    verify(dest)
    with pytest.raises(DamageError, match=r"model\.layers\.1\.mlp\.down_proj\.weight"):
        verify(dest, source)


def test_another_source_is_noticed(source: Path, dest: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(source, tmp_path / "other"))
    edit(home(other, Q), Q, scaled)
    (other / "tokenizer.json").write_text("{ }")
    with pytest.raises(DamageError) as caught:
        verify(dest, other)
    said = "\n".join(map(str, caught.value.findings))
    assert Q in said
    assert "tokenizer.json" in said
    (other / "tokenizer.json").write_text("{}")
    home(other, Q).unlink()
    with pytest.raises(DamageError, match="missing"):
        verify(dest, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"alpha": 3.0}, {"rslora": True}, {"adapter_dtype": "bfloat16"}])
def test_the_measured_error_is_the_recorded_one(tmp_path: Path, dtype: torch.dtype, options: dict[str, Any]) -> None:
    model = {"a.q_proj.weight": llm_like(300, 200, dtype=dtype), "a.k_proj.weight": llm_like(64, 640, dtype=dtype)}
    convert(write_model(tmp_path / "in", model), tmp_path / "out", rank=8, **options)
    measured = verify(tmp_path / "out", tmp_path / "in").relative_error
    recorded = json.loads((tmp_path / "out" / MANIFEST_NAME).read_bytes())["tensors"]
    assert measured == pytest.approx(max(entry["relative_error"] for entry in recorded.values()), rel=1e-3)


def test_weights_stored_in_out_are_compared_transposed(tmp_path: Path) -> None:
    model = {"h.0.attn.c_proj.weight": llm_like(32, 32), "h.0.attn.c_attn.weight": llm_like(32, 96)}
    folder = write_model(tmp_path / "in", model)
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}))
    convert(folder, tmp_path / "out", rank=4)
    entries = json.loads((tmp_path / "out" / MANIFEST_NAME).read_bytes())["tensors"]
    assert all(entry["fan_in_fan_out"] for entry in entries.values())
    assert verify(tmp_path / "out", folder).tensors == 2


@pytest.mark.parametrize("kind", ["empty", "unfinished", "source", "no folder"])
def test_what_cannot_be_verified_is_a_wrong_request(
    source: Path, dest: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    arguments = [str(dest), "--verify"]
    if kind == "source":
        arguments += ["--source", str(dest / "config.json")]
    elif kind == "no folder":
        arguments[0] = str(dest / "nothing")
    else:
        (dest / MANIFEST_NAME).unlink()
    if kind == "unfinished":
        (dest / ".pissa-convert.journal").write_bytes(b"")
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert {"unfinished": "unfinished", "source": "--source"}.get(kind, "no finished conversion") in lines[0]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--verify", "--rank", "4"], "--rank"),
        (["--verify", "--to", "pissa"], "--to"),
        (["--verify", "out"], "out"),
        (["--source", "x", "out", "--to", "pissa"], "--source"),
    ],
)
def test_options_that_do_not_go_together_are_refused_by_name(
    dest: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    assert main([str(dest), *arguments]) == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", ""])
def test_a_manifest_cannot_point_outside(source: Path, dest: Path, name: str) -> None:
    def change(values: Any) -> None:
        values["output"][name] = {"bytes": 0, "blake3": "0" * 64}

    reseal(dest, change)
    with pytest.raises(DamageError, match="not a manifest"):
        verify(dest, source)


@pytest.mark.parametrize("entry", [5, {}, {"file": 1, "module": "a", "fan_in_fan_out": False, "relative_error": 0.0}])
def test_a_manifest_with_malformed_entries_is_refused(source: Path, dest: Path, entry: Any) -> None:
    reseal(dest, lambda values: values["tensors"].update({"x": entry}))
    with pytest.raises(DamageError, match="not a manifest"):
        verify(dest, source)


def test_python_is_told_of_the_bytes(source: Path, dest: Path) -> None:
    calls: list[tuple[int, int]] = []
    verify(dest, source, progress=lambda done, total: calls.append((done, total)))
    assert calls == sorted(calls)
    assert calls[-1][0] == calls[-1][1] > 0


PEAK = (
    "import sys; from pissa_convert import verify; found = verify(*sys.argv[1:]);"
    "assert found.tensors == 1; print(found.peak_memory)"
)


def test_memory_does_not_grow_with_the_matrix(tmp_path: Path) -> None:
    peaks = []
    for rows in (1024, 16384):
        model = {"x.q_proj.weight": torch.randn(8, 2048).repeat(rows // 8, 1).bfloat16()}
        folder = tmp_path / f"{rows}"
        convert(write_model(folder / "in", model), folder / "out", rank=4)
        run = subprocess.run(
            [sys.executable, "-c", PEAK, str(folder / "out"), str(folder / "in")],
            cwd=tmp_path,  # not the repository's root, whose package has no core
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(int(run.stdout))
    assert peaks[1] - peaks[0] < 40 << 20  # a float32 copy of the larger matrix has 128 MiB
