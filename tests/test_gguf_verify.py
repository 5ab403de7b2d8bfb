"""GGUF results against their manifests, and against what they were made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import write
from checkpoints import load_all
from gguf_small import random_lora, split_files

from pissa_convert import convert, verify
from pissa_convert.cli import main
from pissa_convert.errors import DamageError


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
