"""What transformers makes of a checkpoint's tensors: told from names, shapes and config alone.

A header does not say which class a weight belongs to, so this is the one place that knows the names by which
the models of transformers 5.24 tell a linear layer from an embedding, an output head, a router or an expert.
Where it is not certain that PEFT 0.21 would load an adapter for a layer, the layer is not LINEAR.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from pissa_convert.plans.naming import Rename, architecture_name, model_types, renaming


class Kind(str, Enum):
    """What holds a tensor; the value says so to the user."""

    LINEAR = "linear layer"
    CONV1D = "linear layer stored in × out (Conv1D)"
    HEAD = "output head"
    TIED_HEAD = "output head, tied to the embedding"
    TASK_HEAD = "task head, which PEFT trains whole"
    EMBEDDING = "embedding"
    ROUTER = "router of a mixture of experts, which takes no adapter"
    EXPERT = "expert of a mixture, fused with the others at loading: an adapter for it would not load"
    FUSED_EXPERTS = "experts fused into one 3-D parameter"
    NAMED_AS_EXPERT = "PEFT takes this layer's name for that of the fused experts: an adapter for it would not load"
    BYPASSED = "the model reads this layer's weight directly: an adapter on it would have no effect"
    SHARED = "layer whose weight other layers share: an adapter on it would change one of them only"
    RENAMED = "transformers renames this model's layers at loading: an adapter for it may not load"
    UNUSED = "not loaded by transformers"
    CONVOLUTION = "convolution"
    VECTOR = "norm or bias"
    OTHER = "parameter that is not the weight of a module"

    @property
    def is_linear(self) -> bool:
        """Whether PEFT's "all-linear" picks it."""
        return self in (Kind.LINEAR, Kind.CONV1D)


_EMBEDDING = re.compile(
    r"(.*_)?embeddings?(_table|_\d+)?|(.*_)?(embed|embedder|embeds|emb)|(.*_)?(embeds_layers?|embed_tokens)"
    r"|embed_(tokens(_per_layer)?|positions|in|timestep|global|char|text_tokens|audio_tokens)"
    r"|tok_embeddings|wte|wpe|shared|(tokens|positions)_embed|relative_attention_bias|bias_values|pe_k"
    r"|audio_bos_eos_token|codebook|(hq|iou|mask|obj_score|presence)_tokens?|queries_features|query_feat"
    r"|HashBucketCodepointEmbedder_\d+|reference_points|\w+_sub_embeddings"
)
_NOT_EMBEDDING = re.compile(
    r"(.*\.)?(patch_embedding|vision_embed_tokens|box_linear_embeddings|relative_pos_embeddings"
    r"|predictor_embeddings|xpath_unitseq2_embeddings"
    r"|vision_tokenizer\.quantize\.embedding|embedder\.input_embedding)"
)
_EMBEDDING_OF = {
    "ctrl": r"transformer\.w|w",
    "wavtokenizer": r".*norm\.(scale|shift)",
}
_HEAD = re.compile(
    r"(language_model\.|text_model\.|decoder\.|text_decoder_postnet\.)?lm_head|embed_out|output_projection"
    r"|proj_out|(decoder\.)?cls\.predictions\.decoder|predictions\.decoder|lm_head\.(decoder|out_proj)|generator_lm_head"
    r"|pred_layer\.proj|lm_loss|vocab_projector"
)
_HEAD_OF = {"git": "output", "modernbert": "decoder", "modernbert-decoder": "decoder", "rwkv": "head"}
_TASK_HEADS = {
    "ForSequenceClassification": re.compile(r"(.*\.)?(score|classifier)(\..*)?"),
    "ForTokenClassification": re.compile(r"(.*\.)?(score|classifier)(\..*)?"),
    "ForQuestionAnswering": re.compile(r"(.*\.)?qa_outputs(\..*)?"),
}

_EXPERT = re.compile(r"(^|\.)experts\.(\d+\.|\w+$|\w+\.weight$)")
_ROUTER = re.compile(r"(.*\.)?(?<!gateway\.)gate|(.*\.)?router(\.(layer|classifier|gate))?")
_LINEAR_ROUTERS = frozenset(("jetmoe", "nllb-moe", "switch_transformers"))
"""Model types whose router is a plain nn.Linear, and not a bare parameter or a layer that returns a tuple."""

