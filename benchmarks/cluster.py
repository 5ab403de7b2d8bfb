"""A Ray cluster: what a second worker gains, and a model of how long large models take on how many nodes.

    python benchmarks/cluster.py [scaling] [model] [--folder FOLDER] [--rank 64] [--disk 1] [--repeat 3]
                                 [--json FILE]

scaling  Shards of equal work on one worker of one thread and on two, each on a Ray node of one core, in turns, medians.
         FOLDER (default /dev/shm, so that no disk binds; 4.5 GB) holds source and result. Bar: 1.7 times.
model    Seconds per byte of hashing and of computing at that rank, measured here, and what follows for 70B, 405B and 1T
         on 1 to 64 nodes. It is arithmetic, not a measurement: stages overlap, so a task takes the longest of them for
         its shard of 5 GB; nodes take shards in rounds; to that a start is added, and the reading back of the adapter,
         which the driver does alone. Each node is given --disk GB/s (1) of the shared file system, both ways: all of
         them together must be no more than it has.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from blake3 import blake3
from safetensors.torch import save_file

from pissa_convert import convert
from pissa_convert.linalg import SplitSpec
from pissa_convert.linalg.native import NativeBackend

SHARDS = 16
NODES = (1, 2, 4, 8, 16, 32, 64)
MODELS = {"70B": 141e9, "405B": 812e9, "1T": 2000e9}
"""Bytes in bfloat16."""

SHARD = 5e9
ADAPTER_SHARE = 0.03
"""Of the model's bytes: A and B at rank 64 in float32, for a Llama's shapes."""

TASKS, THREADS = 4, 4
"""On a node at once, and each one's."""

START = 15.0
"""Seconds until the first task works, assumed: connecting, planning, starting workers."""


@contextmanager
def nodes(count: int) -> Iterator[str]:
    """A Ray cluster of so many nodes of one CPU on this machine, to which this process is connected; its address.

    Each node is bound to a core of its own, as one with a single CPU is: its threads that hash and write have no other.
    """
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    cores = os.sched_getaffinity(0)
    for core in sorted(cores)[:count]:
        os.sched_setaffinity(0, {core})  # what a node starts inherits it
        cluster.add_node(num_cpus=1)
    os.sched_setaffinity(0, cores)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    try:
        yield str(cluster.address)
    finally:
        ray.shutdown()
        cluster.shutdown()


def weights(generator: torch.Generator) -> torch.Tensor:
    """2048 × 8192, bfloat16: leading directions as a language model has them over a bulk of noise."""
    left, right = torch.randn(2048, 256, generator=generator), torch.randn(256, 8192, generator=generator)
    scale = torch.arange(1, 257) ** -0.4
    return ((left * scale) @ right + 4 * torch.randn(2048, 8192, generator=generator)).bfloat16()


def write_source(folder: Path) -> int:
    """A model of shards of equal work; its bytes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    generator = torch.Generator().manual_seed(0)
    index = {}
    for number in range(SHARDS):
        file = f"model-{number + 1:05d}-of-{SHARDS:05d}.safetensors"
        weight = weights(generator)
        tensors = {f"model.layers.{4 * number + i}.mlp.down_proj.weight": weight.roll(i, 0) for i in range(4)}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return sum(path.stat().st_size for path in folder.iterdir())


def scaling(folder: Path, rank: int, repeat: int) -> dict[str, Any]:
    source, dest = folder / "source", folder / "dest"
    size = write_source(source)
    times: dict[int, list[float]] = {1: [], 2: []}
    for turn in range(repeat):
        for count, seconds in times.items():
            with nodes(count) as address:
                convert(
                    source, dest, rank=rank, threads=1, ray=address, overwrite=True
                )  # workers start, files are cached
                started = time.perf_counter()
                convert(source, dest, rank=rank, threads=1, ray=address, overwrite=True)
                seconds.append(time.perf_counter() - started)
            print(f"run {turn + 1}, {count} workers: {seconds[-1]:.1f} s", flush=True)
    seconds = {count: median(values) for count, values in times.items()}
    ratio = seconds[1] / seconds[2]
    print(f"{size / 1e9:.1f} GB, rank {rank}: one worker {seconds[1]:.1f} s, two {seconds[2]:.1f} s, {ratio:.2f} times")
    return {"bytes": size, "seconds": seconds, "ratio": ratio}


@dataclass(frozen=True)
class Costs:
    """Seconds per byte of source, of one thread: its CPU time, so that others on the machine do not count."""

    hash: float
    compute: float


def measure(rank: int) -> Costs:
    """What the engine does with a byte."""
    data = memoryview(bytearray(os.urandom(1 << 24) * 16))
    digest = blake3()
    started = time.thread_time()
    digest.update(data)
    hashing = (time.thread_time() - started) / len(data)  # source and output have a thread each
    backend, weight = NativeBackend(1), weights(torch.Generator().manual_seed(0))
    spec = SplitSpec(*weight.shape, "BF16", rank, 1.0, "F32", False, None, 0)
    a, b = bytearray(spec.factor_bytes[0]), bytearray(spec.factor_bytes[1])
    seconds = []
    for _ in range(3):
        work = weight.clone().view(torch.int16).numpy().data
        started = time.thread_time()
        backend.split(work, memoryview(a), memoryview(b), spec)
        seconds.append(time.thread_time() - started)
    return Costs(hashing, min(seconds) / weight.nbytes)


def model(costs: Costs, disk: float, threads: int, tasks: int) -> dict[str, dict[int, float]]:
    """Seconds on nodes that run `tasks` tasks of so many threads each, by model and nodes; `disk` in bytes/s."""
    # A byte of a shard in a task: the disk is shared by the node's tasks, hashing and computing are the task's own.
    stage = max(tasks / disk, costs.hash, costs.compute / threads)
    back = ADAPTER_SHARE / disk
    expected: dict[str, dict[int, float]] = {}
    for name, size in MODELS.items():
        shards = math.ceil(size / SHARD)
        for count in NODES:
            rounds = math.ceil(shards / (count * tasks))
            expected.setdefault(name, {})[count] = START + rounds * size / shards * stage + back * size
    return expected


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=["scaling", "model"], default=["scaling", "model"])
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--disk", type=float, default=1.0, metavar="GB/S")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    for what in arguments.what:
        folder = Path(tempfile.mkdtemp(dir=arguments.folder))
        try:
            if what == "scaling":
                results[what] = scaling(folder, arguments.rank, arguments.repeat)
                continue
            costs = measure(arguments.rank)
            rates = ", ".join(f"{name} {1 / value / 1e9:.2f}" for name, value in vars(costs).items())
            print(f"measured here, GB/s of one thread: {rates}")
            print(f"A MODEL computed from this: minutes on nodes with {TASKS} tasks of {THREADS} threads, and")
            print(f"{arguments.disk:g} GB/s from the shared file system and as much to it for each")
            table = model(costs, arguments.disk * 1e9, THREADS, TASKS)
            print(f"{'nodes':>6}" + "".join(f"{count:8}" for count in NODES))
            for name, row in table.items():
                print(f"{name:>6}" + "".join(f"{seconds / 60:8.1f}" for seconds in row.values()))
            results[what] = {"costs": vars(costs), "seconds": table}
        finally:
            shutil.rmtree(folder)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
