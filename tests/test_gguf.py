"""GGUF headers: what others write is read, what we lay out others read, and hostile ones end in one line."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import llama_cpp
import llamacpp  # noqa: F401  (llama.cpp says nothing on stderr)
import numpy as np
import pytest
import torch
from adapters import tensors_of, write
from gguf import GGUFReader, GGUFWriter
from gguf_models import add, finish, packaged_smollm2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pissa_convert import plan
from pissa_convert.errors import FormatError, PissaError, RequestError
from pissa_convert.formats import gguf
from pissa_convert.formats.gguf import FLOAT32, STRING, UINT32, read_gguf
from pissa_convert.formats.gguf_layout import encode_pair, lay_out
from pissa_convert.plans.gguf.model import open_base

V = "model.layers.0.self_attn.v_proj"


def valid(path: Path) -> Path:
    """A llama of one layer, with a key of every type."""
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_head_count(4)
    writer.add_head_count_kv([2])
    writer.add_token_list(["a", "bc", "ü"])
    writer.add_token_scores([0.0, 1.5, -2.0])
    writer.add_bool("a.bool", True)
    writer.add_int64("a.long", -5)
    writer.add_float64("a.double", 0.5)
    writer.add_uint8("a.byte", 200)
    add(writer, "blk.0.attn_v.weight", np.arange(128).reshape(4, 32), "Q8_0")
    add(writer, "blk.0.attn_k.weight", np.arange(96).reshape(3, 32), "F16")
    add(writer, "output_norm.weight", np.ones(3), "F32")
    return finish(writer)


def test_what_the_gguf_package_writes_is_read(tmp_path: Path) -> None:
    file = read_gguf(valid(tmp_path / "x.gguf"))
    reader = GGUFReader(tmp_path / "x.gguf")
    assert [(t.name, t.dtype, t.shape, t.begin, t.nbytes) for t in file.tensors] == [
        (t.name, t.tensor_type.name, tuple(int(n) for n in reversed(t.shape)), t.data_offset, t.n_bytes)
        for t in reader.tensors
    ]
    assert file.values["llama.attention.head_count_kv"] == (2,)
    assert file.values["tokenizer.ggml.scores"] == (0.0, 1.5, -2.0)
    assert (file.values["a.bool"], file.values["a.long"], file.values["a.byte"]) == (True, -5, 200)
    assert file.values["tokenizer.ggml.tokens"] is None
    assert b"".join(file.pairs.values()) in file.header


def test_a_real_models_header_is_read(tmp_path: Path) -> None:
    file = read_gguf(packaged_smollm2())
    assert len(file.tensors) == 272
    assert file.stop(file.tensors[-1]) == file.size


def test_what_we_lay_out_is_what_the_gguf_package_reads(tmp_path: Path) -> None:
    pairs = [encode_pair("general.architecture", "llama", STRING), encode_pair("n", 7, UINT32)]
    wanted = [("a", "F32", (2, 3)), ("b", "Q4_0", (5, 64)), ("c", "F16", (2, 3, 4))]
    header, places = lay_out([*pairs, encode_pair("x", 0.5, FLOAT32)], wanted)
    (tmp_path / "x.gguf").write_bytes(header + bytes(places[-1].end + 16 - len(header)))
    reader = GGUFReader(tmp_path / "x.gguf")
    assert [(t.name, t.data_offset, t.n_bytes) for t in reader.tensors] == [(p.name, p.begin, p.nbytes) for p in places]
    assert (reader.get_field("n").contents(), reader.get_field("x").contents()) == (7, 0.5)


# --- hostile ----------------------------------------------------------------------------------------------------------


def text(data: str | bytes) -> bytes:
    raw = data.encode() if isinstance(data, str) else data
    return struct.pack("<Q", len(raw)) + raw


def head(tensors: int = 1, pairs: int = 0, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, pairs)


def entry(name: str | bytes = "t", dims: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def whole(header: bytes, data: int = 128) -> bytes:
    return header + bytes(-len(header) % 32) + bytes(data)


HUGE = 1 << 63
ARRAY = struct.pack("<I", 9)

HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "cut short"),
    "another format": (whole(head(magic=b"PK\3\4") + entry()), "is not GGUF"),
    "version 1": (whole(head(version=1) + entry()), "version"),
    "big-endian": (whole(head(version=3 << 24) + entry()), "big-endian"),
    "no tensors": (whole(head(tensors=0)), "no tensors"),
    "more tensors than there are bytes": (whole(head(tensors=HUGE) + entry()), ""),
    "more keys than there are bytes": (whole(head(pairs=(1 << 64) - 1) + entry()), ""),
    "a key that is longer than the file": (whole(head(pairs=1) + struct.pack("<Q", HUGE)), "a key is too long"),
    "a value that is longer than the file": (
        whole(head(pairs=1) + text("k") + struct.pack("<IQ", 8, (1 << 64) - 1)),
        "too long",
    ),
    "a value of no type": (whole(head(pairs=1) + text("k") + struct.pack("<I", 99)), "unknown type"),
    "an array of arrays": (whole(head(pairs=1) + text("k") + ARRAY + struct.pack("<IQ", 9, 1)), "unknown type"),
    "an array of 2^63 numbers": (whole(head(pairs=1) + text("k") + ARRAY + struct.pack("<IQ", 12, HUGE)), "too long"),
    "an array of 2^63 strings": (whole(head(pairs=1) + text("k") + ARRAY + struct.pack("<IQ", 8, HUGE)), ""),
    "a key that is not UTF-8": (whole(head(pairs=1) + text(b"\xff") + struct.pack("<II", 4, 1)), "UTF-8"),
    "a key with a zero byte": (whole(head(pairs=1) + text("k\0") + struct.pack("<II", 4, 1)), "zero byte"),
    "a name with a zero byte": (whole(head() + entry("t\0")), "zero byte"),
    "a key twice": (whole(head(pairs=2) + 2 * (text("k") + struct.pack("<II", 4, 1)) + entry()), "twice"),
    "an alignment of 0": (whole(head(pairs=1) + encode_pair("general.alignment", 0, UINT32) + entry()), "alignment"),
    "an alignment of 3": (whole(head(pairs=1) + encode_pair("general.alignment", 3, UINT32) + entry()), "alignment"),
    "an alignment that is text": (
        whole(head(pairs=1) + encode_pair("general.alignment", "32", STRING) + entry()),
        "alignment",
    ),
    "a name of 64 bytes": (whole(head() + entry("t" * 64)), "name is too long"),
    "a tensor twice": (whole(head(tensors=2) + entry() + entry(offset=128), 256), "twice"),
    "5 dimensions": (whole(head() + entry(dims=(1, 1, 1, 1, 32))), "dimensions"),
    "no dimensions": (whole(head() + entry(dims=())), "dimensions"),
    "a dimension of 0": (whole(head() + entry(dims=(32, 0))), "malformed shape"),
    "dimensions that overflow": (whole(head() + entry(dims=(1 << 32, 1 << 32))), "malformed shape"),
    "dimensions that overflow to 32": (whole(head() + entry(dims=((1 << 63) + 16, 2))), "malformed shape"),
    "a type that does not exist": (whole(head() + entry(kind=4)), "type that is not known"),
    "half a block": (whole(head() + entry(dims=(48,), kind=2)), "malformed shape"),
    "an offset beyond the end": (whole(head() + entry(offset=1 << 40)), "not where it should be"),
    "an offset that overflows": (whole(head() + entry(offset=(1 << 64) - 32)), "not where it should be"),
    "tensors that overlap": (whole(head(tensors=2) + entry("a") + entry("b"), 256), "not where it should be"),
    "data cut short": (whole(head() + entry(), 127), "cut short"),
    "no data": (head() + entry(), "cut short"),
    "bytes after the data": (whole(head() + entry(), 129), "bytes after the data"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_are_refused_in_one_line(name: str, tmp_path: Path) -> None:
    data, said = HOSTILE[name]
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(FormatError) as caught:
        read_gguf(tmp_path / "x.gguf")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "x.gguf"))


def test_a_header_that_never_ends_is_not_read_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "MAX_HEADER", 1 << 23)
    with open(tmp_path / "x.gguf", "wb") as file:
        file.write(head(pairs=1) + text("k") + struct.pack("<IQ", 8, (1 << 23) - 1))
        file.truncate(1 << 30)
    with pytest.raises(FormatError, match="too large"):
        read_gguf(tmp_path / "x.gguf")


@pytest.mark.parametrize("kind", ["folder", "pipe", "missing"])
def test_what_is_no_regular_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(FormatError):
        read_gguf(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda writer: writer.add_type("adapter"), "is no model"),
        (lambda writer: writer.add_uint16("split.count", 3), "one of several parts of a model.*found 3"),
        (lambda writer: writer.add_block_count(7), "fewer tensors than layers"),
        (lambda writer: writer.add_string("llama.block_count", "x"), "block_count is malformed"),
    ],
)
def test_what_is_no_base_model(change: Callable[[GGUFWriter], None], said: str, tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    change(writer)
    add(writer, "t", np.ones((2, 32)), "F32")
    with pytest.raises(RequestError, match=said):
        open_base(finish(writer), "--base-gguf")


# --- fuzz: refused, or read as llama.cpp's own library reads it -----------------------------------------------------


class _Parameters(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


def tensors_by_ggml(path: Path) -> list[tuple[str, int]] | None:
    """Names and offsets as ggml reads them; None where it refuses the file."""
    library = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
    library.gguf_init_from_file.restype = ctypes.c_void_p
    library.gguf_init_from_file.argtypes = [ctypes.c_char_p, _Parameters]
    for name, result, arguments in (
        ("gguf_get_n_tensors", ctypes.c_int64, []),
        ("gguf_get_data_offset", ctypes.c_size_t, []),
        ("gguf_get_tensor_offset", ctypes.c_size_t, [ctypes.c_int64]),
        ("gguf_get_tensor_name", ctypes.c_char_p, [ctypes.c_int64]),
        ("gguf_free", None, []),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, [ctypes.c_void_p, *arguments]
    context = library.gguf_init_from_file(str(path).encode(), _Parameters(True, None))
    if not context:
        return None
    begin = library.gguf_get_data_offset(context)
    found = [
        (library.gguf_get_tensor_name(context, i).decode(), begin + library.gguf_get_tensor_offset(context, i))
        for i in range(library.gguf_get_n_tensors(context))
    ]
    library.gguf_free(context)
    return found


def refusal_of(call: Callable[[], Any]) -> tuple[str, Any]:
    """The one error family's message, or what comes out."""
    try:
        return "", call()
    except PissaError as error:
        return str(error), None


