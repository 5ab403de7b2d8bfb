"""Which tensors of a model an adapter changes, and how: every tensor of the adapter is matched, by run-time names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from pissa_convert.errors import RequestError
from pissa_convert.formats.adapter import PREFIX
from pissa_convert.formats.adapter_folder import AdapterFolder, Pair
from pissa_convert.formats.checkpoint import Checkpoint
from pissa_convert.formats.safetensors import TensorInfo
from pissa_convert.plans.architectures import Architecture, Kind, kind_of
from pissa_convert.plans.merge_steps import Change
from pissa_convert.plans.naming import has_head
from pissa_convert.plans.targets import SPLITTABLE

HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Changes:
    """What an adapter does to a model.

    Attributes:
        tensors: the changes by the tensor's name in the checkpoint.
        head: what an output head that is tied to `tied_to` becomes, where the two do not stay the same.
        tied_to: the embedding's tensor.
    """

    tensors: Mapping[str, Change]
    head: Change | None = None
    tied_to: str | None = None


def find_changes(checkpoint: Checkpoint, architecture: Architecture, adapter: AdapterFolder) -> Changes:
    """Match an adapter with a model.

    Raises:
        RequestError: the adapter has something that the model has no place for, or that cannot be merged.
    """
    by_name = {_run_time_name(tensor.name, architecture): tensor for tensor in checkpoint.tensors}
    tied = _tied_embedding(checkpoint, architecture, by_name)
    tensors: dict[str, Change] = {}
    head: Change | None = None
    for name, key, change in _wanted(adapter):
        tensor = by_name.get(name)
        if tensor is None and name == HEAD and tied is not None:
            head = _joined(head, _fitted(change, tied, Kind.TIED_HEAD, key, adapter))
            continue
        if tensor is None:
            raise RequestError(
                "the model has no weight for it",
                file=adapter.file.path,
                tensor=key,
                expected=name,
                fix="give the model that the adapter was trained on, or the original for a LoRA of --to lora",
            )
        change = _fitted(change, tensor, kind_of(tensor.name, tensor.shape, architecture), key, adapter)
        tensors[tensor.name] = _joined(tensors.get(tensor.name), change)
    return _with_head(tensors, head, tied, adapter)


def _joined(factors: Change | None, change: Change) -> Change:
    """PEFT saves the factors of an embedding or a head together with the layer below them: both hold."""
    return change if factors is None else replace(factors, whole=change.whole)


def _run_time_name(tensor: str, architecture: Architecture) -> str:
    return ".".join(filter(None, (architecture.module(tensor), tensor.rpartition(".")[2])))


def _wanted(adapter: AdapterFolder) -> list[tuple[str, str, Change]]:
    """Run-time name, name in the adapter, and change, of everything that the adapter holds."""
    wanted = []
    for module, pair in adapter.pairs.items():
        wanted.append((f"{module}.weight", pair.a.name, Change(pair=pair)))
        if pair.bias is not None:
            wanted.append((f"{module}.bias", pair.bias.name, Change(pair=pair, is_bias=True)))
    for key, tensor in adapter.carried.items():
        if key.endswith(".trainable_tokens_delta"):
            raise RequestError(
                "rows of an embedding that were trained alone (trainable_token_indices) cannot be merged",
                file=adapter.file.path,
                tensor=tensor.name,
                fix="merge with PEFT",
            )
        name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
        wanted.append((name, tensor.name, Change(whole=tensor)))
    return wanted


def _fitted(change: Change, tensor: TensorInfo, kind: Kind, key: str, adapter: AdapterFolder) -> Change:
    """The change with its orientation, checked against the tensor."""
    if tensor.dtype not in SPLITTABLE or (change.whole is not None and change.whole.dtype not in SPLITTABLE):
        raise RequestError(
            "cannot be merged into its dtype",
            tensor=tensor.name,
            expected=" or ".join(SPLITTABLE),
            found=tensor.dtype,
            fix="dequantise the model first",
        )
    if change.pair is not None and not change.is_bias:
        change = Change(pair=change.pair, transposed=change.pair.is_embedding or kind is Kind.CONV1D)
    shape = _shape(change, tensor)
    if shape != tensor.shape:
        raise RequestError(
            "does not fit the model's weight",
            file=adapter.file.path,
            tensor=key,
            expected=f"{tensor.name} of shape {list(tensor.shape)}",
            found=list(shape),
            fix="give the model that it was trained on; where the vocabulary grew, resize and save that model first",
        )
    return change


def _shape(change: Change, tensor: TensorInfo) -> tuple[int, ...]:
    pair = change.pair
    if pair is None:
        assert change.whole is not None
        return change.whole.shape
    if change.is_bias:
        return (pair.size_out,)
    return (pair.size_in, pair.size_out) if change.transposed else (pair.size_out, pair.size_in)


def _tied_embedding(
    checkpoint: Checkpoint, architecture: Architecture, by_name: Mapping[str, TensorInfo]
) -> TensorInfo | None:
    """The embedding that is the output head too, if the model has such a head and no tensor for it."""
    if not architecture.tied or HEAD in by_name or not has_head(checkpoint.config):
        return None
    rows = architecture.text_config.get("vocab_size")
    found = [
        tensor
        for tensor in checkpoint.tensors
        if kind_of(tensor.name, tensor.shape, architecture) is Kind.EMBEDDING and tensor.shape[0] == rows
    ]
    return found[0] if len(found) == 1 else None


def _with_head(
    tensors: dict[str, Change], head: Change | None, tied: TensorInfo | None, adapter: AdapterFolder
) -> Changes:
    """A tied head and its embedding part where the adapter changes one of them only, or each in its own way."""
    embedding = tensors.get(tied.name) if tied is not None else None
    if tied is None or (head is None and embedding is None):
        return Changes(tensors)
    follows = bool(adapter.config.get("ensure_weight_tying"))
    if (follows and head is None) or (head is not None and _same(head, embedding, adapter)):
        return Changes(tensors)
    # PEFT leaves the head at the base's weight when it adapts the embedding, and the reverse.
    return Changes(tensors, head or Change(), tied.name)


def _same(head: Change, embedding: Change | None, adapter: AdapterFolder) -> bool:
    """Whether both were saved whole, with the same bytes: PEFT's save_embedding_layers does so for a tied model."""
    if embedding is None or head.pair is not None or embedding.pair is not None:
        return False
    one, other = head.whole, embedding.whole
    if one is None or other is None or (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with open(adapter.file.path, "rb") as file:
        for at in range(0, one.nbytes, 1 << 20):
            size = min(1 << 20, one.nbytes - at)
            parts = []
            for tensor in (one, other):
                file.seek(tensor.begin + at)
                parts.append(file.read(size))
            if parts[0] != parts[1]:
                return False
    return True


def pairs_of(changes: Changes) -> dict[str, Pair]:
    """The factors that are added to whole weights, by tensor name."""
    return {
        name: change.pair for name, change in changes.tensors.items() if change.pair is not None and not change.is_bias
    }
