"""A real Ray cluster of two nodes on this machine: the bytes of one process, also where workers and nodes die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from checkpoints import DTYPES, digests, small_model, write_model
from gguf_models import packaged_smollm2, rewrite
from ray.cluster_utils import Cluster

from pissa_convert import cluster as clusters
from pissa_convert import convert
from pissa_convert.cli import main
from pissa_convert.errors import ConversionError, WeightError
from pissa_convert.formats.manifest import manifest_head
from pissa_convert.options import RunOptions

COMMAND = str(Path(sys.executable).with_name("pissa-convert"))
SHARDS = 4
RANK = 32


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards that take a process about a second each."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"model.layers.{layer}.mlp.{name}.weight": torch.randn(800, 1000, generator=generator).to(DTYPES["BF16"])
        for layer in range(8)
        for name in ("gate_proj", "up_proj")
    }
    return write_model(tmp_path_factory.mktemp("source") / "in", tensors, SHARDS)


@pytest.fixture(scope="module")
def expected(source: Path) -> dict[str, str]:
    convert(source, source.parent / "alone", rank=RANK, device="cpu")
    return digests(source.parent / "alone")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("driver"))  # tasks import from it, and the repository's package has no core
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()
    os.chdir(before)


def convert_on(cluster: Cluster, source: Path, dest: Path, **options: Any) -> Any:
    return convert(source, dest, rank=RANK, threads=1, ray=cluster.address, **options)


def writers(dest: Path) -> list[int]:
    """Processes that are writing a shard of `dest`."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdecimal() and int(process.name) != os.getpid():
            with suppress(OSError):
                links = [os.readlink(link) for link in (process / "fd").iterdir()]
                if any(link.startswith(f"{dest}/model") and link.endswith(".partial") for link in links):
                    found.append(int(process.name))
    return found