_MOE_LEAVES = frozenset(("gate", "gate_proj", "up_proj", "down_proj"))
# fmt: off
_MOE_REMAPPED = frozenset((
    "afmoe", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe",
    "exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "hunyuan_v1_moe",
    "longcat_flash", "mellum", "olmoe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_text",
    "qwen3_omni_moe_thinker", "sarvam_mla", "solar_open",
))
# fmt: on
"""Model types for which PEFT 0.21 turns the module names above into the fused experts' parameters."""

_MAMBA1 = r".*\.(x_proj|dt_proj|out_proj)"
_MAMBA2 = r".*(mamba|mixer)\.out_proj"
_BYPASSED = {
    "bamba": _MAMBA2,
    "falcon_h1": _MAMBA2,
    "falcon_mamba": _MAMBA1,
    "gemma3n": r".*\.correction_coefs",
    "gemma3n_text": r".*\.correction_coefs",
    "granitemoehybrid": _MAMBA2,
    "ibert": r".*\.layer\..*\.(query|key|value|dense)",
    "jamba": r".*\.dt_proj",
    "layoutlmv2": r".*\.rel_pos(_[xy])?_bias",
    "layoutlmv3": r".*\.rel_pos(_[xy])?_bias",
    "mamba": _MAMBA1,
    "mamba2": _MAMBA2,
    "mobilebert": r"cls\.predictions\.dense",
    "nemotron_h": _MAMBA2,
    "reformer": r".*\.(query_key|value)",
    "rwkv": r".*\.(attention\.output|feed_forward\.value)",
    "wavlm": r".*\.attention\.(q|k|v|out)_proj",
    "zamba2": _MAMBA2,
}
"""Layers whose weight transformers 5.24 uses without calling the layer, on some device or while training.

PEFT would wrap most of them, and the part of the weight that the adapter holds would be lost in silence.
"""
_CONV1D_MODELS = frozenset(("clvp", "decision_transformer", "gpt-sw3", "gpt2", "imagegpt", "openai-gpt"))
_CONV1D = re.compile(r"(.*\.)?(attn\.(c_attn|q_attn|c_proj)|crossattention\.(c_attn|q_attn|c_proj)|mlp\.(c_fc|c_proj))")

_SHARED = {
    "dab-detr": r"(.*\.)?bbox_(embed|predictor)\..*",
    "d_fine": r"(.*\.)?bbox_embed\..*",
    "deformable_detr": r"(.*\.)?bbox_embed\..*",
    "deimv2": r"(.*\.)?bbox_embed\..*",
    "diffusion_gemma": r".*\.layers\..*",
    "granite_speech5_ctc": r"encoder\.out|ctc_head",
    "neomme": r"(.*\.)?(un)?embedding_projection",
    "zamba": r"(.*\.)?shared_transf\..*",
    "zamba2": r"(.*\.)?shared_transformer\..*",
}


@dataclass(frozen=True)
class Architecture:
    """What is known of a model before its tensors are looked at one by one.

    Attributes:
        config: the model's config.json.
        rename: from names on disk to run-time names, or None where they cannot be told.
        tied: the output head is the embedding.
        mixture: there are experts, so a `gate` is a router.
        torch_attention: run-time names of the modules that are torch's nn.MultiheadAttention.
    """

    config: Mapping[str, Any]
    rename: Rename | None
    tied: bool
    mixture: bool
    torch_attention: frozenset[str]

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type", ""))

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The language model's part of the config."""
        inner = self.config.get("text_config")
        return inner if isinstance(inner, Mapping) else self.config

    def module(self, tensor: str) -> str:
        """The run-time name of the module that holds `tensor`."""
        renamed = tensor if self.rename is None else self.rename(tensor)
        return renamed.rpartition(".")[0]


