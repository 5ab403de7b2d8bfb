"""GGUF targets killed and continued, and the peak of their memory."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import tensors_of, write
from checkpoints import digests
from gguf_models import add, finish, values_of
from gguf_small import DYING, random_lora, run_in

from pissa_convert import convert
from pissa_convert.errors import ConversionError, RequestError
from pissa_convert.transforms import ggml


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
    stored, reported = [], []

    def counting(*arguments: Any) -> Any:
        stored.append(arguments)
        return ggml.store(*arguments)

    def failing(*progress: Any) -> None:  # is told of a step when its line is in the journal
        reported.append(progress)
        if len(reported) == 12:
            raise ConversionError("the power fails")

    monkeypatch.setattr(engine, "store", counting)
    with pytest.raises(ConversionError, match="power"):
        convert(small, dest, "gguf", progress=failing, **asked)
    assert not dest.exists()
    assert (tmp_path / ".out.gguf.pissa-convert.journal").exists()
    with pytest.raises(RequestError, match="interrupted conversion in which --outtype"):
        convert(small, dest, "gguf", base_gguf=template, outtype="f16")
    del stored[:]
    assert convert(small, dest, "gguf", **asked).resumed
    assert len(stored) < len(values_of(dest)) - 4
    assert dest.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert convert(small, dest, "gguf", **asked).complete_before
