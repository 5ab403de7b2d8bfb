"""Where an adapter's modules go in a base model's GGUF: every one of them has its place there, or is refused.

llama.cpp aborts on some adapters and ignores parts of others without a word; all of these are refused here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pissa_convert.errors import RequestError
from pissa_convert.formats.adapter_folder import AdapterFolder, Pair
from pissa_convert.plans.gguf.names import Home, Layout, permute
from pissa_convert.transforms.delta import Array, Product

_INSTEAD = "merge it into the model's own folder with --to merged, and convert what comes out with --to gguf"

_FUSED = {
    "attn_q.weight": ("attn_qkv.weight", 0),
    "attn_k.weight": ("attn_qkv.weight", 1),
    "attn_v.weight": ("attn_qkv.weight", 2),
    "ffn_gate.weight": ("ffn_up.weight", 0),
    "ffn_up.weight": ("ffn_up.weight", 1),
}
"""The parts of a weight that some models fuse: the fused one's name, and the part's place in it from the top."""


@dataclass(frozen=True)
class Piece:
    """One module's part of an adapted tensor.

    Attributes:
        module: its name in the adapter.
        rank: of its factors.
        top: where its rows begin.
        heads: its rows are permuted in so many groups; None where they keep their order.
        expert: its place in a stack of experts.
    """

    module: str
    rank: int
    top: int = 0
    heads: int | None = None
    expert: int | None = None


@dataclass(frozen=True)
class AdaptedTensor:
    """A tensor of the base model with what is added to it.

    Attributes:
        name: in the base model's GGUF.
        shape: (out × in), with the experts' number before it for a stack.
        pieces: side by side where they are parts of a fused weight, one for each expert of a stack, else one.
    """

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def rank(self) -> int:
        """Of A and B: parts of a fused weight have their own directions, experts share the number of the largest."""
        ranks = [piece.rank for piece in self.pieces]
        return max(ranks) if len(self.shape) == 3 else sum(ranks)

    @property
    def a_shape(self) -> tuple[int, ...]:
        return (*self.shape[:-2], self.rank, self.shape[-1])

    @property
    def b_shape(self) -> tuple[int, ...]:
        return (*self.shape[:-1], self.rank)

    @property
    def size(self) -> int:
        """Values of A and B together."""
        return math.prod(self.a_shape) + math.prod(self.b_shape)

    def factors(self, product: Callable[[str], Product]) -> tuple[Array, Array]:
        """A and B, scaling included, in the order of the base's rows; float64.

        Args:
            product: s·B and A of a module.
        """
        a, b = np.zeros(self.a_shape), np.zeros(self.b_shape)
        at = 0
        for piece in self.pieces:
            given = product(piece.module)
            left = given.left if piece.heads is None else permute(given.left, piece.heads)
            rank = given.right.shape[0]
            if piece.expert is not None:
                a[piece.expert, :rank], b[piece.expert, :, :rank] = given.right, left
            else:
                a[at : at + rank] = given.right
                b[piece.top : piece.top + len(left), at : at + rank] = left
                at += rank
        return a, b


@dataclass(frozen=True)
class _Part:
    """A module and its home."""

    pair: Pair
    rank: int
    home: Home


@dataclass(frozen=True)
class Target:
    """What an adapter is placed in.

    Attributes:
        layout: of the base model.
        shapes: of its tensors by name, in the order of its file; None where only its config is known.
        file: where that was read, for messages.
    """

    layout: Layout
    shapes: Mapping[str, tuple[int, ...]] | None
    file: Path


def place_adapter(adapter: AdapterFolder, ranks: Mapping[str, int], target: Target) -> tuple[AdaptedTensor, ...]:
    """Place every module of an adapter, in the order of the base's tensors.

    Args:
        ranks: of the modules' factors.

    Raises:
        RequestError: something of the adapter has no place, or has one that llama.cpp would not use.
    """
    _check_plain(adapter)
    groups: dict[str, list[_Part]] = {}
    for module, pair in adapter.pairs.items():
        home = target.layout.home(f"{module}.weight")
        if home is None:
            raise _misfit(pair, adapter, target, f"a layer that {target.layout.architecture} has", module)
        groups.setdefault(_fused_name(home, target.shapes), []).append(_Part(pair, ranks[module], home))
    placed = [_tensor(name, parts, adapter, target) for name, parts in groups.items()]
    order = {name: number for number, name in enumerate(target.shapes or groups)}
    return tuple(sorted(placed, key=lambda tensor: order[tensor.name]))


def _check_plain(adapter: AdapterFolder) -> None:
    """Refuse what a GGUF adapter cannot hold."""
    for tensor in adapter.carried.values():
        raise RequestError(
            "was trained whole (modules_to_save, or a bias), and a GGUF adapter holds only factors",
            file=adapter.file.path,
            tensor=tensor.name,
            fix=_INSTEAD,
        )
    for pair in adapter.pairs.values():
        if pair.is_embedding:
            raise RequestError(
                "adapts an embedding, on which llama.cpp aborts where the output head is tied to it",
                file=adapter.file.path,
                tensor=pair.a.name,
                fix=_INSTEAD,
            )
        if pair.bias is not None:
            raise RequestError(
                "is a bias, which llama.cpp would not load", file=adapter.file.path, tensor=pair.bias.name, fix=_INSTEAD
            )


def _misfit(pair: Pair, adapter: AdapterFolder, target: Target, expected: object, found: object) -> RequestError:
    return RequestError(
        f"does not fit the base model {target.file}",
        file=adapter.file.path,
        tensor=pair.a.name,
        expected=expected,
        found=found,
        fix="give the model that the adapter was trained on",
    )


def _fused_name(home: Home, shapes: Mapping[str, tuple[int, ...]] | None) -> str:
    """The tensor that a home is in: its own, or the fused one where the base has only that."""
    fused, _ = _FUSED.get(home.kind, (home.kind, 0))
    name = home.name.removesuffix(home.kind) + fused
    return name if shapes is not None and home.name not in shapes and name in shapes else home.name


def _tensor(name: str, parts: list[_Part], adapter: AdapterFolder, target: Target) -> AdaptedTensor:
    shape = _shape(name, parts, adapter, target)
    if any(part.home.expert is not None for part in parts):
        return _stack(name, shape, parts, adapter, target)
    pieces = []
    for part in parts:
        top, rows = _rows(part, name, shape, target) if len(shape) == 2 else (0, 0)
        even = rows % (2 * (part.home.heads or 1)) == 0 or part.home.heads is None
        if not even or (part.pair.size_out, part.pair.size_in) != (rows, shape[-1]):
            expected = f"{rows} rows of {name}, whose shape is {list(shape)}"
            raise _misfit(part.pair, adapter, target, expected, [part.pair.size_out, part.pair.size_in])
        pieces.append(Piece(part.pair.module, part.rank, top, part.home.heads))
    pieces.sort(key=lambda piece: piece.top)
    if len({piece.top for piece in pieces}) != len(pieces):
        raise _misfit(parts[0].pair, adapter, target, f"one module for {name}", ", ".join(p.module for p in pieces))
    return AdaptedTensor(name, shape, tuple(pieces))


def _shape(name: str, parts: list[_Part], adapter: AdapterFolder, target: Target) -> tuple[int, ...]:
    """Of the base's tensor."""
    pair = parts[0].pair
    if target.shapes is None:
        own = (pair.size_out, pair.size_in)
        return own if parts[0].home.expert is None else (target.layout.experts, *own)
    if name in target.shapes:
        return target.shapes[name]
    if name == "output.weight":
        raise RequestError(
            "adapts the output head, which is tied to the embedding in this base, and llama.cpp aborts on that",
            file=adapter.file.path,
            tensor=pair.a.name,
            fix=_INSTEAD,
        )
    raise _misfit(pair, adapter, target, f"a tensor {name} in it", "none")


