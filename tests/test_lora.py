"""`--to lora` on two adapter folders: what comes out is s′·B′·A′ − s·B·A."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import (
    PREFIX,
    SHAPES,
    distance,
    factors,
    moved,
    product,
    products,
    tensors_of,
    to_lora,
    trained_pair,
    write,
)
from checkpoints import digests
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file

from pissa_convert import plan, verify
from pissa_convert.cli import main
from pissa_convert.errors import ConversionError, DamageError, RequestError

Q, DOWN = SHAPES
DYING = str(Path(__file__).parent / "faults" / "dying.py")


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return trained_pair(tmp_path)


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def peft_scaling(config: dict[str, Any], module: str) -> tuple[int, float]:
    """Rank and scaling as PEFT's LoraModel and LoraLayer read them."""
    rank = config["rank_pattern"].get(get_pattern_key(config["rank_pattern"].keys(), module), config["r"])
    alpha = config["alpha_pattern"].get(get_pattern_key(config["alpha_pattern"].keys(), module), config["lora_alpha"])
    return rank, alpha / (math.sqrt(rank) if config["use_rslora"] else rank)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_difference_is_exact_at_the_sum_of_the_ranks(tmp_path: Path, dtype: torch.dtype) -> None:
    start = factors(4, dtype=dtype)
    end = moved(start)
    report = to_lora(
        (write(tmp_path / "t", tensors_of(end)), write(tmp_path / "i", tensors_of(start))), tmp_path / "out"
    )
    for module, found in products(tmp_path / "out").items():
        assert distance(found, product(end, module) - product(start, module)) < 1e-7
    config = read_config(tmp_path / "out")
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, 8, True)
    assert report.relative_error < 1e-7
    assert report.exact_rank == 8
    assert report.warnings == ()


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("patterns", [False, True])
def test_scalings_of_both_sides_are_peft_s(tmp_path: Path, rslora: bool, patterns: bool) -> None:
    """rslora with patterns is what PEFT's own conversion refuses."""
    sides = {}
    for name, rank, alpha, seed in (("init", 4, 3, 0), ("trained", 6, 10, 1)):
        config: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "use_rslora": rslora}
        pairs = factors(rank, seed)
        if patterns:
            pairs[Q] = factors(3, seed + 7)[Q]
            config |= {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {r".*\.0\.mlp\..*": 5, Q: 2}}
        sides[name] = (pairs, write(tmp_path / name, tensors_of(pairs), **config))
    to_lora((sides["trained"][1], sides["init"][1]), tmp_path / "out")
    result = read_config(tmp_path / "out")
    for module, found in products(tmp_path / "out").items():
        wanted = []
        for pairs, folder in sides.values():
            config = LoraConfig.from_pretrained(folder).to_dict()
            rank, scaling = peft_scaling(config, module)
            assert rank == pairs[module][0].shape[0]
            wanted.append(product(pairs, module, scaling))
        assert distance(found, wanted[1] - wanted[0]) < 1e-7
        rank, scaling = peft_scaling(result, module)
        assert scaling == 1
        assert rank == (6 if patterns and module == Q else 10)


def test_the_rank_never_exceeds_the_weight(tmp_path: Path) -> None:
    start = factors(20)
    end = moved(start)
    to_lora((write(tmp_path / "t", tensors_of(end)), write(tmp_path / "i", tensors_of(start))), tmp_path / "out")
    for module, found in products(tmp_path / "out").items():
        assert distance(found, product(end, module) - product(start, module)) < 1e-6
    assert read_config(tmp_path / "out")["r"] == 24


