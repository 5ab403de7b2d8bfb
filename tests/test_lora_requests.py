"""`--to lora` on two adapter folders: what cannot be subtracted is refused, by name; and what it says beforehand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import PREFIX, SHAPES, factors, tensors_of, to_lora, trained_pair, write
from checkpoints import digests
from safetensors.torch import load_file

from pissa_convert import convert, plan
from pissa_convert.cli import main
from pissa_convert.errors import RequestError, WeightError

Q, DOWN = SHAPES


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return trained_pair(tmp_path)


def refused(source: Path, init: Path, tmp_path: Path) -> str:
    with pytest.raises(RequestError) as caught:
        convert(source, tmp_path / "out", "lora", init=init)
    assert not (tmp_path / "out").exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"peft_type": None}, "peft_type"),
        ({"target_parameters": ["experts"]}, "target_parameters"),
        ({"alora_invocation_tokens": [1]}, "aLoRA"),
        ({"r": 0}, "r is malformed"),
        ({"r": True}, "r is malformed"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"lora_alpha": -1}, "lora_alpha"),
        ({"use_rslora": "yes"}, "use_rslora"),
        ({"rank_pattern": [4]}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": "4"}}, "alpha_pattern"),
        ({"alpha_pattern": {"(": 4}}, "regular expression"),
        ({"r": 8}, "expected rank 8, found 4"),
    ],
)
@pytest.mark.parametrize("side", [0, 1])
def test_other_adapters_and_malformed_settings_are_refused_by_name(
    pair: tuple[Path, Path], tmp_path: Path, changes: dict[str, Any], named: str, side: int
) -> None:
    path = pair[side] / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert named in refused(*pair, tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t | {f"{PREFIX}{Q}.lora_magnitude_vector": torch.ones(40)}, "DoRA"),
        (lambda t: t | {f"{PREFIX}{Q}.hada_w1_a": torch.ones(4)}, "hada_w1_a"),
        (lambda t: t | {f"{PREFIX}{Q}.lora_C.weight": torch.ones(4)}, "lora_C"),
        (lambda t: t | {f"{PREFIX}{Q}.lora_A.weight": torch.ones(4, 24, 1, 1)}, "2 dimensions"),
        (lambda t: t | {f"{PREFIX}{Q}.lora_A.weight": torch.ones(4, 24, dtype=torch.uint8)}, "packed"),
        (lambda t: t | {f"{PREFIX}{Q}.lora_A.weight": torch.ones(5, 24)}, "lora_B"),
        (lambda t: t | {f"{PREFIX}{Q}.lora_A.weight": torch.ones(4, 25)}, "expected in 24, out 40, found in 25"),
        (lambda t: t | {f"{PREFIX}{Q}.lora_A.other.weight": torch.ones(4, 24)}, "twice"),
        (lambda t: {k: v for k, v in t.items() if k != f"{PREFIX}{Q}.lora_B.weight"}, "lora_B is missing"),
        (lambda t: {k: v for k, v in t.items() if Q not in k}, f"lacks a module: found {Q}"),
        (lambda t: t | tensors_of({"extra.k_proj": factors(4)[Q]}), "extra.k_proj"),
        (lambda t: {}, "no lora_A"),
    ],
)
def test_what_cannot_be_subtracted_is_refused_by_name(
    pair: tuple[Path, Path], tmp_path: Path, change: Any, named: str
) -> None:
    tensors = change(load_file(pair[0] / "adapter_model.safetensors"))
    assert named in refused(write(tmp_path / "odd", tensors), pair[1], tmp_path)


def test_pickles_are_never_opened(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (pair[0] / "adapter_model.safetensors").rename(pair[0] / "adapter_model.bin")
    assert "pickled" in refused(*pair, tmp_path)


def test_a_link_that_leaves_the_folder_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    file = pair[0] / "adapter_model.safetensors"
    file.rename(tmp_path / "elsewhere.safetensors")
    file.symlink_to(tmp_path / "elsewhere.safetensors")
    assert "leaves the folder" in refused(*pair, tmp_path)


@pytest.mark.parametrize("side", [0, 1])
def test_a_diverged_adapter_is_named(tmp_path: Path, side: int) -> None:
    sides = [tensors_of(factors(4, 1)), tensors_of(factors(4))]
    sides[side][f"{PREFIX}{DOWN}.lora_B.weight"][0, 0] = math.nan
    folders = [write(tmp_path / str(number), tensors) for number, tensors in enumerate(sides)]
    with pytest.raises(WeightError, match=r"down_proj\.lora_B.*NaN"):
        to_lora((folders[0], folders[1]), tmp_path / "out")
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_an_adapter_that_did_not_begin_as_this_init_gets_a_warning_with_the_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [write(tmp_path / str(seed), tensors_of(factors(4, seed))) for seed in (0, 1)]
    report = to_lora((folders[0], folders[1]), tmp_path / "out")
    assert len(report.warnings) == 1
    assert f"{report.relative_change:.2f}" in report.warnings[0]
    assert report.relative_change == pytest.approx(math.sqrt(2), rel=0.3)
    arguments = [str(folders[0]), str(tmp_path / "again"), "--to", "lora", "--init", str(folders[1]), "--quiet"]
    assert main(arguments) == 0
    assert capsys.readouterr().err.startswith("warning: TRAINED does not look like")
    untrained = to_lora((folders[0], folders[0]), tmp_path / "same")
    assert "nothing was trained" in untrained.warnings[0]


def test_the_closing_lines_say_the_rank_and_why(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(pair[0]), str(tmp_path / "out"), "--to", "lora", "--init", str(pair[1])]) == 0
    said = capsys.readouterr().err
    assert "rank 8: s′·B′·A′ − s·B·A has the rank of both adapters together" in said
    assert "of ‖ΔW‖" in said


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--alpha", "3"], "--alpha does not apply to --to lora"),
        (["--target-modules", "q_proj"], "--target-modules does not apply"),
        (["--seed", "3"], "--seed goes with --base"),
        (["--tolerance", "0.1"], "--tolerance goes with --rank auto"),
        (["--rank", "auto", "--tolerance", "2"], "--tolerance is out of range"),
        (["--rank", "0"], "--rank is out of range"),
        (["--dtype", "int8"], "--dtype is unknown"),
    ],
)
def test_options_that_do_not_apply_are_refused_by_name(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    base = [str(pair[0]), str(tmp_path / "out"), "--to", "lora", "--init", str(pair[1])]
    assert main([*base, *arguments]) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_the_initial_adapter_it_says_what_to_give(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(pair[0]), str(tmp_path / "out"), "--to", "lora"]) == 2
    said = capsys.readouterr().err
    assert "--init" in said
    assert "--base" in said


def test_the_plan_is_what_is_written_and_writes_nothing(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(pair[0]), str(tmp_path / "out"), "--to", "lora", "--init", str(pair[1])]
    assert main([*arguments, "--plan"]) == 0
    assert f"{Q}" in capsys.readouterr().out
    sizes = plan(pair[0], tmp_path / "out", "lora", init=pair[1]).output_sizes
    assert not (tmp_path / "out").exists()
    to_lora(pair, tmp_path / "out")
    assert sizes == {name: (tmp_path / "out" / name).stat().st_size for name in digests(tmp_path / "out")}


def test_dest_inside_an_adapter_is_refused(pair: tuple[Path, Path]) -> None:
    for folder in pair:
        with pytest.raises(RequestError, match="lies inside"):
            to_lora(pair, folder / "out")