def _rows(part: _Part, name: str, shape: tuple[int, ...], target: Target) -> tuple[int, int]:
    """Where a part's rows begin in a tensor, and how many they are."""
    count = shape[-2]
    fused, place = _FUSED.get(part.home.kind, (part.home.kind, 0))
    if not name.endswith(fused) or (name == part.home.name and part.pair.size_out == count):
        return 0, count
    if fused == "ffn_up.weight":
        return place * (count // 2), count // 2
    block = int(name.split(".")[1])
    heads, key_heads = target.layout.heads(block), target.layout.key_heads(block)
    width = count // max(1, heads + 2 * key_heads)
    return ((0, heads, heads + key_heads)[place] * width, (heads, key_heads, key_heads)[place] * width)


def _stack(
    name: str, shape: tuple[int, ...], parts: list[_Part], adapter: AdapterFolder, target: Target
) -> AdaptedTensor:
    """The experts' modules as one: llama.cpp does not check that there are as many as the model has."""
    found = sorted(-1 if part.home.expert is None else part.home.expert for part in parts)
    count = shape[0] if len(shape) == 3 else 0
    if found != list(range(count)) or count != target.layout.experts:
        expected = f"{target.layout.experts} experts in {name}"
        raise _misfit(parts[0].pair, adapter, target, expected, f"{len(set(found))}, up to number {found[-1]}")
    for part in parts:
        if (part.pair.size_out, part.pair.size_in) != shape[1:]:
            found_shape = [part.pair.size_out, part.pair.size_in]
            raise _misfit(part.pair, adapter, target, f"{name} of shape {list(shape)}", found_shape)
    pieces = (Piece(part.pair.module, part.rank, expert=part.home.expert) for part in parts)
    return AdaptedTensor(name, shape, tuple(sorted(pieces, key=lambda piece: piece.expert or 0)))