def test_recompression_is_the_best_approximation_and_errors_fall_with_the_rank(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    exact = {module: product(moved(factors(4)), module) - product(factors(4), module) for module in SHAPES}
    errors: dict[str, list[float]] = {module: [] for module in SHAPES}
    for rank in range(1, 9):
        report = to_lora(pair, tmp_path / f"{rank}", rank=rank)
        for module, found in products(tmp_path / f"{rank}").items():
            singular = np.linalg.svd(exact[module], compute_uv=False)
            best = np.linalg.norm(singular[rank:]) / np.linalg.norm(singular)
            errors[module].append(distance(found, exact[module]))
            assert errors[module][-1] == pytest.approx(best, rel=1e-5, abs=1e-7)
            assert report.modules[module]["relative_error"] == pytest.approx(errors[module][-1], rel=1e-3)
    for found in errors.values():
        assert found == sorted(found, reverse=True)
        assert found[-1] < 1e-7 < found[-2]


@pytest.mark.parametrize("tolerance", [0.5, 1e-1, 1e-3])
def test_auto_takes_the_smallest_rank_that_the_tolerance_allows(
    pair: tuple[Path, Path], tmp_path: Path, tolerance: float
) -> None:
    report = to_lora(pair, tmp_path / "out", rank="auto", tolerance=tolerance)
    config = read_config(tmp_path / "out")
    for module in SHAPES:
        singular = np.linalg.svd(product(moved(factors(4)), module) - product(factors(4), module), compute_uv=False)
        tails = [np.linalg.norm(singular[rank:]) / np.linalg.norm(singular) for rank in range(len(singular))]
        smallest = next(rank for rank, tail in enumerate(tails) if tail <= tolerance)
        assert report.modules[module]["rank"] == smallest
        assert peft_scaling(config, module) == (smallest, 1)
        assert report.modules[module]["relative_error"] <= tolerance + 1e-6


@pytest.mark.parametrize("rank", [None, "auto", 6])
def test_a_uniform_rank_is_the_largest_and_loses_nothing_more(tmp_path: Path, rank: int | str | None) -> None:
    sides = []
    for name, seed in (("trained", 1), ("init", 0)):
        pairs = factors(4, seed)
        pairs[Q] = factors(2, seed)[Q]
        sides.append((pairs, write(tmp_path / name, tensors_of(pairs), r=4, rank_pattern={"q_proj": 2}, lora_alpha=4)))
    folders = (sides[0][1], sides[1][1])
    loose = to_lora(folders, tmp_path / "loose", rank=rank)
    report = to_lora(folders, tmp_path / "out", rank=rank, uniform_rank=True)
    config = read_config(tmp_path / "out")
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert {entry["rank"] for entry in report.modules.values()} == {config["r"]}
    raw = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {min(tensor.shape) for tensor in raw.values()} == {config["r"]}
    for module in SHAPES:
        assert report.modules[module]["relative_error"] <= loose.modules[module]["relative_error"] + 1e-9


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_narrow_dtype_rounds_the_difference_and_not_what_was_subtracted(
    pair: tuple[Path, Path], tmp_path: Path, dtype: str
) -> None:
    """Rounding A′, A, B′ and B instead, as stacking them asks for, would cost what the difference is small by."""
    report = to_lora(pair, tmp_path / "out", dtype=dtype)
    step = {"float16": 2**-11, "bfloat16": 2**-8}[dtype]
    kind = getattr(torch, dtype)
    start, end = factors(4), moved(factors(4))
    for module, found in products(tmp_path / "out").items():
        exact = product(end, module) - product(start, module)
        stacked = sum(
            sign * (b.to(kind).double() @ a.to(kind).double()).numpy()
            for sign, (a, b) in ((1, end[module]), (-1, start[module]))
        )
        assert distance(found, exact) < 1.5 * step
        assert 4 * distance(found, exact) < distance(stacked, exact)
        assert report.modules[module]["relative_error"] == pytest.approx(distance(found, exact), rel=1e-2)


def test_modules_that_training_left_alone_stay_exactly_as_they_are(tmp_path: Path) -> None:
    start = factors(4)
    end = moved(start) | {Q: start[Q]}
    report = to_lora(
        (write(tmp_path / "t", tensors_of(end)), write(tmp_path / "i", tensors_of(start))),
        tmp_path / "out",
        rank="auto",
    )
    assert not products(tmp_path / "out")[Q].any()
    assert report.modules[Q]["rank"] == 1
    assert report.modules[Q]["relative_error"] == 0


def test_what_was_trained_whole_is_carried_byte_for_byte(tmp_path: Path) -> None:
    start, end = factors(4), moved(factors(4))
    whole = {
        f"{PREFIX}lm_head.weight": torch.randn(9, 5).bfloat16(),
        f"{PREFIX}model.embed_tokens.weight": torch.randn(9, 5),
        f"{PREFIX}{Q}.base_layer.bias": torch.randn(40).half(),
        f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": torch.randn(2, 5),
    }
    settings = {"modules_to_save": ["lm_head", "embed_tokens"], "bias": "lora_only"}
    trained = write(tmp_path / "t", tensors_of(end) | whole, **settings)
    (trained / "tokenizer.json").write_text("{}")
    (trained / "optimizer.pt").write_bytes(b"no part of an adapter")
    to_lora((trained, write(tmp_path / "i", tensors_of(start))), tmp_path / "out")
    raw = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for key, tensor in whole.items():
        assert raw[key].dtype == tensor.dtype
        assert torch.equal(raw[key], tensor)
    config = read_config(tmp_path / "out")
    assert {name: config[name] for name in settings} == settings
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert not (tmp_path / "out" / "optimizer.pt").exists()


def test_a_bias_of_b_is_subtracted_with_its_scaling(tmp_path: Path) -> None:
    sides = []
    for name, seed, alpha in (("trained", 1, 8), ("init", 0, 2)):
        biases = {
            f"{PREFIX}{module}.lora_B.bias": torch.full((out,), float(seed + 1)) for module, (out, _) in SHAPES.items()
        }
        sides.append(write(tmp_path / name, tensors_of(factors(4, seed)) | biases, lora_alpha=alpha, lora_bias=True))
    to_lora((sides[0], sides[1]), tmp_path / "out")
    raw = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for module in SHAPES:
        assert torch.equal(raw[f"{PREFIX}{module}.lora_B.bias"], torch.full((SHAPES[module][0],), 2.0 * 2 - 0.5))


def test_factors_of_an_embedding_keep_their_names(tmp_path: Path) -> None:
    a, b = f"{PREFIX}model.embed_tokens.lora_embedding_A", f"{PREFIX}model.embed_tokens.lora_embedding_B"
    start = {a: torch.zeros(4, 30), b: torch.randn(8, 4)}
    end = {a: torch.randn(4, 30), b: torch.randn(8, 4)}
    config = {"r": 4, "lora_alpha": 8}
    to_lora(
        (
            write(tmp_path / "t", tensors_of(factors(4)) | end, **config),
            write(tmp_path / "i", tensors_of(factors(4, 1)) | start, **config),
        ),
        tmp_path / "out",
    )
    raw = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert distance((raw[b].double() @ raw[a].double()).numpy(), 2 * (end[b].double() @ end[a].double()).numpy()) < 1e-6


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (PREFIX, ""),
        (PREFIX, f"module.{PREFIX}"),
        (PREFIX, f"{PREFIX}_orig_mod."),
        ("model.layers", "_fsdp_wrapped_module.model.layers"),
        ("layers.0.", "layers.0._checkpoint_wrapped_module."),
        (".weight", ".default.weight"),
    ],
)
def test_names_from_a_wrapped_model_are_peft_s_again(
    pair: tuple[Path, Path], tmp_path: Path, before: str, after: str
) -> None:
    plain = load_file(pair[0] / "adapter_model.safetensors")
    wrapped = write(tmp_path / "wrapped", {key.replace(before, after): value for key, value in plain.items()})
    to_lora(pair, tmp_path / "plain")
    to_lora((wrapped, pair[1]), tmp_path / "out")
    file = "adapter_model.safetensors"
    assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()


