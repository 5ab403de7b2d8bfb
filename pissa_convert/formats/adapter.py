"""A PEFT adapter folder: the names of its files and tensors, and its configuration."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def adapter_keys(module: str) -> tuple[str, str]:
    """Names of a module's A (rank × in) and B (out × rank) in `adapter_model.safetensors`."""
    prefix = f"base_model.model.{module}"
    return f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"


def _task_type(config: dict[str, Any]) -> str | None:
    # Image-text models are "ForConditionalGeneration" too, but only an encoder-decoder is a SEQ_2_SEQ_LM to PEFT.
    for name in config.get("architectures") or []:
        for ending, task in _TASKS.items():
            if str(name).endswith(ending) and (task != "SEQ_2_SEQ_LM" or config.get("is_encoder_decoder")):
                return task
    return None


def adapter_config(
    *,
    rank: int,
    alpha: float,
    rslora: bool,
    target_modules: Sequence[str],
    fan_in_fan_out: bool,
    model_config: dict[str, Any],
) -> str:
    """The text of `adapter_config.json` for a LoRA adapter, as PEFT reads it.

    `init_lora_weights` is true: with "pissa" PEFT would run its SVD again at loading and change the base. The base is
    left open, because a path would be wrong as soon as the folder moves; PEFT does not need it to load onto a model.

    Args:
        model_config: the base's config.json, for the task type.
    """
    values = {
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": sorted(target_modules),
        "task_type": _task_type(model_config),
        "use_dora": False,
        "use_rslora": rslora,
    }
    return json.dumps(values, indent=2) + "\n"
