"""safetensors headers and indexes from files that nobody vouches for; the reference implementation is the oracle."""

from __future__ import annotations

import json
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import small_model, write_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file

from pissa_convert.errors import FormatError, PissaError, RequestError
from pissa_convert.formats.checkpoint import open_checkpoint
from pissa_convert.formats.safetensors import lay_out, read_header


def file_of(folder: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_a_header_that_the_reference_wrote_is_read(tmp_path: Path) -> None:
    tensors = small_model() | {
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "bytes": torch.arange(7, dtype=torch.uint8),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    found = read_header(tmp_path / "x.safetensors")
    data = (tmp_path / "x.safetensors").read_bytes()
    assert found.metadata == {"format": "pt"}
    assert data.startswith(found.header)
    assert {tensor.name: tensor.shape for tensor in found.tensors} == {k: tuple(v.shape) for k, v in tensors.items()}
    for tensor in found.tensors:
        assert (
            data[tensor.begin : tensor.end] == tensors[tensor.name].contiguous().view(torch.uint8).numpy().tobytes()
            if tensors[tensor.name].dim()
            else True
        )


def test_a_header_that_we_lay_out_is_read_by_the_reference(tmp_path: Path) -> None:
    header, infos = lay_out([("b", "F32", (2, 3)), ("a", "BF16", (4,)), ('é"\n', "U8", (5,))], {"format": "pt"})
    (tmp_path / "x.safetensors").write_bytes(header + bytes(range(37)))
    assert [info.end - info.begin for info in infos] == [24, 8, 5]
    assert infos[0].begin == len(header)
    assert len(header) % 8 == 0
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded["b"].shape == (2, 3)
    assert loaded['é"\n'].tolist() == list(range(32, 37))


HOSTILE = {
    "empty file": b"",
    "short length field": b"\x01\x00",
    "length beyond the file": struct.pack("<Q", 1000) + b"{}",
    "length of 2^63": struct.pack("<Q", 2**63) + b"{}",
    "not JSON": struct.pack("<Q", 4) + b"nope",
    "not UTF-8": struct.pack("<Q", 4) + b'{"\xff"',
    "a list": struct.pack("<Q", 2) + b"[]",
    "a number too long to parse": struct.pack("<Q", 9000) + b'{"a":' + b"9" * 8994 + b"}",
    "NaN for a number": struct.pack("<Q", 9) + b'{"a":NaN}',
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_header(tmp_path: Path, name: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(HOSTILE[name])
    with pytest.raises(FormatError, match=r"x\.safetensors"):
        read_header(tmp_path / "x.safetensors")


WRONG: dict[str, tuple[Any, int, str]] = {
    "overlapping offsets": ({"a": entry(), "b": entry(offsets=(4, 12))}, 12, "overlaps"),
    "a hole between tensors": ({"a": entry(), "b": entry(offsets=(12, 20))}, 20, "hole"),
    "a hole before the data": ({"a": entry(offsets=(4, 12))}, 12, "hole"),
    "data cut short": ({"a": entry()}, 7, "cut short"),
    "bytes after the data": ({"a": entry()}, 9, "after the data"),
    "bytes and no tensor": ({}, 1, "after the data"),
    "a shape larger than its data": ({"a": entry(shape=(3,))}, 8, "wrong length"),
    "offsets that run backwards": ({"a": entry(offsets=(8, 0))}, 8, "wrong length"),
    "a shape that overflows 64 bits": ({"a": entry(shape=(2**62, 8), offsets=(0, 0))}, 0, "whole number of bytes"),
    "a shape whose product wraps to 0": (
        {"a": entry(shape=(2**32, 2**32), offsets=(0, 0))},
        0,
        "whole number of bytes",
    ),
    "a negative size": ({"a": entry(shape=(-1,))}, 8, "shape"),
    "a size that is true": ({"a": entry(shape=(True,))}, 8, "shape"),
    "a size with a fraction": ({"a": entry(shape=(2.0,))}, 8, "shape"),
    "an offset of 2^64": ({"a": entry(offsets=(0, 2**64))}, 8, "data_offsets"),
    "three offsets": ({"a": entry(offsets=(0, 8, 8))}, 8, "data_offsets"),
    "offsets that are strings": ({"a": entry(offsets=("0", "8"))}, 8, "data_offsets"),
    "an unknown dtype": ({"a": entry(dtype="F33")}, 8, "unknown dtype"),
    "an entry without offsets": ({"a": {"dtype": "F32", "shape": [2]}}, 8, "malformed"),
    "an entry that is a number": ({"a": 5}, 0, "malformed"),
    "metadata with a number": ({"__metadata__": {"a": 1}}, 0, "__metadata__"),
    "metadata that is a list": ({"__metadata__": []}, 0, "__metadata__"),
    "a key twice": (
        b'{"a":' + json.dumps(entry()).encode() + b',"a":' + json.dumps(entry()).encode() + b"}",
        8,
        "twice",
    ),
    "JSON 5,000 deep": (b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}", 0, "nested too deeply"),
    "JSON 200,000 deep": (b'{"a":' + b"[" * 200000 + b"]" * 200000 + b"}", 0, "nested too deeply"),
}
"""Header, bytes of data, and what the message says."""


@pytest.mark.parametrize("name", WRONG)
def test_hostile_headers_are_refused_by_name(tmp_path: Path, name: str) -> None:
    header, data, says = WRONG[name]
    with pytest.raises(FormatError, match=says) as caught:
        read_header(file_of(tmp_path, header, bytes(data)))
    assert "\n" not in str(caught.value)


def test_a_header_of_100_mb_of_brackets_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 100_000_000) + b'{"a":')
        for _ in range(100):
            file.write(b"[" * 999_999)
        file.truncate(100_000_008)
    with pytest.raises(FormatError, match=r"nested too deeply|not valid JSON"):
        read_header(path)


def test_a_header_beyond_the_formats_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(100_000_200)  # sparse
    with pytest.raises(FormatError, match="too large"):
        read_header(path)


@pytest.mark.parametrize("kind", ["folder", "fifo"])
def test_what_is_no_regular_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.safetensors"
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    with pytest.raises(FormatError):
        read_header(path)


@pytest.mark.parametrize(
    "name", ["../evil.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", "a\\b", "a\0b", 7, None]
)
def test_an_index_that_points_outside_is_refused(tmp_path: Path, name: Any) -> None:
    source = write_model(tmp_path / "in", small_model(), 2)
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = name
    path.write_text(json.dumps(index))
    with pytest.raises(FormatError, match="points outside"):
        open_checkpoint(source)


@pytest.mark.parametrize("victim", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_link_that_leaves_the_folder_is_refused(tmp_path: Path, victim: str) -> None:
    source = write_model(tmp_path / "in", small_model())
    (source / victim).rename(tmp_path / victim)
    (source / victim).symlink_to(tmp_path / victim)
    with pytest.raises(FormatError, match="link that leaves"):
        open_checkpoint(source)


def test_a_link_inside_the_folder_is_followed(tmp_path: Path) -> None:
    source = write_model(tmp_path / "in", small_model())
    (source / "vocab.json").symlink_to("tokenizer.json")
    assert "vocab.json" in open_checkpoint(source).auxiliary


def test_one_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    source = write_model(tmp_path / "in", small_model(), 2, index=False)
    first, second = sorted(source.glob("*.safetensors"))
    save_file(load_file(first) | load_file(second), second)
    with pytest.raises(FormatError, match="two shards"):
        open_checkpoint(source)


def test_a_gap_in_the_shards_numbers_is_a_missing_shard(tmp_path: Path) -> None:
    source = write_model(tmp_path / "in", small_model(), 3, index=False)
    (source / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FormatError, match=r"model-00002-of-00003\.safetensors: the shard is missing"):
        open_checkpoint(source)


VALID = save(
    {"a": torch.arange(6, dtype=torch.float32).reshape(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)}, {"k": "v"}
)


def judge(path: Path, data: bytes) -> None:
    """Either a one-line refusal, or a file that the reference implementation accepts too."""
    path.write_bytes(data)
    refusal = None
    try:
        found = read_header(path)
    except FormatError as error:
        refusal = str(error)
    if refusal is not None:
        assert "\n" not in refusal
        return
    with safe_open(path, "pt") as opened:
        assert set(opened.keys()) == {tensor.name for tensor in found.tensors}
    assert all(len(found.header) <= tensor.begin <= tensor.end <= len(data) for tensor in found.tensors)


MUTATIONS = st.lists(
    st.tuples(st.integers(0, len(VALID) - 1), st.sampled_from(["set", "insert", "delete"]), st.integers(0, 255)),
    min_size=1,
    max_size=6,
)


def mutate(mutations: list[tuple[int, str, int]]) -> bytes:
    data = bytearray(VALID)
    for at, what, value in mutations:
        at = min(at, len(data) - 1)
        if what == "set":
            data[at] = value
        elif what == "insert":
            data.insert(at, value)
        else:
            del data[at]
    return bytes(data)


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mutations=MUTATIONS)
def test_mutated_files_are_refused_or_right(tmp_path: Path, mutations: list[tuple[int, str, int]]) -> None:
    judge(tmp_path / "x.safetensors", mutate(mutations))


@pytest.mark.long
@settings(
    max_examples=100_000,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(mutations=MUTATIONS)
def test_a_hundred_thousand_mutated_files(tmp_path: Path, mutations: list[tuple[int, str, int]]) -> None:
    judge(tmp_path / "x.safetensors", mutate(mutations))


@pytest.fixture(scope="module")
def opened() -> Iterator[list[Path]]:
    """Every path that this process opens from now on, as the interpreter itself reports it."""
    paths: list[Path] = []
    watching = [True]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if watching[0] and event == "open" and isinstance(arguments[0], str):
            paths.append(Path(arguments[0]))

    sys.addaudithook(hook)  # it cannot be removed
    yield paths
    watching[0] = False


INDEXES: dict[str, Any] = {
    "weight_map": st.dictionaries(
        st.sampled_from(["model.norm.weight", "ghost", "model.embed_tokens.weight"]),
        st.one_of(
            st.text(max_size=20),
            st.integers(),
            st.none(),
            st.text(st.sampled_from("./\\\0ax"), max_size=8),
            st.sampled_from(["model.safetensors", "../secret.safetensors", "link.safetensors", "config.json", "."]),
        ),
    ),
    "extra": st.binary(max_size=3),
}


def judge_index(folder: Path, opened: list[Path], weight_map: dict[str, Any], extra: bytes) -> None:
    """A one-line refusal, without a look at anything outside the folder."""
    source = folder / "in"
    if not source.exists():
        write_model(source, small_model())
        (folder / "secret.safetensors").write_bytes(VALID)
        (source / "link.safetensors").symlink_to(folder / "secret.safetensors")
    (source / "model.safetensors.index.json").write_bytes(json.dumps({"weight_map": weight_map}).encode() + extra)
    opened.clear()
    with pytest.raises(PissaError) as caught:  # no such map covers the whole model
        open_checkpoint(source)
    assert isinstance(caught.value, FormatError | RequestError)
    assert "\n" not in str(caught.value)
    assert opened
    assert all(path.resolve().parent == source for path in opened)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(**INDEXES)
def test_any_index_is_refused_without_a_look_outside(
    tmp_path: Path, opened: list[Path], weight_map: dict[str, Any], extra: bytes
) -> None:
    judge_index(tmp_path, opened, weight_map, extra)


@pytest.mark.long
@settings(
    max_examples=100_000,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(**INDEXES)
def test_a_hundred_thousand_indexes(
    tmp_path: Path, opened: list[Path], weight_map: dict[str, Any], extra: bytes
) -> None:
    judge_index(tmp_path, opened, weight_map, extra)


def test_what_we_accept_beyond_doubt_the_reference_accepts(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(VALID)
    assert [tensor.name for tensor in read_header(tmp_path / "x.safetensors").tensors] == ["a", "b"]
    truncated = VALID[:-1]
    (tmp_path / "x.safetensors").write_bytes(truncated)
    with pytest.raises(SafetensorError):
        safe_open(tmp_path / "x.safetensors", "pt").__enter__()
    with pytest.raises(FormatError):
        read_header(tmp_path / "x.safetensors")
