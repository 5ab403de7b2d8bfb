"""A model's GGUF from a template: which type each tensor gets, and where it lies."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from pissa_convert.errors import RequestError
from pissa_convert.formats.checkpoint import Checkpoint
from pissa_convert.formats.gguf import STRING, UINT32, GgufFile
from pissa_convert.formats.gguf_layout import encode_pair, lay_out
from pissa_convert.formats.gguf_types import PLAIN, TYPES
from pissa_convert.formats.safetensors import TensorInfo
from pissa_convert.memory import Widths, plan_memory
from pissa_convert.options import RunOptions
from pissa_convert.plans.gguf.adapter_planning import file_dest
from pissa_convert.plans.gguf.model import RESIDUAL_MARK, BaseGguf
from pissa_convert.plans.gguf.options import KEEPING, GgufOptions
from pissa_convert.plans.gguf.origins import Origin
from pissa_convert.plans.gguf.plan import GgufPlan
from pissa_convert.plans.gguf.steps import VALUES, Encode, Treatment, encode_steps, gguf_steps
from pissa_convert.plans.steps import ShardPlan, Step, changes_of, flights
from pissa_convert.transforms.ggml import can_decode, check_encodable

WORKSPACE = 8 * 4 * VALUES
"""Bytes of the arrays that a lane works with: the values, the quantiser's own, and the values as stored."""

_SMALLER_BLOCKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""What llama.cpp takes where a row is no whole number of a K-quant's blocks of 256."""

_KEPT_FULL = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "ssm_conv1d.weight", "token_types.weight")
"""Matrices that llama.cpp never quantises: small, and everything depends on them."""

_FILE_TYPES = {
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q4_1": 3,
    "q8_0": 7,
    "q5_0": 8,
    "q5_1": 9,
    "q2_k": 10,
    "q3_k": 11,
    "q4_k": 14,
    "q5_k": 16,
    "q6_k": 18,
    "bf16": 32,
}
"""llama.cpp's numbers for what most of a file is in (llama_ftype)."""


def check_decodable(tensor: TensorInfo, file: Path) -> None:
    """Refuse a type whose values cannot be read.

    Raises:
        RequestError: it is one.
    """
    if not can_decode(tensor.dtype):
        raise RequestError("is of a type that cannot be read", file=file, tensor=tensor.name, found=tensor.dtype)


def chosen_type(tensor: TensorInfo, outtype: str) -> str:
    """The type that a tensor of a template, or of the model itself, is stored in."""
    if outtype in KEEPING:
        return tensor.dtype
    if len(tensor.shape) == 1:
        return "F32"
    if tensor.name.endswith(_KEPT_FULL):
        return tensor.dtype if tensor.dtype in PLAIN else "F32"
    kind = outtype.upper()
    if tensor.shape[-1] % TYPES[kind].block:
        kind = _SMALLER_BLOCKS.get(kind, "F16")
    return kind if tensor.shape[-1] % TYPES[kind].block == 0 else "F16"


def new_header(
    base: GgufFile, kinds: Mapping[str, str], outtype: str, residual: bool
) -> tuple[bytes, dict[str, TensorInfo]]:
    """The header of a model with the keys of `base`, and its tensors' places.

    Args:
        kinds: types that change.
        residual: the model is nothing without its adapter, and must say so.
    """
    pairs = {key: data for key, data in base.pairs.items() if not key.startswith(("quantize.imatrix.", "split."))}
    if outtype not in KEEPING:
        pairs["general.file_type"] = encode_pair("general.file_type", _FILE_TYPES[outtype], UINT32)
    if outtype not in KEEPING and any(kind not in PLAIN for kind in kinds.values()):
        pairs["general.quantization_version"] = encode_pair("general.quantization_version", 2, UINT32)
    if residual:
        name = f"{base.values.get('general.name', '')} {RESIDUAL_MARK}: needs its principal adapter".strip()
        pairs["general.name"] = encode_pair("general.name", name, STRING)
    tensors = ((t.name, kinds.get(t.name, t.dtype), t.shape) for t in base.tensors)
    header, places = lay_out(pairs.values(), tensors, base.alignment)
    return header, {place.name: place for place in places}


def shard_of(
    base: GgufFile, treatments: Mapping[str, Treatment], outtype: str, alone: str, residual: bool = False
) -> ShardPlan:
    """The result as steps along a GGUF; what has no treatment is copied.

    Raises:
        RequestError: a type cannot be written.
    """
    kinds = {name: treatment.kind for name, treatment in treatments.items()}
    for kind in sorted(set(kinds.values())):
        check_encodable(kind)
    header, places = new_header(base, kinds, outtype, residual)

    def changes(tensor: TensorInfo) -> Iterator[Encode]:
        if tensor.name in treatments:
            yield from encode_steps(places[tensor.name], tensor, treatments[tensor.name], base.alignment)

    steps: tuple[Step, ...] = gguf_steps(base, places, changes)
    return ShardPlan(base, header, steps[-1].stop, steps, alone)


def workspace(shard: ShardPlan, lane: int, widths: Widths) -> int:
    """Bytes that the lanes take beside the rows; more threads in one do not make it larger."""
    return widths.total((step.nbytes, lambda threads: lane) for step in changes_of([shard]))


def plan_gguf_model(
    checkpoint: Checkpoint,
    template: BaseGguf,
    origins: Mapping[str, Origin],
    dest: str | os.PathLike[str],
    options: GgufOptions,
    run: RunOptions,
    threads: int,
    residual: bool,
) -> GgufPlan:
    """Decide everything.

    Args:
        origins: of every tensor that is not the template's own.
        residual: the model is the residual of a split.

    Raises:
        RequestError: a type cannot be written, or DEST cannot be used.
    """
    path = file_dest(dest, checkpoint.root, template.file.path)
    treatments = {
        tensor.name: Treatment(chosen_type(tensor, options.outtype), origin=origins[tensor.name])
        for tensor in template.file.tensors
        if tensor.name in origins
    }
    shard = shard_of(template.file, treatments, options.outtype, path.name, residual)
    read = {shard.path.name: shard.path for shard in checkpoint.shards}
    read |= {"config.json": checkpoint.root / "config.json"} if checkpoint.config else {}
    if shard.source_name in read:
        raise RequestError("the template has the name of a file of the model", file=template.file.path)
    warnings: tuple[str, ...] = ()
    if residual and RESIDUAL_MARK not in path.name.upper():
        warnings = (f"{path.name} will be the residual of a split: a name that says {RESIDUAL_MARK} is safer",)
    return GgufPlan(
        to="gguf",
        dest=path.parent,
        alone=path.name,
        options=options,
        base=template,
        shard=shard,
        read=read,
        memory=plan_memory(flights([shard]), partial(workspace, shard, WORKSPACE), threads, run.max_memory),
        warnings=warnings,
    )
