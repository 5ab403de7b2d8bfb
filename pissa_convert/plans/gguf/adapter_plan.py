"""The plan of an adapter's GGUF: every tensor's place and type, and the one file that comes out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pissa_convert.formats.adapter import CONFIG_NAME, WEIGHTS_NAME
from pissa_convert.formats.adapter_folder import AdapterFolder
from pissa_convert.formats.gguf import FLOAT32, STRING, padded
from pissa_convert.formats.gguf_layout import encode_pair, lay_out
from pissa_convert.formats.gguf_types import TYPES
from pissa_convert.formats.manifest import (
    FileRecord,
    Fixed,
    FixedCount,
    blank_records,
    manifest_head,
    manifest_name,
    render_manifest,
    sizes_of,
)
from pissa_convert.formats.safetensors import TensorInfo
from pissa_convert.memory import MemoryPlan
from pissa_convert.plans.fingerprint import fingerprint
from pissa_convert.plans.gguf.adapter import AdaptedTensor, Target
from pissa_convert.plans.gguf.options import GgufOptions
from pissa_convert.plans.gguf.usage import usage
from pissa_convert.plans.lora_plan import LoraPlan

ALIGNMENT = 32


@dataclass(frozen=True)
class FactorStats:
    """What is known of a tensor's finished factors.

    Attributes:
        relative_error: ‖ΔW − B·A‖ / ‖ΔW‖ as stored.
        norm: ‖ΔW‖.
    """

    relative_error: float = 0.0
    norm: float = 0.0


@dataclass(frozen=True)
class GgufAdapterPlan:
    """What `convert(to="gguf")` would do with an adapter.

    Attributes:
        dest: absolute path of the folder that the file comes into.
        alone: the file's name.
        adapter: what is converted.
        lora: makes ΔW of it on the way, where it is a trained adapter with its initial one.
        target: the base model.
        tensors: what is adapted, in the order of the file.
        in_flight: tensors that are worked on at once.
    """

    dest: Path
    alone: str
    options: GgufOptions
    adapter: AdapterFolder
    lora: LoraPlan | None
    target: Target
    tensors: tuple[AdaptedTensor, ...]
    in_flight: int
    memory: MemoryPlan
    warnings: tuple[str, ...] = ()
    to: str = "gguf"

    @property
    def head(self) -> dict[str, Any]:
        """What the manifest says of the conversion as a whole."""
        made = {} if self.lora is None else {**self.lora.options.as_json(), **self.lora.init.options}
        return manifest_head(self.to, "numpy", {"made": "adapter", **made, **self.options.as_json()})

    @cached_property
    def _layout(self) -> tuple[bytes, tuple[TensorInfo, ...]]:
        return lay_out(adapter_pairs(self.target.layout.architecture, 0.0), self._factors(), ALIGNMENT)

    def _factors(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        for tensor in self.tensors:
            for side, shape in (("a", tensor.a_shape), ("b", tensor.b_shape)):
                yield f"{tensor.name}.lora_{side}", factor_type(self.options.outtype, shape), shape

    @property
    def header(self) -> bytes:
        """The file up to its first tensor."""
        return self._layout[0]

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return padded(self._layout[1][-1].end, ALIGNMENT)

    @cached_property
    def slots(self) -> dict[str, tuple[TensorInfo, TensorInfo]]:
        """A and B of each tensor."""
        places = iter(self._layout[1])
        return {tensor.name: (next(places), next(places)) for tensor in self.tensors}

    @cached_property
    def output_sizes(self) -> dict[str, int]:
        """Size in bytes of every file of the result; with `--rank auto` at most."""
        sizes = {self.alone: self.size}
        sources, outputs = blank_records(sizes_of(self.sources)), blank_records(sizes)
        stats = {tensor.name: FactorStats() for tensor in self.tensors}
        return sizes | {manifest_name(self.alone): len(self.manifest(sources, outputs, stats))}

    @property
    def sources(self) -> dict[str, Path]:
        """The adapters' files; of the base model's GGUF only the header decides the result."""
        if self.lora is not None:
            return self.lora.sources
        return {name: self.adapter.root / name for name in (CONFIG_NAME, WEIGHTS_NAME)}

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What must be unchanged while the work goes on."""
        return fingerprint(self.head, {**self.sources, "of the base model": self.target.file})

    @property
    def usage(self) -> str:
        """How llama.cpp and Ollama take the result."""
        known = self.target.shapes is not None
        return usage(self.target.file if known else Path("BASE.gguf"), [self.dest / self.alone])

    def manifest(
        self, source: Mapping[str, FileRecord], output: Mapping[str, FileRecord], stats: Mapping[str, FactorStats]
    ) -> bytes:
        """The text of the manifest."""
        tensors = {
            tensor.name: {
                "rank": FixedCount(tensor.rank),
                "relative_error": Fixed(stats[tensor.name].relative_error),
                "norm": Fixed(stats[tensor.name].norm),
            }
            for tensor in self.tensors
        }
        return render_manifest(self.head, source, output, tensors)


def adapter_pairs(architecture: str, alpha: float) -> list[bytes]:
    """The keys of an adapter's GGUF; with alpha 0 its scaling is exactly what the user asks for, whatever the ranks."""
    texts = {"general.architecture": architecture, "general.type": "adapter", "adapter.type": "lora"}
    pairs = [encode_pair(key, text, STRING) for key, text in texts.items()]
    return [*pairs, encode_pair("adapter.lora.alpha", alpha, FLOAT32)]


def factor_type(outtype: str, shape: tuple[int, ...]) -> str:
    """The type of a factor: as asked for, or F16 where its rows are no whole blocks of that."""
    kind = outtype.upper()
    return kind if shape[-1] % TYPES[kind].block == 0 else "F16"