@contextmanager
def when_writing(dest: Path, act: Callable[[list[int]], bool]) -> Iterator[threading.Event]:
    """Call `act` with the writers' process ids until it returns True; the event says whether it has."""
    finished, acted = threading.Event(), threading.Event()

    def watch() -> None:
        while not finished.is_set() and not acted.is_set():
            pids = writers(dest)
            if pids and act(pids):
                acted.set()
            time.sleep(0.01)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield acted
    finally:
        finished.set()
        thread.join()


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_two_nodes_make_the_bytes_of_one_process(
    cluster: Cluster, source: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    seen: list[int] = []
    report = convert_on(cluster, source, tmp_path / "out", progress=lambda done, *rest: seen.append(done))
    assert digests(tmp_path / "out") == expected
    assert report.tensors == 16
    assert len(seen) == SHARDS + 1
    assert seen == sorted(seen)
    assert seen[-1] == sum(path.stat().st_size for path in source.glob("*.safetensors"))
    again = convert_on(cluster, source, tmp_path / "out")
    assert again.complete_before


def test_a_worker_that_is_killed_is_replaced(
    cluster: Cluster, source: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    def kill(pids: list[int]) -> bool:
        os.kill(pids[0], signal.SIGKILL)
        return True

    with when_writing(tmp_path / "out", kill) as killed:
        convert_on(cluster, source, tmp_path / "out")
    assert killed.is_set()
    assert digests(tmp_path / "out") == expected


def test_a_node_that_dies_is_done_without(
    cluster: Cluster, source: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    victim = cluster.add_node(num_cpus=1)
    raylet = victim.all_processes["raylet"][0].process.pid

    def kill(pids: list[int]) -> bool:
        if raylet not in map(parent, pids):
            return False
        cluster.remove_node(victim, allow_graceful=False)
        return True

    for attempt in range(5):  # others may have done all before the new node has a process
        dest = tmp_path / f"{attempt}"
        with when_writing(dest, kill) as killed:
            convert_on(cluster, source, dest)
        assert digests(dest) == expected
        if killed.is_set():
            break
    assert killed.is_set()


@pytest.mark.parametrize("continued_by", ["cluster", "process"])
def test_a_driver_that_is_killed_is_continued(
    continued_by: str, cluster: Cluster, source: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    dest = tmp_path / "out"
    arguments = [str(source), str(dest), "--to", "pissa", "--rank", str(RANK), "--threads", "1", "--quiet"]
    driver = subprocess.Popen([COMMAND, *arguments, "--ray", cluster.address])
    while not list(dest.glob("model-*.safetensors")):
        assert driver.poll() is None
        time.sleep(0.01)
    driver.kill()
    driver.wait()
    assert len(list(dest.glob("model-*.safetensors"))) < SHARDS
    if continued_by == "cluster":
        assert convert_on(cluster, source, dest).resumed
    else:
        assert convert(source, dest, rank=RANK, device="cpu").resumed
    assert digests(dest) == expected


def test_a_merge_runs_on_it_too(
    cluster: Cluster, source: Path, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    residual = source.parent / "alone"
    convert(residual, tmp_path / "alone", "merged", adapter=residual / "pissa_init")
    monkeypatch.chdir(residual)
    convert(residual, tmp_path / "out", "merged", adapter="pissa_init", threads=1, ray=cluster.address)
    assert digests(tmp_path / "out") == digests(tmp_path / "alone")


def test_a_quantised_model_is_made_on_it(cluster: Cluster, tmp_path: Path) -> None:
    model = write_model(tmp_path / "in", small_model(dtype=torch.bfloat16), 2)
    assert_same_bytes(cluster, tmp_path, model, "qpissa", rank=4)


def test_a_gguf_is_split_on_it(cluster: Cluster, tmp_path: Path) -> None:
    model = rewrite(packaged_smollm2(), tmp_path / "in.gguf", "F16", layers=1)
    assert_same_bytes(cluster, tmp_path, model, "pissa", rank=4)


def test_a_model_becomes_a_gguf_on_it(cluster: Cluster, small: Path, template: Path, tmp_path: Path) -> None:
    alone, out = tmp_path / "alone.gguf", tmp_path / "out.gguf"
    convert(small, alone, "gguf", base_gguf=template, outtype="q8_0")
    convert(small, out, "gguf", base_gguf=template, outtype="q8_0", threads=1, ray=cluster.address)
    assert out.read_bytes() == alone.read_bytes()


def assert_same_bytes(cluster: Cluster, folder: Path, model: Path, to: str, **options: Any) -> None:
    convert(model, folder / "alone", to, **options)
    convert(model, folder / "out", to, threads=1, ray=cluster.address, **options)
    assert digests(folder / "out") == digests(folder / "alone")


def test_a_bad_weight_is_named_and_the_rest_can_be_resumed(cluster: Cluster, tmp_path: Path) -> None:
    tensors = small_model()
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    source = write_model(tmp_path / "in", tensors, 2)
    with pytest.raises(WeightError, match=r"layers\.1\.mlp\.down_proj\.weight.*NaN or infinity"):
        convert(source, tmp_path / "out", rank=4, threads=1, ray=cluster.address)
    assert not (tmp_path / "out" / "config.json").exists()
    assert (tmp_path / "out" / ".pissa-convert.journal").exists()


def test_a_wrong_request_is_one_line_and_writes_nothing(
    cluster: Cluster, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = [str(source), str(tmp_path / "out"), "--to", "pissa", "--threads", "1", "--ray", cluster.address]
    assert main([*base, "--rank", "5000"]) == 2
    assert "--rank is larger than the weight allows" in capsys.readouterr().err
    assert main([*base, "--device", "cuda:1"]) == 2
    assert "Ray chooses each task's GPU" in capsys.readouterr().err
    assert main([*base, "--plan"]) == 2
    assert "--plan reads headers alone" in capsys.readouterr().err
    assert main([str(source), str(tmp_path / "out"), "--to", "lora", "--ray", "local"]) == 2
    assert "--ray does not apply to --to lora" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_task_has_a_gpu_if_one_is_asked_for(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "_plan", lambda *request: ray.get_gpu_ids())
    node = cluster.add_node(num_cpus=1, num_gpus=1)  # as Ray is told; there is none
    try:
        given = {
            device: clusters.RayWorkers(RunOptions(threads=1, device=device)).plan(Path("in"), Path("out"), "pissa", {})
            for device in ("cpu", "cuda")
        }
    finally:
        cluster.remove_node(node)
    assert len(given["cuda"]) == 1
    assert not given["cpu"]


@pytest.mark.parametrize(
    ("part", "value"), [("version", "0.0.1"), ("backend", "native/quantum"), ("backend", "torch 2.9/NVIDIA H100")]
)
def test_a_node_that_would_make_other_bytes_is_refused(part: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PISSA_CONVERT_KERNEL", "")  # restored afterwards
    head = {**manifest_head("pissa", "native/portable", {}), part: value}
    with pytest.raises(ConversionError, match="a node of the cluster differs"):
        clusters._same_backend(head, RunOptions(threads=1, device="cpu"))


def test_a_node_takes_the_plans_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PISSA_CONVERT_KERNEL", "avx2")
    head = manifest_head("pissa", "native/portable", {})
    assert clusters._same_backend(head, RunOptions(threads=1, device="cpu")).name == "native/portable"


@pytest.mark.long
def test_a_cluster_of_this_machine_alone(source: Path, expected: dict[str, str], tmp_path: Path) -> None:
    arguments = [COMMAND, str(source), str(tmp_path / "out"), "--to", "pissa", "--rank", str(RANK), "--ray", "local"]
    run = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert digests(tmp_path / "out") == expected
    assert "16 weights split" in run.stderr


def test_where_no_cluster_answers(source: Path, tmp_path: Path) -> None:
    arguments = [COMMAND, str(source), str(tmp_path / "out"), "--to", "pissa", "--ray", "127.0.0.1:9"]
    run = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "error: no Ray cluster answers" in run.stderr


def test_a_node_without_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "The remote function failed to import on the worker.\nModuleNotFoundError: No module named 'pissa_convert'"
    failure = ray.exceptions.RayTaskError("_plan", said, RuntimeError(said))

    def get(reference: Any) -> Any:
        raise failure

    monkeypatch.setattr(ray, "get", get)
    with pytest.raises(ConversionError, match=r"cannot import pissa_convert.*No module named.*on every node"):
        clusters.RayWorkers._get(None)