def judge(folder: Path, original: bytes, mutations: list[tuple[int, str, int]]) -> None:
    """One line, or what ggml reads too; and no plan that such a file is the base of fails in another way."""
    data = bytearray(original)
    for at, what, value in mutations:
        at = min(at, len(data) - 1)
        if not data:
            break
        if what == "set":
            data[at] = value
        elif what == "insert":
            data.insert(at, value)
        elif what == "cut":
            del data[at + 1 :]
        else:
            del data[at]
    path = folder / "x.gguf"
    path.write_bytes(data)
    refusal, found = refusal_of(lambda: read_gguf(path))
    if found is None:
        assert "\n" not in refusal
        return
    assert [(tensor.name, tensor.begin) for tensor in found.tensors] == tensors_by_ggml(path)
    assert all(len(found.header) <= tensor.begin < tensor.end <= len(data) for tensor in found.tensors)
    lora = folder / "lora"
    if not lora.exists():
        write(lora, tensors_of({V: (torch.ones(2, 32), torch.ones(4, 2))}))
    for source, dest, to, options in (
        (lora, "a.gguf", "gguf", {"base_gguf": path}),
        (path, "b.gguf", "merged", {"adapter": lora}),
        (path, "c", "pissa", {"rank": 1}),
    ):
        assert "\n" not in refusal_of(partial(plan, source, folder / dest, to, **options))[0]


MUTATIONS = st.lists(
    st.tuples(st.integers(0, 1400), st.sampled_from(["set", "set", "insert", "delete", "cut"]), st.integers(0, 255)),
    min_size=1,
    max_size=5,
)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return valid(tmp_path_factory.mktemp("gguf") / "x.gguf").read_bytes()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mutations=MUTATIONS)
def test_mutated_files_are_refused_or_right(
    tmp_path: Path, original: bytes, mutations: list[tuple[int, str, int]]
) -> None:
    judge(tmp_path, original, mutations)


@pytest.mark.long
@settings(
    max_examples=100_000,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(mutations=MUTATIONS)
def test_a_hundred_thousand_mutated_files(
    tmp_path: Path, original: bytes, mutations: list[tuple[int, str, int]]
) -> None:
    judge(tmp_path, original, mutations)


def test_the_unmutated_file_passes_all_of_it(tmp_path: Path, original: bytes) -> None:
    judge(tmp_path, original, [])
    wanted: Any = tensors_by_ggml(tmp_path / "x.gguf")
    assert [name for name, _ in wanted] == ["blk.0.attn_v.weight", "blk.0.attn_k.weight", "output_norm.weight"]
