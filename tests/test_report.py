"""What the report counts."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from checkpoints import raw_header, small_model, write_model

from pissa_convert import convert


def test_the_report_counts_what_was_done(tmp_path: Path) -> None:
    source = write_model(tmp_path / "in", small_model(layers=4), 3)
    report = convert(source, tmp_path / "out", rank=4)
    manifest = json.loads((tmp_path / "out" / "pissa_convert.json").read_text())
    assert report.tensors == len(manifest["tensors"]) == 16
    timings = report.timings
    shards = sorted(source.glob("*.safetensors"))
    adapter = tmp_path / "out" / "pissa_init" / "adapter_model.safetensors"
    assert timings.source_bytes == sum(file.stat().st_size for file in shards)
    assert timings.written_bytes == sum(file.stat().st_size - len(raw_header(file)) for file in [*shards, adapter])
    busy = [timings.read_seconds, timings.hash_seconds, timings.compute_seconds, timings.write_seconds]
    assert all(0 < seconds < report.wall_seconds for seconds in busy)
    assert not report.resumed
    assert torch.tensor([report.relative_error]).isfinite()
