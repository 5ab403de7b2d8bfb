"""What only the torch backend has: devices, their memory, and what happens where they fail. `test_split` has the rest.

torch's arithmetic of a GPU is done by the CPU here; nothing in these tests needs a GPU.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import digests, llm_like, small_model, write_model

from pissa_convert import convert, plan
from pissa_convert.cli import main
from pissa_convert.errors import RequestError
from pissa_convert.linalg import (
    Backend,
    SplitSpec,
    SplitStats,
    select,
    tensor_key,
    torch_backend,
    torch_krylov,
    torch_ritz,
)
from pissa_convert.linalg.native import NativeBackend
from pissa_convert.linalg.torch_backend import TorchBackend
from pissa_convert.linalg.torch_device import Device, find_devices

ROOM = 1 << 40
CUSOLVER = "cusolver error: CUSOLVER_STATUS_EXECUTION_FAILED"
SPEC = SplitSpec(200, 300, "BF16", 8, 1.0, "F32", False, None, tensor_key(0, "w"), "w")


def devices(count: int = 1, limit: int = ROOM) -> list[Device]:
    return [Device(torch.device("cpu"), limit) for _ in range(count)]


def split_bytes(backend: Backend, spec: SplitSpec = SPEC) -> tuple[bytes, SplitStats]:
    raw = llm_like(spec.rows, spec.cols, dtype=torch.bfloat16).view(torch.int16).numpy().copy()
    a, b = np.zeros(spec.a_shape, np.float32), np.zeros(spec.b_shape, np.float32)
    stats = backend.split(raw.data, a.data, b.data, spec)
    return raw.tobytes() + a.tobytes() + b.tobytes(), stats


def out_of_memory(times: int) -> Callable[..., Any]:
    """`factorize` that fails so often."""
    calls = iter(range(times))

    def fails(*arguments: Any) -> Any:
        if next(calls, None) is not None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch_krylov.factorize(*arguments)

    return fails


def test_the_signs_of_the_random_start_are_philox() -> None:
    """The words of Philox4x32-10 for key and counter zero are those of Random123's known answers."""
    words = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    expected = [1.0 if words[i // 32] >> (i % 32) & 1 else -1.0 for i in range(128)]
    assert torch_krylov.signs(0, 200)[:128].tolist() == expected


def test_seeds_and_names_decide_the_bytes() -> None:
    one = split_bytes(TorchBackend(devices()))
    assert split_bytes(TorchBackend(devices())) == one
    other = SplitSpec(**{**vars(SPEC), "key": tensor_key(1, "w")})
    data, stats = split_bytes(TorchBackend(devices()), other)
    assert data != one[0]
    np.testing.assert_allclose(stats.singular_values, one[1].singular_values, rtol=1e-2)


def test_both_backends_find_the_same_triplets() -> None:
    spec = SplitSpec(**{**vars(SPEC), "passes": 3})
    ours, native = split_bytes(TorchBackend(devices()), spec)[1], split_bytes(NativeBackend(), spec)[1]
    np.testing.assert_allclose(ours.singular_values, native.singular_values, rtol=2e-2)
    assert ours.relative_error == pytest.approx(native.relative_error, rel=0.05)


def test_out_of_memory_is_tried_again_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = split_bytes(TorchBackend(devices()))
    monkeypatch.setattr(torch_backend, "factorize", out_of_memory(1))
    backend = TorchBackend(devices())
    assert split_bytes(backend)[0] == expected[0]
    assert not backend.warnings


def test_what_is_too_large_for_the_gpu_is_split_by_the_cpu_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_model(tmp_path / "in", small_model())
    convert(source, tmp_path / "native", rank=4, device="cpu")
    monkeypatch.setattr(torch_backend, "factorize", out_of_memory(1000))
    monkeypatch.setattr("pissa_convert.plans.requests.select_backend", lambda *options: TorchBackend(devices()))
    assert main([str(source), str(tmp_path / "out"), "--to", "pissa", "--rank", "4"]) == 0
    said = capsys.readouterr().err
    assert "warning: model.layers.0.mlp.down_proj.weight: too large for the memory of cpu" in said
    weights = "model.safetensors", "pissa_init/adapter_model.safetensors"
    expected, found = digests(tmp_path / "native"), digests(tmp_path / "out")
    assert [found[name] for name in weights] == [expected[name] for name in weights]


def test_a_solver_that_fails_is_replaced_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """A start of dependent vectors needs Householder reflections; the GPU's fail the first time."""
    solve, calls = torch.linalg.qr, []

    def fails_once(matrix: torch.Tensor) -> Any:
        calls.append(matrix)
        if len(calls) == 1:
            raise RuntimeError(CUSOLVER)
        return solve(matrix)

    backend = TorchBackend(devices())
    raw, a, b = np.ones((200, 300), np.float32), np.zeros((8, 300), np.float32), np.zeros((200, 8), np.float32)
    spec = SplitSpec(200, 300, "F32", 8, 1.0, "F32", False, None, 0, "w")
    monkeypatch.setattr(torch.linalg, "qr", fails_once)
    backend.split(raw.data, a.data, b.data, spec)
    assert len(calls) >= 2
    assert np.abs(raw).max() < 1e-5
    assert backend.warnings == [f"a QR failed on cpu and was done by the CPU: {CUSOLVER}"]


@pytest.mark.parametrize("exact", [True, False])
def test_the_gpus_eigenvectors_are_as_good(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    y = llm_like(400, 128).double()
    gram = y.T @ y
    by_core, vectors = torch_ritz.ritz(gram, 16, 32, exact, print)
    monkeypatch.setattr(torch_ritz, "is_fast_on", lambda device, size: True)
    by_torch, others = torch_ritz.ritz(gram, 16, 32, exact, print)
    np.testing.assert_allclose(by_torch.sigma, by_core.sigma, rtol=1e-5)
    np.testing.assert_allclose(np.abs((vectors * others).sum(1)), 1, rtol=1e-3)
    assert by_torch.estimated_deficit == pytest.approx(by_core.estimated_deficit, rel=0.01)


class CountedDevice(Device):
    splits = 0

    def beside_others(self) -> AbstractContextManager[None]:
        self.splits += 1
        return super().beside_others()


def test_any_number_of_devices_and_lanes_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_model(tmp_path / "in", small_model(layers=3), 2)
    results = []
    for count in (1, 2, 3):
        pool = [CountedDevice(torch.device("cpu"), ROOM) for _ in range(count)]
        monkeypatch.setattr("pissa_convert.plans.requests.select_backend", lambda *o, pool=pool: TorchBackend(pool))
        convert(source, tmp_path / str(count), rank=4)
        assert all(device.splits for device in pool)
        assert sum(device.splits for device in pool) == 12
        results.append(digests(tmp_path / str(count)))
    assert results[0] == results[1] == results[2]


def test_too_little_memory_is_refused_with_the_number_that_is_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_model(tmp_path / "in", small_model())
    limits = [1000]
    monkeypatch.setattr(
        "pissa_convert.plans.requests.select_backend", lambda *options: TorchBackend(devices(limit=limits[0]))
    )
    with pytest.raises(RequestError, match="the memory of the GPU is too small for the largest weight") as refused:
        plan(source, tmp_path / "out", rank=4)
    limits[0] = int(str(refused.value.expected).split()[2])
    assert plan(source, tmp_path / "out", rank=4).memory.widths.threads == 1
    limits[0] *= 2
    assert plan(source, tmp_path / "out", rank=4).memory.widths.threads == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "--device is unknown: expected auto, cpu, cuda or cuda:N, found tpu"),
        (["--device", "cpu:1"], "--device is unknown"),
        (["--device", "cuda:x"], "--device is unknown"),
        (["--device", "cpu", "--max-vram", "1GiB"], "--max-vram is of a CUDA device"),
        (["--max-vram", "0"], "--max-vram is out of range"),
    ],
)
def test_devices_that_cannot_be_meant_are_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_model(tmp_path / "in", small_model())
    assert main([str(source), str(tmp_path / "out"), "--to", "pissa", "--rank", "4", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_cuda_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_model(tmp_path / "in", small_model())
    assert main([str(source), str(tmp_path / "out"), "--to", "pissa", "--rank", "4", "--device", "cuda"]) == 2
    assert "no CUDA device can be used" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_driver_without_a_gpu_for_torch_means_the_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(select, "_DRIVER", (tmp_path / "nvidiactl",))
    assert isinstance(select.select_backend("auto"), NativeBackend)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[int, float]:
    """Three GPUs, as torch would tell of them, the second of another kind; by index the share that may be taken."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # restored afterwards
    shares: dict[int, float] = {}
    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(select, "_DRIVER", (tmp_path / "nvidiactl",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "ABA"[index])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (60 << 30, 80 << 30))
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, index: shares.__setitem__(index, share)
    )
    return shares


def test_auto_takes_every_gpu_of_the_first_ones_kind(gpus: dict[int, float], monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Device] = []
    monkeypatch.setattr(torch_backend, "TorchBackend", lambda pool: found.extend(pool) or "torch")
    assert select.select_backend("auto") == "torch"
    assert [device.device.index for device in found] == [0, 2]
    assert all(device.limit == int(0.9 * (60 << 30)) for device in found)
    assert gpus.keys() == {0, 2}


def test_one_gpu_and_its_memory_can_be_chosen(gpus: dict[int, float]) -> None:
    (device,) = find_devices(1, 20 << 30, is_needed=True)
    assert (device.device.index, device.limit) == (1, 20 << 30)
    assert gpus == {1: 0.25}
    with pytest.raises(RequestError, match="--device names no device: expected less than cuda:3, found cuda:3"):
        find_devices(3, None, is_needed=True)


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_torch_is_not_imported_without_a_gpu(device: str, tmp_path: Path) -> None:
    source = write_model(tmp_path / "in", small_model())
    code = f"""
import sys
from pissa_convert.cli import main
from pissa_convert.linalg import select
select._DRIVER = ()
assert main([{str(source)!r}, {str(tmp_path / "out")!r}, "--to", "pissa", "--rank", "4", "--device", {device!r}]) == 0
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_a_device_has_nothing_to_do_for_a_merge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(tmp_path), str(tmp_path / "out"), "--to", "merged", "--adapter", str(tmp_path)]
    assert main([*arguments, "--device", "cuda"]) == 2
    assert "--device does not apply to --to merged" in capsys.readouterr().err
