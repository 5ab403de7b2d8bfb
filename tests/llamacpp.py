"""llama.cpp itself, through its C interface: logits of a GGUF, with any number of adapters."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

Logits = np.ndarray[Any, np.dtype[np.float64]]


@llama_cpp.llama_log_callback
def _silent(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    pass


llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
llama_cpp.llama_backend_init()


def logits(model: Path, tokens: Sequence[int], adapters: Sequence[Path] = (), scale: float = 1.0) -> Logits:
    """Next-token logits (tokens × vocabulary) of one sequence.

    Raises:
        ValueError: llama.cpp does not load the model or an adapter.
    """
    settings = llama_cpp.llama_model_default_params()
    settings.use_mmap = True
    settings.use_extra_bufts = False
    settings.n_gpu_layers = 0
    loaded = llama_cpp.llama_model_load_from_file(str(model).encode(), settings)
    if not loaded:
        raise ValueError(f"llama.cpp does not load {model}")
    try:
        return _run(loaded, tokens, adapters, scale)
    finally:
        llama_cpp.llama_model_free(loaded)


def _run(model: Any, tokens: Sequence[int], adapters: Sequence[Path], scale: float) -> Logits:
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = max(64, len(tokens))
    settings.n_threads = settings.n_threads_batch = 2
    settings.type_k = settings.type_v = 0  # F32
    settings.flash_attn_type = 0
    context = llama_cpp.llama_init_from_model(model, settings)
    try:
        loaded = []
        for path in adapters:
            adapter = llama_cpp.llama_adapter_lora_init(model, str(path).encode())
            if not adapter:
                raise ValueError(f"llama.cpp does not load {path}")
            loaded.append(adapter)
        if loaded:
            scales = (ctypes.c_float * len(loaded))(*[scale] * len(loaded))
            array = (llama_cpp.llama_adapter_lora_p_ctypes * len(loaded))(*loaded)
            assert llama_cpp.llama_set_adapters_lora(context, array, len(loaded), scales) == 0
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        for place, token in enumerate(tokens):
            batch.token[place] = token
            batch.pos[place] = place
            batch.n_seq_id[place] = 1
            batch.seq_id[place][0] = 0
            batch.logits[place] = 1
        batch.n_tokens = len(tokens)
        assert llama_cpp.llama_decode(context, batch) == 0
        size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        rows = [np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, i), (size,)) for i in range(len(tokens))]
        found = np.array(rows, np.float64)
        llama_cpp.llama_batch_free(batch)
        return found
    finally:
        llama_cpp.llama_free(context)


def quantize(source: Path, dest: Path, kind: int) -> None:
    """llama-quantize, to one of its file types (7 is Q8_0, 15 is Q4_K_M)."""
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = kind
    settings.nthread = 2
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(dest).encode(), ctypes.byref(settings)) == 0


def log_softmax(values: Logits) -> Logits:
    shifted = values - values.max(-1, keepdims=True)
    result: Logits = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def divergence(reference: Logits, other: Logits) -> float:
    """Mean KL of the next-token distributions, in nats."""
    first, second = log_softmax(reference), log_softmax(other)
    return float((np.exp(first) * (first - second)).sum(-1).mean())


def top1(reference: Logits, other: Logits) -> float:
    """Share of places where both would say the same token."""
    return float((reference.argmax(-1) == other.argmax(-1)).mean())


def perplexity(values: Logits, tokens: Sequence[int]) -> float:
    """Of the tokens that follow."""
    return float(np.exp(-log_softmax(values)[np.arange(len(tokens) - 1), list(tokens[1:])].mean()))
