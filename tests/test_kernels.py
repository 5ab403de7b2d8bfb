"""Every instruction set of the core, forced in a process of its own, because the choice is made when threads start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pissa_convert import PissaError, _core
from pissa_convert.linalg.native import NativeBackend


@pytest.mark.parametrize("kernel", _core.kernels())
def test_every_kernel_gives_the_same_split(kernel: str, tmp_path: Path) -> None:
    code = """
import numpy as np, torch, sys
from checkpoints import llm_like
from pissa_convert import split
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for shape in ((333, 517), (1030, 258)):
        weight = llm_like(*shape, dtype=dtype)
        results = [split(weight, 20, passes=5, threads=threads) for threads in (1, 2, 3)]
        for result in results:
            assert torch.equal(result.residual, results[0].residual), "threads change the result"
        exact = torch.linalg.svdvals(weight.double())[:20].square().sum()
        energy = torch.linalg.matrix_norm(results[0].B.double() @ results[0].A.double()) ** 2
        print(float(1 - energy / exact))
"""
    environment = {**os.environ, "PISSA_CONVERT_KERNEL": kernel, "PYTHONPATH": os.path.dirname(__file__)}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert all(float(line) < 3e-3 for line in run.stdout.split())


def test_an_unknown_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PISSA_CONVERT_KERNEL", "quantum")
    with pytest.raises(PissaError, match=r"quantum.*portable"):
        NativeBackend()
