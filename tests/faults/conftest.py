"""A source of several files, and what it becomes."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import digests, small_model, write_model

from pissa_convert import convert


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards, and files beside them."""
    folder = write_model(tmp_path_factory.mktemp("source") / "in", small_model(layers=4), 3)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    return folder


@pytest.fixture(scope="session")
def expected(source: Path) -> dict[str, str]:
    """What an uninterrupted run gives."""
    dest = source.parent / "uninterrupted"
    convert(source, dest, rank=4)
    return digests(dest)
