"""Small random models of ten architectures: converted by a template and adapted, llama.cpp's logits are transformers'.

The template of each is written here with the gguf package, from the same knowledge of keys that a converter has, and is
itself held against transformers first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llamacpp
import numpy as np
import pytest
import torch
import transformers
from adapters import tensors_of, write
from gguf import GGUFWriter, RopeScalingType, get_tensor_name_map
from gguf.constants import MODEL_ARCH_NAMES
from gguf_models import add, finish, values_of
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from pissa_convert import convert
from pissa_convert.plans.gguf.names import KEPT, PERMUTED

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft.*"),
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning"),
]

TOKENS = list(range(3, 35))
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-6,
}


@dataclass(frozen=True)
class Tiny:
    """An architecture.

    Attributes:
        name: llama.cpp's.
        config: makes transformers' configuration of the sizes.
        permuted: q and k are stored in llama.cpp's order.
        keys: what the architecture needs beside the common keys.
        norms: what is added to the weights of norms.
    """

    name: str
    config: Callable[..., Any]
    permuted: bool = False
    keys: Callable[[GGUFWriter, Any], None] = lambda writer, config: None
    norms: float = 0.0


def _config(name: str, **more: Any) -> Callable[..., Any]:
    return lambda: getattr(transformers, f"{name}Config")(**{**SIZES, **more})


def _mixture(writer: GGUFWriter, config: Any) -> None:
    writer.add_expert_count(4)
    writer.add_expert_used_count(2)
    writer.add_expert_feed_forward_length(getattr(config, "moe_intermediate_size", None) or config.intermediate_size)


def _gemma2(writer: GGUFWriter, config: Any) -> None:
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_sliding_window(config.sliding_window)


def _gemma3(writer: GGUFWriter, config: Any) -> None:
    writer.add_sliding_window(config.sliding_window)


def _granite(writer: GGUFWriter, config: Any) -> None:
    writer.add_attention_scale(config.attention_multiplier)
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_residual_scale(config.residual_multiplier)
    writer.add_logit_scale(config.logits_scaling)


_GRANITE = {
    "attention_multiplier": 0.2,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "logits_scaling": 2.0,
}
_GEMMA = {
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}

MODELS = {
    "llama": Tiny("llama", _config("Llama"), permuted=True),
    "mistral": Tiny("llama", _config("Mistral", sliding_window=None), permuted=True),
    "mixtral": Tiny(
        "llama", _config("Mixtral", num_local_experts=4, num_experts_per_tok=2, sliding_window=None), True, _mixture
    ),
    "qwen2": Tiny("qwen2", _config("Qwen2")),
    "qwen3": Tiny("qwen3", _config("Qwen3", head_dim=32)),
    "qwen3moe": Tiny("qwen3moe", _config("Qwen3Moe", head_dim=32, **_EXPERTS), keys=_mixture),
    "gemma2": Tiny("gemma2", _config("Gemma2", sliding_window=64, **_GEMMA), keys=_gemma2, norms=1.0),
    "gemma3": Tiny("gemma3", _config("Gemma3Text", sliding_window=64, **_GEMMA), keys=_gemma3, norms=1.0),
    "phi3": Tiny("phi3", _config("Phi3", sliding_window=None)),
    "granite": Tiny("granite", _config("Granite", **_GRANITE), True, _granite),
    "olmo2": Tiny("olmo2", _config("Olmo2")),
}


def _layer_norm(writer: GGUFWriter, config: Any) -> None:
    writer.add_layer_norm_eps(getattr(config, "layer_norm_eps", None) or getattr(config, "norm_epsilon", 1e-5))


def _cohere(writer: GGUFWriter, config: Any) -> None:
    _layer_norm(writer, config)
    writer.add_logit_scale(config.logit_scale)
    writer.add_rope_scaling_type(RopeScalingType.NONE)
    if hasattr(config, "sliding_window"):
        writer.add_sliding_window(config.sliding_window)


def _shared_expert(writer: GGUFWriter, config: Any) -> None:
    _mixture(writer, config)
    writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)


def _whole_experts(writer: GGUFWriter, config: Any) -> None:
    writer.add_expert_count(4)
    writer.add_expert_used_count(2)


_MIXTURES = (_mixture, _shared_expert, _whole_experts)
_TIED = {"tie_word_embeddings": True}
_COHERE = {"logit_scale": 0.5, **_TIED}
_SHARED = {**_EXPERTS, "norm_topk_prob": False, "shared_expert_intermediate_size": 64, "decoder_sparse_step": 1}

MORE = {
    "arcee": Tiny("arcee", _config("Arcee"), permuted=True),
    "cohere": Tiny("command-r", _config("Cohere", **_COHERE), keys=_cohere),
    "cohere2": Tiny("cohere2", _config("Cohere2", sliding_window=64, **_COHERE), keys=_cohere),
    "ernie4_5": Tiny("ernie4_5", _config("Ernie4_5", head_dim=16)),
    "exaone4": Tiny("exaone4", _config("Exaone4", sliding_window=None, layer_types=["full_attention"] * 2)),
    "gemma": Tiny("gemma", _config("Gemma", head_dim=16, hidden_activation="gelu_pytorch_tanh", **_TIED), norms=1.0),
    "olmo": Tiny("olmo", _config("Olmo", num_key_value_heads=4), permuted=True, keys=_layer_norm),
    "olmoe": Tiny(
        "olmoe", _config("Olmoe", num_key_value_heads=4, num_experts=4, num_experts_per_tok=2), keys=_whole_experts
    ),
    "qwen2moe": Tiny("qwen2moe", _config("Qwen2Moe", **_SHARED), keys=_shared_expert),
    "seed_oss": Tiny("seed_oss", _config("SeedOss", head_dim=16)),
    "smollm3": Tiny("smollm3", _config("SmolLM3", use_sliding_window=False), permuted=True),
    "starcoder2": Tiny("starcoder2", _config("Starcoder2", sliding_window=None), keys=_layer_norm),
}


def _model(tiny: Tiny, folder: Path) -> Any:
    """A random model, and its folder: norms and biases that are not their defaults, too."""
    torch.manual_seed(0)
    config = tiny.config()
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
            elif "embed" not in name:
                parameter *= 3
    model.save_pretrained(folder, max_shard_size="100KB")
    return model


def _logits(model: Any) -> Any:
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0].double().numpy()


def _interleave(rows: Any, heads: int) -> Any:
    width = rows.shape[0] // heads
    places = [(head, i, half) for head in range(heads) for i in range(width // 2) for half in (0, 1)]
    return rows[[head * width + half * width // 2 + i for head, i, half in places]]


def _template(tiny: Tiny, folder: Path, path: Path, kind: str = "F32") -> Path:
    config = tiny.config()
    writer = GGUFWriter(path, tiny.name)
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)
    tiny.keys(writer, config)
    names = get_tensor_name_map(next(n for n, name in MODEL_ARCH_NAMES.items() if name == tiny.name), 2)
    stacks: dict[str, dict[int, Any]] = {}
    for name, tensor in _tensors(folder).items():
        values = tensor.numpy()
        if ".experts." in name:
            stem, _, rest = name.partition(".experts.")
            number, _, leaf = rest.partition(".")
            stacks.setdefault(f"{stem}.experts.{leaf}", {})[int(number)] = values
            continue
        if tiny.permuted and name.endswith(("q_proj.weight", "k_proj.weight")):
            values = _interleave(values, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
        if name.endswith("norm.weight"):
            values = values + np.float32(tiny.norms)
        found = names.get_name(name, (".weight", ".bias"))
        add(writer, found, values, kind if values.ndim > 1 and "ffn_gate_inp" not in found else "F32")
    for name, experts in stacks.items():
        found = names.get_name(name, (".weight",))
        add(writer, found, np.stack([experts[number] for number in sorted(experts)]), kind)
    return finish(writer)


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for file in sorted(folder.glob("model*.safetensors")) for name, tensor in load_file(file).items()
    }


def test_every_architecture_whose_layout_is_claimed_is_shown() -> None:
    assert {tiny.name for tiny in (*MODELS.values(), *MORE.values())} == PERMUTED | KEPT


@pytest.mark.parametrize("name", [*MODELS, *(pytest.param(name, marks=pytest.mark.long) for name in MORE)])
def test_a_trained_model_and_an_adapter_agree_with_transformers(name: str, tmp_path: Path) -> None:
    tiny = {**MODELS, **MORE}[name]
    model = _model(tiny, tmp_path / "base")
    base = _template(tiny, tmp_path / "base", tmp_path / "base.gguf")
    expected = _logits(model)
    assert np.abs(llamacpp.logits(base, TOKENS) - expected).max() < 1e-3  # the template is right

    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * parameter.std() * torch.randn_like(parameter) if parameter.ndim > 1 else 0.01
    model.save_pretrained(tmp_path / "trained")
    template = _template(tiny, tmp_path / "base", tmp_path / "template.gguf", "Q8_0")
    convert(tmp_path / "trained", tmp_path / "trained.gguf", "gguf", base_gguf=template, outtype="f32")
    found = llamacpp.logits(tmp_path / "trained.gguf", TOKENS)
    assert np.abs(found - _logits(model)).max() < 1e-3
    assert np.abs(found - expected).max() > 0.02  # and training did something

    # PEFT adapts the experts of transformers 5 as 3-D parameters or not at all.
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"] if tiny.keys in _MIXTURES else "all-linear"
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=12, target_modules=targets, init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "lora")
    convert(tmp_path / "lora", tmp_path / "lora.gguf", "gguf", base_gguf=tmp_path / "trained.gguf", outtype="f32")
    with_adapter = llamacpp.logits(tmp_path / "trained.gguf", TOKENS, [tmp_path / "lora.gguf"])
    assert np.abs(with_adapter - _logits(adapted)).max() < 2e-3
    assert np.abs(with_adapter - found).max() > 0.02

    convert(tmp_path / "lora", tmp_path / "config.gguf", "gguf", base=tmp_path / "trained", outtype="f32")
    first, second = values_of(tmp_path / "lora.gguf"), values_of(tmp_path / "config.gguf")
    assert first.keys() == second.keys()
    assert all((first[key] == second[key]).all() for key in first)

    convert(tmp_path / "trained.gguf", tmp_path / "merged.gguf", "merged", adapter=tmp_path / "lora")
    assert np.abs(llamacpp.logits(tmp_path / "merged.gguf", TOKENS) - with_adapter).max() < 2e-3

    convert(tmp_path / "trained.gguf", tmp_path / "split", "pissa", rank=8)
    adapter, residual = sorted((tmp_path / "split").glob("*.gguf"), key=lambda path: "RESIDUAL" in path.name)
    both = llamacpp.logits(residual, TOKENS, [adapter])
    assert np.abs(both - found).max() < 2e-3
    assert np.abs(llamacpp.logits(residual, TOKENS) - found).max() > 0.02


def test_an_adapter_of_every_expert_is_what_it_adds_to_each(tmp_path: Path) -> None:
    """PEFT under transformers 4 adapted experts one by one; llama.cpp's sum is that of a merged model."""
    tiny = MODELS["qwen3moe"]
    model = _model(tiny, tmp_path / "base")
    base = _template(tiny, tmp_path / "base", tmp_path / "base.gguf")
    tensors = _tensors(tmp_path / "base")
    generator = torch.Generator().manual_seed(4)
    pairs = {
        name.removesuffix(".weight"): (
            torch.randn(3, tensor.shape[1], generator=generator),
            0.1 * torch.randn(tensor.shape[0], 3, generator=generator),
        )
        for name, tensor in tensors.items()
        if ".experts." in name or name.endswith("mlp.gate.weight")
    }
    lora = write(tmp_path / "lora", tensors_of(pairs), lora_alpha=6)
    for name, (a, b) in pairs.items():
        tensors[f"{name}.weight"] += 2 * b @ a
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "config.json").write_bytes((tmp_path / "base" / "config.json").read_bytes())
    save_file(tensors, tmp_path / "merged" / "model.safetensors", metadata={"format": "pt"})
    expected = _logits(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    )
    convert(lora, tmp_path / "lora.gguf", "gguf", base_gguf=base, outtype="f32")
    assert np.abs(llamacpp.logits(base, TOKENS, [tmp_path / "lora.gguf"]) - expected).max() < 2e-3
    assert np.abs(_logits(model) - expected).max() > 0.02
    convert(base, tmp_path / "merged.gguf", "merged", adapter=lora)
    assert np.abs(llamacpp.logits(tmp_path / "merged.gguf", TOKENS) - expected).max() < 2e-3
