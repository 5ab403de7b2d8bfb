"""Where the tensors of a Hugging Face model lie in a GGUF of it, and in what order their rows are there.

Names come from the `gguf` package's TensorNameMap. llama.cpp keeps the values of a weight as they are, but for some
architectures it has the rows of q and k in another order within each head: the halves that rotate together interleaved.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pissa_convert.errors import RequestError
from pissa_convert.plans.gguf.model import BaseGguf, config_value

PERMUTED = frozenset(("arcee", "granite", "llama", "olmo", "smollm3"))
"""Architectures whose q and k are permuted."""

# fmt: off
KEPT = frozenset((
    "cohere2", "command-r", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3", "olmo2", "olmoe", "phi3",
    "qwen2", "qwen2moe", "qwen3", "qwen3moe", "seed_oss", "starcoder2",
))
"""Architectures whose rows stay in their order."""

APPLIES_ADAPTERS = PERMUTED | KEPT | frozenset((
    "baichuan", "bloom", "chatglm", "codeshell", "deci", "dream", "exaone", "falcon", "gpt2", "gptneox", "granitemoe",
    "internlm2", "jais", "llada", "minicpm", "mistral3", "mpt", "nemotron", "openelm", "orion", "phi2", "phimoe",
    "plamo", "qwen", "qwen2vl", "qwen3vl", "qwen3vlmoe", "refact", "stablelm", "starcoder", "xverse",
))
# fmt: on
"""Architectures for which llama.cpp multiplies by every weight of a layer through the function that adds adapters."""

ONE_MORE = frozenset(("gemma", "gemma2", "gemma3"))
"""Architectures whose norms are stored as 1 + weight."""

_BY_MODEL_TYPE = {
    "arcee": "arcee",
    "cohere": "command-r",
    "cohere2": "cohere2",
    "ernie4_5": "ernie4_5",
    "exaone4": "exaone4",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "granite": "granite",
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "olmo": "olmo",
    "olmo2": "olmo2",
    "olmoe": "olmoe",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen2_moe": "qwen2moe",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "seed_oss": "seed_oss",
    "smollm3": "smollm3",
    "starcoder2": "starcoder2",
}
"""llama.cpp's architecture for a model type of transformers, where the layout is known."""

_EXPERT = re.compile(r"(?P<stem>.*\.experts)\.(?P<number>\d+)\.(?P<rest>.+)")
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")


def block_kind(name: str) -> str:
    """A GGUF name without the layer."""
    match = _BLOCK.fullmatch(name)
    return match[2] if match else name


@dataclass(frozen=True)
class Home:
    """Where a tensor lies.

    Attributes:
        name: of the GGUF tensor.
        expert: its place in a stack of experts.
        heads: its rows are permuted in so many groups; None where they keep their order.
    """

    name: str
    expert: int | None = None
    heads: int | None = None

    @property
    def kind(self) -> str:
        """The name without the layer."""
        return block_kind(self.name)


@dataclass(frozen=True)
class Layout:
    """What of a model decides where its tensors lie.

    Attributes:
        architecture: llama.cpp's name.
        blocks: layers.
        heads, key_heads: of a layer.
        experts: of a mixture, or 0.
        find: the GGUF name of a Hugging Face name, or None.
    """

    architecture: str
    blocks: int
    heads: Callable[[int], int]
    key_heads: Callable[[int], int]
    experts: int
    find: Callable[[str], str | None]

    @property
    def is_known(self) -> bool:
        """Whether the order of the rows is known without looking at values."""
        return self.architecture in PERMUTED | KEPT

    def home(self, name: str) -> Home | None:
        """Where a tensor of a Hugging Face model lies; None where there is no place for it.

        Args:
            name: with ".weight" or ".bias".
        """
        expert = _EXPERT.fullmatch(name)
        found = self.find(f"{expert['stem']}.{expert['rest']}" if expert else name)
        if found is None:
            return None
        block = _BLOCK.fullmatch(found)
        heads = None
        if block and self.architecture in PERMUTED:
            heads = self.rotated(block[2].partition(".")[0], int(block[1]))
        return Home(found, int(expert["number"]) if expert else None, heads)

    def rotated(self, kind: str, block: int) -> int | None:
        """The heads of a tensor whose rows may be permuted: of "attn_q" and "attn_k"."""
        if kind not in ("attn_q", "attn_k"):
            return None
        return (self.heads if kind == "attn_q" else self.key_heads)(block) or None


def layout_of(base: BaseGguf) -> Layout:
    """The layout of a base model's GGUF.

    Raises:
        RequestError: its architecture's names are not known.
    """
    own, common = (_finder(architecture, base.blocks) for architecture in (base.architecture, "llama"))

    def find(name: str) -> str | None:
        """Parts of what the architecture fuses have the names that they have where nothing is fused."""
        return own(name) or common(name)

    return Layout(base.architecture, base.blocks, base.heads, base.key_heads, base.experts, find)


def layout_from_config(config: dict[str, Any], file: object) -> Layout:
    """The layout that a GGUF of a Hugging Face model would have, from its config.json.

    Raises:
        RequestError: it is none of the models for which this is known.
    """
    architecture = _BY_MODEL_TYPE.get(str(config.get("model_type")))
    heads = config_value(config, "num_attention_heads")
    blocks = config_value(config, "num_hidden_layers")
    if architecture is None or heads is None or blocks is None:
        raise RequestError(
            "the layout of this model's GGUF cannot be told from its config",
            file=str(file),
            expected=f"model_type {', '.join(sorted(_BY_MODEL_TYPE))}",
            found=str(config.get("model_type"))[:40],
            fix="give a GGUF of the model as --base-gguf",
        )
    key_heads = config_value(config, "num_key_value_heads") or heads
    experts = config_value(config, "num_local_experts", "num_experts") or 0
    find = _finder(architecture, blocks)
    return Layout(architecture, blocks, lambda block: heads, lambda block: key_heads, experts, find)


def _finder(architecture: str, blocks: int) -> Callable[[str], str | None]:
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    number = next((number for number, name in MODEL_ARCH_NAMES.items() if name == architecture), None)
    if number is None:
        raise RequestError(
            "the tensor names of this architecture are not known here",
            found=architecture[:40],
            fix="pip install --upgrade gguf",
        )
    names = get_tensor_name_map(number, blocks)

    def find(name: str) -> str | None:
        stem, _, leaf = name.rpartition(".")
        found = names.get_name(stem) if leaf in ("weight", "bias") else None
        return f"{found}.{leaf}" if found else names.get_name(name)

    return find


def permute(rows: Any, heads: int) -> Any:
    """Rows of q or k, in the order that llama.cpp wants within each head: 0, n/2, 1, n/2 + 1, …, of n."""
    shape = rows.shape
    return rows.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)
