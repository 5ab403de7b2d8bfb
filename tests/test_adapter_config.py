"""The adapter's configuration and tensor names are what PEFT reads: adapters load whole and in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft_models
import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file

from pissa_convert.formats.adapter import CONFIG_NAME, WEIGHTS_NAME, adapter_config, adapter_keys
from pissa_convert.plans.targets import Action, compact_target_modules, decide

# PEFT asks transformers for an attribute under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

RANK = 2


def config_text(**changes: Any) -> str:
    values: dict[str, Any] = {
        "rank": RANK,
        "alpha": 4.0,
        "rslora": False,
        "target_modules": ["q_proj"],
        "fan_in_fan_out": False,
        "model_config": {},
    }
    return adapter_config(**(values | changes))


def write_adapter(model: Path, adapter: Path, targets: str | list[str] = "all-linear") -> dict[str, torch.Tensor]:
    """An adapter of random factors for everything that would be split, written without PEFT."""
    config = peft_models.read_config(model)
    decisions = decide(peft_models.headers(model), config, targets)
    splits = [d for d in decisions if d.action is Action.SPLIT]
    shapes = {name: shape for name, _, shape in peft_models.headers(model)}
    generator, factors = torch.Generator().manual_seed(1), {}
    for decision in splits:
        out, size_in = shapes[decision.tensor][:: -1 if decision.fan_in_fan_out else 1]
        a_key, b_key = adapter_keys(decision.module)
        factors[a_key] = 0.1 * torch.randn(RANK, size_in, generator=generator)
        factors[b_key] = 0.1 * torch.randn(out, RANK, generator=generator)
    text = config_text(
        target_modules=compact_target_modules({d.module for d in decisions}, {d.module for d in splits}),
        fan_in_fan_out=any(d.fan_in_fan_out for d in splits),
        model_config=config,
    )
    adapter.mkdir()
    (adapter / CONFIG_NAME).write_text(text)
    save_file(factors, adapter / WEIGHTS_NAME)
    return factors


@pytest.mark.parametrize("name", [name for name in peft_models.NAMES if name != "nomic_bert"])
def test_a_hand_written_adapter_loads_with_no_key_missing_or_unexpected(
    name: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    peft_models.save(name, tmp_path / "model")
    factors = write_adapter(tmp_path / "model", tmp_path / "adapter")
    model = PeftModel.from_pretrained(peft_models.load(tmp_path / "model"), tmp_path / "adapter")
    loaded = get_peft_model_state_dict(model)
    assert loaded.keys() == factors.keys()
    assert all(torch.equal(loaded[key], factors[key]) for key in factors)
    said = [str(warning.message) for warning in recwarn]
    assert [message for message in said if "is_gradient_checkpointing" not in message] == []


@pytest.mark.parametrize(
    ("name", "targets"),
    [("gpt2", "all-linear"), ("gpt2 untied", ["c_attn", "lm_head"]), ("llama", "all-linear")],
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
def test_peft_adds_b_times_a_whichever_way_each_weight_is_stored(
    name: str, targets: str | list[str], tmp_path: Path
) -> None:
    peft_models.save(name, tmp_path / "model")
    factors = write_adapter(tmp_path / "model", tmp_path / "adapter", targets)
    stored, headers = peft_models.weights(tmp_path / "model"), peft_models.headers(tmp_path / "model")
    model = PeftModel.from_pretrained(peft_models.load(tmp_path / "model"), tmp_path / "adapter")
    merged = model.merge_and_unload()
    splits = [
        d for d in decide(headers, peft_models.read_config(tmp_path / "model"), targets) if d.action is Action.SPLIT
    ]
    for decision in splits:
        a, b = (factors[key] for key in adapter_keys(decision.module))
        delta = 4.0 / RANK * (b @ a)
        expected = stored[decision.tensor] + (delta.T if decision.fan_in_fan_out else delta)
        torch.testing.assert_close(merged.get_submodule(decision.module).weight.data, expected)
    assert {d.fan_in_fan_out for d in splits} == ({True, False} if "untied" in name else {name == "gpt2"})


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
@pytest.mark.parametrize("name", [name for name in peft_models.NAMES if name != "nomic_bert"])
def test_a_split_model_with_its_adapter_computes_what_the_original_computes(name: str, tmp_path: Path) -> None:
    peft_models.save(name, tmp_path / "model")
    factors = write_adapter(tmp_path / "model", tmp_path / "adapter")
    model = peft_models.load(tmp_path / "model").eval()
    original = peft_models.outputs(name, model)
    headers, config = peft_models.headers(tmp_path / "model"), peft_models.read_config(tmp_path / "model")
    for decision in decide(headers, config):
        if decision.action is Action.SPLIT:
            a, b = (factors[key] for key in adapter_keys(decision.module))
            delta = 4.0 / RANK * (b @ a)
            model.get_submodule(decision.module).weight.data -= delta.T if decision.fan_in_fan_out else delta
    residual = peft_models.outputs(name, model)
    adapted = PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    size = original.abs().max()
    assert (peft_models.outputs(name, adapted) - original).abs().max() < 1e-5 * size
    assert (residual - original).abs().max() > 1e-3 * size, "the adapter holds something that matters"


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("alpha", [2.0, 7.5])
def test_peft_reads_the_configuration_that_was_asked_for(alpha: float, rslora: bool, tmp_path: Path) -> None:
    (tmp_path / CONFIG_NAME).write_text(config_text(alpha=alpha, rslora=rslora, target_modules=["v", "a.q"]))
    config = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, LoraConfig)
    assert (config.r, config.lora_alpha, config.use_rslora) == (RANK, alpha, rslora)
    assert config.target_modules == {"v", "a.q"}
    assert config.init_lora_weights is True, "anything else would run PEFT's own split on the residual"
    assert config.bias == "none"
    assert config.lora_dropout == 0.0
    others = (config.fan_in_fan_out, config.use_dora, config.modules_to_save, config.rank_pattern)
    assert others == (False, False, None, {})


def test_a_whole_alpha_is_written_as_an_integer() -> None:
    assert json.loads(config_text(alpha=16.0))["lora_alpha"] == 16
    assert '"lora_alpha": 16,' in config_text(alpha=16.0)
    assert json.loads(config_text(alpha=0.5))["lora_alpha"] == 0.5


def test_the_text_does_not_depend_on_the_order_of_modules() -> None:
    assert config_text(target_modules=["b", "a"]) == config_text(target_modules=["a", "b"])
    assert [*json.loads(config_text())] == sorted(json.loads(config_text()))


@pytest.mark.parametrize(
    ("architecture", "more", "task"),
    [
        ("LlamaForCausalLM", {}, "CAUSAL_LM"),
        ("GPT2LMHeadModel", {}, "CAUSAL_LM"),
        ("T5ForConditionalGeneration", {"model_type": "t5"}, "SEQ_2_SEQ_LM"),
        ("MarianMTModel", {"model_type": "marian"}, "SEQ_2_SEQ_LM"),
        ("WhisperForConditionalGeneration", {"model_type": "whisper"}, None),
        ("LlavaForConditionalGeneration", {"model_type": "llava"}, None),
        ("LlamaForSequenceClassification", {}, None),
        ("BertForTokenClassification", {}, None),
        ("BertForQuestionAnswering", {}, None),
        ("BertForMaskedLM", {}, None),
        ("BertModel", {}, None),
    ],
)
def test_the_task_follows_from_the_architecture(architecture: str, more: dict[str, bool], task: str | None) -> None:
    assert json.loads(config_text(model_config={"architectures": [architecture], **more}))["task_type"] == task


def test_without_an_architecture_there_is_no_task() -> None:
    assert json.loads(config_text())["task_type"] is None