def read_architecture(config: Mapping[str, Any], names: Collection[str]) -> Architecture:
    """What `config` and the tensors' names say of the model as a whole.

    A config that does not say whether the head is tied counts as tied: transformers' default is so for many
    models, and splitting one of two tied weights would untie them.
    """
    tied = config.get("tie_word_embeddings")
    if tied is None and isinstance(config.get("text_config"), Mapping):
        tied = config["text_config"].get("tie_word_embeddings")
    rename = renaming(config, names)
    attention = [name for name in names if name.endswith(".in_proj_weight")]
    return Architecture(
        config,
        rename,
        tied=tied is None or bool(tied),
        mixture=any(".experts." in name or name.startswith("experts.") for name in names),
        torch_attention=frozenset((name if rename is None else rename(name)).rpartition(".")[0] for name in attention),
    )


def kind_of(name: str, shape: tuple[int, ...], architecture: Architecture) -> Kind:
    """What holds tensor `name` once transformers has loaded it."""
    if len(shape) <= 1:
        return Kind.VECTOR
    module, leaf = architecture.module(name), name.rpartition(".")[2]
    if _EXPERT.search(name):
        return Kind.FUSED_EXPERTS if len(shape) > 2 else Kind.EXPERT
    if leaf != "weight" or not module:
        return Kind.OTHER
    if len(shape) > 2:
        return Kind.CONVOLUTION
    if _is_embedding(module, architecture.model_type):
        return Kind.EMBEDDING
    if architecture.rename is None:
        return Kind.RENAMED
    if _is_head(module, architecture.model_type):
        return Kind.TIED_HEAD if architecture.tied else Kind.HEAD
    if _is_unused(module, architecture):
        return Kind.UNUSED
    return _linear_kind(module, architecture)


def _is_embedding(module: str, model_type: str) -> bool:
    of_type = _EMBEDDING_OF.get(model_type)
    if of_type is not None and re.fullmatch(of_type, module):
        return True
    last = re.sub(r"\.\d+$", "", module).rpartition(".")[2]
    return _EMBEDDING.fullmatch(last) is not None and _NOT_EMBEDDING.fullmatch(module) is None


def _is_head(module: str, model_type: str) -> bool:
    return _HEAD.fullmatch(module) is not None or module == _HEAD_OF.get(model_type)


def _is_unused(module: str, architecture: Architecture) -> bool:
    """Layers for multi-token prediction and k/v projections that a later layer takes from an earlier one."""
    if re.match(r"(model\.(language_model\.)?)?mtp(_layers)?\.", module):
        return True
    layers = architecture.text_config.get("num_hidden_layers")
    match = re.match(r"(?:model\.)?(?:language_model\.)?layers\.(\d+)\.(.*)", module)
    if match is None or not isinstance(layers, int):
        return False
    shared = architecture.text_config.get("num_kv_shared_layers")
    if isinstance(shared, int) and re.fullmatch(r"self_attn\.[kv]_proj", match[2]):
        layers -= shared
    return int(match[1]) >= layers


def _is_router(module: str, architecture: Architecture) -> bool:
    return module.endswith(".router.layer") or (architecture.mixture and _ROUTER.fullmatch(module) is not None)


def _is_bypassed(module: str, architecture: Architecture) -> bool:
    """torch's own multi-head attention (it has an `in_proj_weight`) never calls its `out_proj` either."""
    if module.rpartition(".")[0] in architecture.torch_attention and module.endswith(".out_proj"):
        return True
    return _matches_type(_BYPASSED, module, architecture)


def _matches_type(table: Mapping[str, str], module: str, architecture: Architecture) -> bool:
    patterns = [table[name] for name in model_types(architecture.config) if name in table]
    return any(re.fullmatch(pattern, module) for pattern in patterns)


def _linear_kind(module: str, architecture: Architecture) -> Kind:
    last, model_type = module.rpartition(".")[2], architecture.model_type
    for ending, head in _TASK_HEADS.items():
        if architecture_name(architecture.config).endswith(ending) and head.fullmatch(module):
            return Kind.TASK_HEAD
    if _is_router(module, architecture) and _LINEAR_ROUTERS.isdisjoint(model_types(architecture.config)):
        return Kind.ROUTER
    if model_type in _MOE_REMAPPED and last in _MOE_LEAVES:
        return Kind.NAMED_AS_EXPERT
    if _is_bypassed(module, architecture):
        return Kind.BYPASSED
    if _matches_type(_SHARED, module, architecture):
        return Kind.SHARED
    return Kind.CONV1D if model_type in _CONV1D_MODELS and _CONV1D.fullmatch(module) else Kind.LINEAR
