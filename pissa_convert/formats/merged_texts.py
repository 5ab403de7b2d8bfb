"""The small files of a merged model: model card, index, config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pissa_convert.formats.model_card import ORIGINAL_FOLLOWS, RESIDUAL_TITLE, split_front_matter
from pissa_convert.formats.quant_card import QUANTISED_TITLE

_CARD = """# Merged model

An adapter was added to the weights of a model by pissa-convert {version}, in float32 and rounded once: {tensors}
tensors changed{dtype}. The model is complete and needs no adapter. `pissa_convert.json` holds the digests of every file
here and of what it was made from, and the rounding error of each weight.
"""

_BASE_CARD = """# Base of a QPiSSA adapter, read back from 4 bits

The weights of a 4-bit base as bitsandbytes reads them, written out by pissa-convert {version}{dtype}: what an adapter
was trained on, bit by bit, for servers that do not take 4-bit weights. **This is not a complete model**: the adapter
belongs on it.
"""


def merged_card(original: bytes | None, tensors: int | None, dtype: str | None, version: str) -> bytes:
    """The card: ours, then that of the model, without what a split put before it.

    Args:
        tensors: that an adapter has changed; None where there is none.
    """
    became = f", and all became {dtype}" if dtype else ""
    ours = (_BASE_CARD if tensors is None else _CARD).format(version=version, tensors=tensors, dtype=became)
    if original is None:
        return ours.encode()
    front, body = split_front_matter(original.decode("utf-8", "surrogateescape"))
    residual, marker, kept = body.partition(ORIGINAL_FOLLOWS)
    if not marker:
        ours_alone = any(title in residual for title in (RESIDUAL_TITLE, QUANTISED_TITLE))
        kept = "" if ours_alone else residual
    card = f"{front}\n{ours}" + (f"\n---\n\n{ORIGINAL_FOLLOWS}\n\n{kept.lstrip()}" if kept.strip() else "")
    return card.lstrip("\n").encode("utf-8", "surrogateescape")


def merged_config(text: bytes, dtype: str | None, untied: bool) -> bytes:
    """config.json with what has changed: the dtype, that the output head is tied no longer, or no weight quantised."""
    config = json.loads(text)
    config.pop("quantization_config", None)
    if dtype is not None:
        for part in (config, *(value for value in config.values() if isinstance(value, dict))):
            for name in ("dtype", "torch_dtype"):
                if name in part:
                    part[name] = dtype
    if untied:
        config["tie_word_embeddings"] = False
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def merged_index(text: bytes | None, placed: Mapping[str, Sequence[tuple[str, int]]]) -> bytes:
    """The index of a model whose tensors' sizes have changed, or that has a tensor more.

    Args:
        text: the old one, if there was one.
        placed: name and bytes of every tensor, by file.
    """
    index: dict[str, Any] = json.loads(text) if text is not None else {}
    metadata = {name: value for name, value in index.get("metadata", {}).items() if name == "format"}
    metadata["total_size"] = sum(nbytes for tensors in placed.values() for _, nbytes in tensors)
    weight_map = {name: file for file, tensors in placed.items() for name, _ in tensors}
    values = index | {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
