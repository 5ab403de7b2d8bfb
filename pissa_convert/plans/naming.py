"""What transformers calls the module that loads a tensor: names on disk against names at run time.

An adapter names modules as they are called at run time. For most models these are the checkpoint's own names;
for some, transformers 5 keeps an older layout on disk and renames as it loads. The renamings of the common
ones are restated here; for the rest nothing can be proven from headers, so `rename` says None and their
layers are left alone. Names that are already in the new layout pass unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

Rename = Callable[[str], str]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_TOWERS = _names(
    """aria audioflamingo3 fuyu gemma3 glmasr got_ocr2 granite_speech granite_speech_plus internvl llava
    llava_next llava_next_video llava_onevision mistral3 mllama musicflamingo paligemma qwen2_audio
    vibevoice_asr video_llava vipllava voxtral voxtral_realtime"""
)
"""Towers and a language model side by side on disk, under one `model` at run time."""

_TOWERS_WITH_HEAD = (
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head\b", "lm_head"),
    (r"^(?!model\.|lm_head\b|score\b)", "model."),
)
_TOWERS_BARE = ((r"^language_model\.model\.", "language_model."),)

_VIT = (
    (
        r"\bencoder\.layer\.(\d+)\.attention\.attention\.(q|k|v)(?:uery|ey|alue)\b",
        r"layers.\1.attention.\2_proj",
    ),
    (r"\bencoder\.layer\.(\d+)\.attention\.output\.dense\b", r"layers.\1.attention.o_proj"),
    (r"\bencoder\.layer\.(\d+)\.intermediate\.dense\b", r"layers.\1.mlp.fc1"),
    (r"\bencoder\.layer\.(\d+)\.output\.dense\b", r"layers.\1.mlp.fc2"),
)
_DINOV2 = (
    (r"\battention\.attention\.(q|k|v)(?:uery|ey|alue)\b", r"attention.\1_proj"),
    (r"\battention\.output\.dense\b", "attention.o_proj"),
)
_QWEN2_VL = (
    (r"^visual\.", "model.visual."),
    (r"^model\.(?=layers\.|embed_tokens\b|norm\b)", "model.language_model."),
)
_RENAMED: dict[str, tuple[tuple[str, str], ...]] = {
    **dict.fromkeys(_names("audio-spectrogram-transformer beit deit ijepa pixio vit vit_mae vivit"), _VIT),
    **dict.fromkeys(("dinov2", "dinov2_with_registers"), _DINOV2),
    "gpt_neox": ((r"^embed_out\b", "lm_head"),),
    "hy_v3": ((r"\bshared_mlp\b", "shared_experts"),),
    "nemotron_h": ((r"^backbone\.", "model."),),
}

_UNPROVEN = _names(
    """altclip axk2 bailing_hybrid cohere_asr cosmos3_edge cosmos3_omni csm d_fine deepseek_v4 depth_pro
    dinov3_convnext dinov3_vit dory dots3_note ernie4_5_vl_moe glm5_next glm5_next_text
    gradium_phonon_tts grounding-dino gte hrm_text hy_v4 hy_v4_vl hy_v4_vl_text hyperclovax_vision_v2
    inkling2 inkling2_loop inkling2_loop_text inkling2_text inkling_mm_model jina_embeddings_v3 kimi_k25
    kimi_linear kyutai_speech_to_text laguna lara_mini lfm3 lfm3_vl lfm3_vl_vision lw_detr mask2former
    maskformer mimi minimax_m3_vl mistral_large4 mistral_large4_text mm-grounding-dino molmo2
    molmo2_text nemo_speechlm nemotron_h_omni nomic_bert oneformer paddleocr_vl pi0 pp_doclayout_v3
    pp_doclayout_v4 qianfan_ocr qwen2_5_omni_thinker qwen3_omni_moe_thinker radio rf_detr rt_detr
    rt_detr_v2 sam3_tracker sam3_tracker_video sam3_video sapiens2 segformer shieldgemma2 step3p7 swin
    t5gemma2 timesfm2_5 tipsv2 tipsv2_text_model tipsv2_vision_model ultrabert ultravbert unlimited_ocr
    vision-encoder-decoder vision-text-dual-encoder vit_msn"""
)
"""Model types whose layers transformers 5.24 renames, splits or joins at loading, not restated here."""

_PREFIXES = {
    **dict.fromkeys(
        _names("bloom codegen falcon gpt-sw3 gpt2 gpt_bigcode gpt_neo gptj imagegpt mpt openai-gpt xlm xlnet"),
        "transformer",
    ),
    **dict.fromkeys(_names("bert megatron-bert"), "bert"),
    **dict.fromkeys(_names("camembert roberta xlm-roberta xlm-roberta-xl"), "roberta"),
    **dict.fromkeys(_names("deberta deberta-v2"), "deberta"),
    **{name: name for name in _names("albert distilbert electra ernie esmc gpt_neox ibert mobilebert mpnet")},
    **{name: name for name in _names("rembert roformer vit")},
}
"""Under which name a model with a head holds the model without one, where that is not `model`."""

_BARE_DECODER = frozenset(("layers", "embed_tokens", "norm"))


def has_head(config: Mapping[str, Any]) -> bool:
    """Whether the checkpoint is loaded as a model with a head (`…ForCausalLM`), not a bare `…Model`."""
    return re.search(r"For[A-Z]|Head", architecture_name(config)) is not None


def architecture_name(config: Mapping[str, Any]) -> str:
    """The class that the config wants the checkpoint loaded with, or an empty string."""
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


def model_types(config: Mapping[str, Any]) -> Iterator[str]:
    """The config's own model type, then those of the models inside it."""
    if "model_type" in config:
        yield str(config["model_type"])
    for value in config.values():
        if isinstance(value, Mapping):
            yield from model_types(value)


