"""Tiny random models of many architectures, saved as transformers saves them, for tests against PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open

Tensor = tuple[str, str, tuple[int, ...]]

_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_DECODER = _SIZES | {"num_key_value_heads": 2}
_HEAD_DIM = _DECODER | {"head_dim": 8}
_GPT2 = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "vocab_size": 96,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ENCODER = _SIZES
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
_T5 = {
    "d_model": 32,
    "d_ff": 64,
    "d_kv": 8,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 96,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}
_BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
_WHISPER = _BART | {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16}
_MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LLAMA_TEXT = _DECODER | {"model_type": "llama"}
_CLIP_VISION = _VISION | {"model_type": "clip_vision_model", "projection_dim": 32}
_ROPE_3D = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
_MAMBA = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 96, "state_size": 8}


_ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _DECODER),
    "llama without head": ("LlamaModel", "LlamaConfig", _DECODER),
    "llama classifier": ("LlamaForSequenceClassification", "LlamaConfig", _DECODER),
    "mistral": ("MistralForCausalLM", "MistralConfig", _DECODER),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _DECODER | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _HEAD_DIM),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", _HEAD_DIM),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", _HEAD_DIM),
    "gemma3 text": ("Gemma3ForCausalLM", "Gemma3TextConfig", _HEAD_DIM),
    "phi": ("PhiForCausalLM", "PhiConfig", _DECODER),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _DECODER),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", _DECODER),
    "granite": ("GraniteForCausalLM", "GraniteConfig", _DECODER),
    "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", _DECODER),
    "cohere": ("CohereForCausalLM", "CohereConfig", _DECODER),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", _DECODER),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", _DECODER),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "gpt2 untied": ("GPT2LMHeadModel", "GPT2Config", _GPT2 | {"tie_word_embeddings": False}),
    "gpt2 classifier": ("GPT2ForSequenceClassification", "GPT2Config", _GPT2 | {"pad_token_id": 0}),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "vocab_size": 96,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _SIZES),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", _GPT2 | {"rotary_dim": 4}),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", "GPTBigCodeConfig", _GPT2),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {**_SIZES, "ffn_dim": 64, "word_embed_proj_dim": 16},
    ),
    "bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96},
    ),
    "falcon": ("FalconForCausalLM", "FalconConfig", _SIZES),
    "mpt": ("MptForCausalLM", "MptConfig", {"d_model": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 96}),
    "bert": ("BertModel", "BertConfig", _ENCODER),
    "bert masked": ("BertForMaskedLM", "BertConfig", _ENCODER),
    "bert classifier": ("BertForSequenceClassification", "BertConfig", _ENCODER),
    "bert tagger": ("BertForTokenClassification", "BertConfig", _ENCODER),
    "bert reader": ("BertForQuestionAnswering", "BertConfig", _ENCODER),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", _ENCODER),
    "roberta classifier": ("RobertaForSequenceClassification", "RobertaConfig", _ENCODER),
    "deberta-v2": (
        "DebertaV2ForMaskedLM",
        "DebertaV2Config",
        {**_ENCODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
    ),
    "electra": ("ElectraForMaskedLM", "ElectraConfig", {**_ENCODER, "embedding_size": 16}),
    "distilbert": (
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 96},
    ),
    "modernbert": ("ModernBertForMaskedLM", "ModernBertConfig", _ENCODER),
    "t5": ("T5ForConditionalGeneration", "T5Config", _T5),
    "t5 gated": (
        "T5ForConditionalGeneration",
        "T5Config",
        _T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "bart": ("BartForConditionalGeneration", "BartConfig", _BART),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", _WHISPER),
    "vit": ("ViTForImageClassification", "ViTConfig", _VISION),
    "vit without head": ("ViTModel", "ViTConfig", _VISION),
    "dinov2": ("Dinov2Model", "Dinov2Config", _VISION),
    "clip": (
        "CLIPModel",
        "CLIPConfig",
        {"text_config": _SIZES | {"projection_dim": 32}, "vision_config": _VISION, "projection_dim": 32},
    ),
    "siglip": (
        "SiglipModel",
        "SiglipConfig",
        {"text_config": _SIZES | {"projection_size": 32}, "vision_config": _VISION},
    ),
    "llava": (
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {"text_config": _LLAMA_TEXT, "vision_config": _CLIP_VISION, "image_token_index": 5},
    ),
    "qwen2_vl": (
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        {
            "text_config": _DECODER | _ROPE_3D,
            "vision_config": {
                "depth": 2,
                "embed_dim": 32,
                "hidden_size": 32,
                "num_heads": 4,
                "patch_size": 4,
            },
            "image_token_id": 5,
            "video_token_id": 6,
            "vision_start_token_id": 7,
            "vision_end_token_id": 8,
        },
    ),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {
            "text_config": _HEAD_DIM,
            "vision_config": _VISION | {"model_type": "siglip_vision_model"},
            "mm_tokens_per_image": 4,
            "image_token_index": 5,
        },
    ),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", _DECODER | {"num_local_experts": 4}),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**_DECODER, **_EXPERTS, "shared_expert_intermediate_size": 16},
    ),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**_HEAD_DIM, **_EXPERTS}),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", {**_DECODER, "num_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {**_SIZES, "num_key_value_heads": 4, **_MLA},
    ),
    "granitemoe": ("GraniteMoeForCausalLM", "GraniteMoeConfig", {**_DECODER, "num_local_experts": 4}),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", {**_HEAD_DIM, "num_local_experts": 4}),
    "phimoe": ("PhimoeForCausalLM", "PhimoeConfig", {**_DECODER, "num_local_experts": 4}),
    "mamba": ("MambaForCausalLM", "MambaConfig", _MAMBA),
    "nomic_bert": ("NomicBertModel", "NomicBertConfig", _ENCODER),
}

NAMES = tuple(_ARCHITECTURES)

_IDS = torch.tensor([[9, 10, 11, 12, 13, 2]])
_IMAGE = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
_IMAGE_IDS = torch.tensor([[9, 5, 5, 5, 5, 2]])
_INPUTS: dict[str, dict[str, torch.Tensor]] = {
    "t5": {"input_ids": _IDS, "decoder_input_ids": _IDS},
    "t5 gated": {"input_ids": _IDS, "decoder_input_ids": _IDS},
    "bart": {"input_ids": _IDS, "decoder_input_ids": _IDS},
    "whisper": {"input_features": torch.ones(1, 8, 32), "decoder_input_ids": _IDS},
    "vit": {"pixel_values": _IMAGE},
    "vit without head": {"pixel_values": _IMAGE},
    "dinov2": {"pixel_values": _IMAGE},
    "clip": {"input_ids": _IDS, "pixel_values": _IMAGE},
    "siglip": {"input_ids": _IDS, "pixel_values": _IMAGE},
    "llava": {"input_ids": _IMAGE_IDS[:, 1:], "pixel_values": _IMAGE},
    "gemma3": {"input_ids": _IMAGE_IDS, "pixel_values": _IMAGE},
}
TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def build(name: str) -> transformers.PreTrainedModel:
    """The tiny model `name` (one of NAMES) with random weights, the same every time."""
    model_class, config_class, sizes = _ARCHITECTURES[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**json.loads(json.dumps(sizes)))
    return getattr(transformers, model_class)(config).eval()


def outputs(name: str, model: Any) -> torch.Tensor:
    """What the model says to a fixed input, all float outputs in one row."""
    with torch.no_grad():
        values = model(**_INPUTS.get(name, {"input_ids": _IDS}))
    found = [value for value in values.to_tuple() if isinstance(value, torch.Tensor) and value.is_floating_point()]
    return torch.cat([value.flatten() for value in found])


def save(name: str, folder: Path) -> None:
    """Save it as a checkpoint folder."""
    build(name).save_pretrained(folder)


def load(folder: Path) -> transformers.PreTrainedModel:
    """Load the folder with the class that its config names."""
    model_class: Callable[..., Any] = getattr(transformers, read_config(folder)["architectures"][0])
    return model_class.from_pretrained(folder)


def read_config(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))


def headers(folder: Path) -> list[Tensor]:
    """(name, dtype, shape) of every tensor in the folder."""
    tensors = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                view = file.get_slice(name)
                tensors.append((name, view.get_dtype(), tuple(view.get_shape())))
    return tensors


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor in the folder."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return found


def task_of(folder: Path) -> str | None:
    """The task type that a user of PEFT would give for this model, where it changes what is targeted."""
    architecture = read_config(folder)["architectures"][0]
    return next((task for ending, task in TASKS.items() if architecture.endswith(ending)), None)