def test_threads_change_no_byte(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for threads in (1, 2, 5):
        to_lora(pair, tmp_path / f"{threads}", threads=threads, rank=5)
    assert digests(tmp_path / "1") == digests(tmp_path / "2") == digests(tmp_path / "5")


def test_a_finished_folder_is_left_alone_and_other_options_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    to_lora(pair, tmp_path / "out")
    before = digests(tmp_path / "out")
    assert to_lora(pair, tmp_path / "out").complete_before
    with pytest.raises(RequestError, match="another options"):
        to_lora(pair, tmp_path / "out", rank=3)
    assert digests(tmp_path / "out") == before
    to_lora(pair, tmp_path / "out", rank=3, overwrite=True)
    to_lora(pair, tmp_path / "fresh", rank=3)
    assert digests(tmp_path / "out") == digests(tmp_path / "fresh")


KILLED = """
import os, sys
from pissa_convert.engine import lora
done = 0
def dying(plan, given, work=lora.new_factors):
    global done
    done += 1
    if done == 2:
        os._exit(9)
    return work(plan, given)
lora.new_factors = dying
from pissa_convert import convert
convert(sys.argv[1], sys.argv[3], "lora", init=sys.argv[2], threads=1)
"""


def test_a_killed_run_leaves_nothing_that_loads_and_is_done_again(pair: tuple[Path, Path], tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", KILLED, str(pair[0]), str(pair[1]), str(tmp_path / "out")], cwd=tmp_path
    )
    assert run.returncode == 9
    assert not any((tmp_path / "out" / name).exists() for name in ("adapter_config.json", "adapter_model.safetensors"))
    with pytest.raises(RequestError, match="--rank was different"):
        to_lora(pair, tmp_path / "out", rank=2)
    assert to_lora(pair, tmp_path / "out").resumed
    to_lora(pair, tmp_path / "whole")
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_an_adapter_that_changes_meanwhile_is_not_converted(pair: tuple[Path, Path], tmp_path: Path) -> None:
    def touch(done: int, total: int, timings: Any) -> None:
        os.utime(pair[0] / "adapter_model.safetensors", (1, 1))

    with pytest.raises(ConversionError, match=r"trained/adapter_model\.safetensors has changed"):
        to_lora(pair, tmp_path / "out", progress=touch)
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_killed_at_every_rename_it_is_done_again(pair: tuple[Path, Path], tmp_path: Path, call: int) -> None:
    dest = tmp_path / "out"
    arguments = [str(pair[0]), str(dest), "--to", "lora", "--init", str(pair[1]), "--quiet"]
    run = subprocess.run(
        [sys.executable, DYING, "replace", str(call), "before", *arguments], check=False, capture_output=True
    )
    assert run.returncode == -signal.SIGKILL
    assert not (dest / "pissa_convert.json").exists()
    assert main(arguments) == 0
    to_lora(pair, tmp_path / "whole")
    assert digests(dest) == digests(tmp_path / "whole")


def test_verify_measures_every_module_and_finds_what_a_digest_does_not(pair: tuple[Path, Path], tmp_path: Path) -> None:
    to_lora(pair, tmp_path / "out", rank=5)
    dest = tmp_path / "out"
    assert verify(dest).files == 4
    found = verify(dest, pair[0], init=pair[1])
    assert found.tensors == 2
    file = dest / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(data)
    with pytest.raises(DamageError, match="digest"):
        verify(dest)
    to_lora(pair, dest, rank=5, overwrite=True)
    other = write(tmp_path / "other", tensors_of(moved(factors(4), seed=1)))
    with pytest.raises(DamageError) as caught:
        verify(dest, other, init=pair[1])
    assert any("lora_B" in str(finding) for finding in caught.value.findings)
    with pytest.raises(RequestError, match="two folders"):
        verify(dest, pair[0])


PEAK = (
    "import sys; from pissa_convert import convert;"
    "print(convert(sys.argv[1], sys.argv[3], 'lora', init=sys.argv[2]).peak_memory)"
)


def test_memory_is_a_few_modules_and_far_below_the_adapters(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(48):
        a, b = (torch.randn(shape, generator=generator) for shape in ((64, 2048), (2048, 64)))
        tensors |= tensors_of({f"layers.{layer}.q_proj": (a, b)})
    trained = write(tmp_path / "t", tensors)
    init = Path(shutil.copytree(trained, tmp_path / "i"))
    size = 2 * (trained / "adapter_model.safetensors").stat().st_size
    run = subprocess.run(
        [sys.executable, "-c", PEAK, str(trained), str(init), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    peak = int(run.stdout)
    assert peak < 3 * size
    assert peak < 160 << 20  # the interpreter, numpy and two modules in flight
    assert peak <= 1.2 * plan(trained, tmp_path / "o", "lora", init=init).memory.peak