def renaming(config: Mapping[str, Any], names: Collection[str]) -> Rename | None:
    """How transformers turns a name on disk into a run-time name, or None where that cannot be proven.

    Args:
        config: the model's config.json.
        names: every tensor's name.
    """
    own, *inner = [*model_types(config)] or [""]
    if own in _UNPROVEN or any(name in _UNPROVEN or (name in _RENAMED and name != own) for name in inner):
        return None
    rules = _RENAMED.get(own, ())
    if own in ("qwen2_vl", "qwen2_5_vl") and has_head(config):
        rules = _QWEN2_VL
    if own in _TOWERS:
        rules = _TOWERS_WITH_HEAD if has_head(config) else _TOWERS_BARE
    compiled = [(re.compile(pattern), replacement) for pattern, replacement in rules]

    def apply_rules(name: str) -> str:
        for pattern, replacement in compiled:
            renamed = pattern.sub(replacement, name, count=1)
            if renamed != name:
                return renamed
        return name

    add, remove = _prefix_change(own, config, {apply_rules(name).partition(".")[0] for name in names})

    def rename(name: str) -> str:
        return add + apply_rules(name).removeprefix(remove)

    return rename


def _prefix_change(own: str, config: Mapping[str, Any], roots: Collection[str]) -> tuple[str, str]:
    """What to put before and to take off names: a base model's file may be loaded with a head, and the
    reverse."""
    prefix = _PREFIXES.get(own)
    if has_head(config):
        if prefix is not None and prefix not in roots:
            return f"{prefix}.", ""
        bare_decoder = prefix is None and roots and set(roots) <= _BARE_DECODER
        known_head = re.search(r"For(CausalLM|SequenceClassification|TokenClassification)$", architecture_name(config))
        return ("model.", "") if bare_decoder and known_head else ("", "")
    if prefix is not None and prefix in roots and architecture_name(config):
        return "", f"{prefix}."
    return "", ""
