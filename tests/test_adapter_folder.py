"""Adapter folders are hostile until checked: whatever is in them, there is one line, and no traceback."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import PREFIX, SHAPES, factors, tensors_of, write
from peft import LoraConfig
from safetensors.torch import load_file

from pissa_convert.errors import PissaError
from pissa_convert.formats.adapter_folder import AdapterFolder, open_adapter, plain_key

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 4, 2**63, 1.5, float("nan"), float("inf"), "", "x", "q_proj", "(", "a" * 1000),
    *([], {}, [1], ["q_proj"], {"q_proj": 4}, {"(": 4}, {"": 4}, {"q_proj": None}, {"q_proj": {"r": 1}}),
)


def settings() -> dict[str, Any]:
    """Every setting that PEFT writes."""
    return json.loads(json.dumps(LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"]).to_dict(), default=str))


def test_what_peft_writes_by_default_is_accepted(tmp_path: Path) -> None:
    adapter = open_adapter(write(tmp_path / "a", tensors_of(factors(4)), **settings()), "SOURCE")
    assert adapter.pairs.keys() == SHAPES.keys()


def mutate(folder: Path, dice: random.Random) -> None:
    config = settings()
    for _ in range(dice.randrange(1, 4)):
        config[dice.choice([*config])] = dice.choice(VALUES)
    text = json.dumps(config)
    if dice.random() < 0.2:
        at = dice.randrange(len(text))
        text = text[:at] + dice.choice('{}[]",:0\\x') + text[at + 1 :]
    (folder / "adapter_config.json").write_text(text)


def trial(folder: Path, count: int, seed: int) -> None:
    dice = random.Random(seed)
    file = folder / "adapter_model.safetensors"
    whole = file.read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(count):
        mutate(folder, dice)
        data = bytearray(whole)
        if dice.random() < 0.5:
            for _ in range(dice.randrange(1, 4)):
                data[dice.randrange(length)] = dice.randrange(256)
            file.write_bytes(data)
        try:
            adapter = open_adapter(folder, "SOURCE")
        except PissaError as error:
            lines = str(error).splitlines()
        else:
            lines = [check(adapter)]
        assert len(lines) == 1


def check(adapter: AdapterFolder) -> str:
    """What was accepted keeps its promises."""
    for pair in adapter.pairs.values():
        assert 0 < pair.scaling < float("inf")
        assert pair.a.shape == (pair.rank, pair.size_in)
        assert pair.b.shape == (pair.size_out, pair.rank)
    return "accepted"


def test_mutated_configurations_and_headers_are_read_or_refused(tmp_path: Path) -> None:
    trial(write(tmp_path / "a", tensors_of(factors(4))), 800, seed=0)


@pytest.mark.long
def test_a_hundred_thousand_of_them(tmp_path: Path) -> None:
    trial(write(tmp_path / "a", tensors_of(factors(4))), 100_000, seed=1)


@pytest.mark.parametrize(
    "key",
    [
        "model.q_proj.lora_A.weight",
        "module.base_model.model.model.q_proj.lora_A.weight",
        "_orig_mod.base_model.model.model.q_proj.lora_A.weight",
        "base_model.model._fsdp_wrapped_module.model._checkpoint_wrapped_module.q_proj.lora_A.weight",
        f"{PREFIX}model.q_proj.lora_A.weight",
    ],
)
def test_names_of_wrapped_models(key: str) -> None:
    assert plain_key(key) == f"{PREFIX}model.q_proj.lora_A.weight"


def test_a_module_that_is_called_module_keeps_its_name() -> None:
    assert plain_key(f"{PREFIX}model.module.q_proj.lora_A.weight") == f"{PREFIX}model.module.q_proj.lora_A.weight"


def test_scaling_of_a_pissa_init_that_peft_made_smaller_than_it_was_asked_for(tmp_path: Path) -> None:
    """PEFT's PiSSA at r = 64 of a 24 × 40 weight has factors of rank 24, and scales by alpha / 64."""
    folder = write(tmp_path / "a", tensors_of(factors(24)), r=64, lora_alpha=32)
    assert load_file(folder / "adapter_model.safetensors")[f"{PREFIX}{next(iter(SHAPES))}.lora_A.weight"].shape[0] == 24
    assert {pair.scaling for pair in open_adapter(folder, "SOURCE").pairs.values()} == {0.5}
    wider = {"m": (torch.ones(24, 90), torch.ones(80, 24))}
    with pytest.raises(PissaError, match="expected rank 64, found 24"):
        open_adapter(write(tmp_path / "b", tensors_of(wider), r=64), "SOURCE")
