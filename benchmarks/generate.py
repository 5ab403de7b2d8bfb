"""Write a checkpoint of a named shape, with any number of layers, as fast as the disk takes it.

    python benchmarks/generate.py {Llama-3.2-1B,Llama-3.1-8B,Llama-3.1-70B,Llama-3.1-405B} FOLDER [--layers N] [--empty]

Names, shapes, shards of 5 GB, index and config.json are those of the Hub's checkpoint; transformers loads the result.
The values are made: every weight is a product of random factors whose 256 singular values fall as i^-0.4, as a
language model's leading ones do, over a bulk of noise that begins where they end. The noise is one vector of a prime
length, laid end to end: no two rows of a weight are alike, and no random number is drawn per value.

With --empty, only the headers are written: the values are holes that take no room, for what is planned alone.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from pissa_convert.formats.safetensors import lay_out

SHARD_BYTES = 5_000_000_000
_LEADING = 256
_PERIOD = 16_777_213  # the largest prime below 2^24
_PIECE = 16 << 20  # values made at a time


@dataclass(frozen=True)
class Shape:
    """A Llama: sizes as config.json has them."""

    hidden: int
    feed_forward: int
    layers: int
    heads: int
    tied: bool = False
    key_value_heads: int = 8
    vocabulary: int = 128_256

    def tensors(self, layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes in the order of the model."""
        narrow = self.hidden // self.heads * self.key_value_heads
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for layer in range(layers):
            at = f"model.layers.{layer}"
            yield f"{at}.self_attn.q_proj.weight", (self.hidden, self.hidden)
            yield f"{at}.self_attn.k_proj.weight", (narrow, self.hidden)
            yield f"{at}.self_attn.v_proj.weight", (narrow, self.hidden)
            yield f"{at}.self_attn.o_proj.weight", (self.hidden, self.hidden)
            yield f"{at}.mlp.gate_proj.weight", (self.feed_forward, self.hidden)
            yield f"{at}.mlp.up_proj.weight", (self.feed_forward, self.hidden)
            yield f"{at}.mlp.down_proj.weight", (self.hidden, self.feed_forward)
            yield f"{at}.input_layernorm.weight", (self.hidden,)
            yield f"{at}.post_attention_layernorm.weight", (self.hidden,)
        yield "model.norm.weight", (self.hidden,)
        if not self.tied:
            yield "lm_head.weight", (self.vocabulary, self.hidden)

    def config(self, layers: int) -> dict[str, object]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.feed_forward,
            "num_hidden_layers": layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "head_dim": self.hidden // self.heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-05,
            "rope_theta": 500_000.0,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": self.tied,
            "bos_token_id": 128_000,
            "eos_token_id": 128_001,
            "torch_dtype": "bfloat16",
        }


SHAPES = {
    "Llama-3.2-1B": Shape(2048, 8192, 16, 32, tied=True),
    "Llama-3.1-8B": Shape(4096, 14336, 32, 32),
    "Llama-3.1-70B": Shape(8192, 28672, 80, 64),
    "Llama-3.1-405B": Shape(16384, 53248, 126, 128),
}


class Noise:
    """Standard normal bf16 values without end, from one vector: values `at`, `at` + 1, … modulo its length."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self._vector = torch.randn(_PERIOD, generator=generator).bfloat16()

    def __call__(self, at: int, *shape: int) -> torch.Tensor:
        wanted = math.prod(shape)
        parts = []
        while wanted:
            at %= _PERIOD
            parts.append(self._vector[at : at + wanted])
            at += len(parts[-1])
            wanted -= len(parts[-1])
        return torch.cat(parts).reshape(shape)


def pieces(noise: Noise, number: int, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
    """The values of tensor `number`, some rows at a time, bfloat16."""
    if len(shape) == 1:
        yield torch.ones(shape, dtype=torch.bfloat16)
        return
    rows, cols = shape
    start = number * 7_368_787  # another stretch of the noise for every tensor
    leading = min(_LEADING, *shape)
    sigma = torch.arange(1, leading + 1, dtype=torch.float32) ** -0.4
    right = (noise(start, leading, cols) * (sigma / math.sqrt(cols)).bfloat16()[:, None]).contiguous()
    bulk = float(sigma[-1]) / (math.sqrt(rows) + math.sqrt(cols))
    scale = 0.02 / math.sqrt(float(sigma.square().sum()) / (rows * cols) + bulk**2)
    step = max(1, _PIECE // cols)
    for top in range(0, rows, step):
        count = min(step, rows - top)
        left = noise(start + leading * cols + top * leading, count, leading) * (scale / math.sqrt(rows))
        values = noise(start + 1_000_003 + top * cols, count, cols).mul_(scale * bulk)
        yield values.addmm_(left, right)


def generate(shape: Shape, folder: Path, layers: int, shard_bytes: int = SHARD_BYTES, *, empty: bool = False) -> Path:
    """Write the checkpoint into a new folder."""
    folder.mkdir(parents=True)
    noise = Noise()
    shards: list[list[tuple[int, str, tuple[int, ...]]]] = [[]]
    room = shard_bytes
    for number, (name, size) in enumerate(shape.tensors(layers)):
        nbytes = 2 * math.prod(size)
        if nbytes > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        room -= nbytes
        shards[-1].append((number, name, size))
    weight_map = {}
    for index, shard in enumerate(shards, start=1):
        shard.sort(key=lambda item: item[1])  # safetensors lays tensors out by name
        file = f"model-{index:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        header, _ = lay_out([(name, "BF16", size) for _, name, size in shard], {"format": "pt"})
        with (folder / file).open("wb") as out:
            out.write(header)
            for number, name, size in shard:
                weight_map[name] = file
                if empty:
                    out.truncate(out.seek(2 * math.prod(size), os.SEEK_CUR))
                    continue
                for piece in pieces(noise, number, size):
                    out.write(piece.view(torch.int16).numpy().data)
    if len(shards) > 1:
        total = sum(2 * math.prod(size) for _, size in shape.tensors(layers))
        index_text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
        (folder / "model.safetensors.index.json").write_text(index_text + "\n")
    (folder / "config.json").write_text(json.dumps(shape.config(layers), indent=2) + "\n")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="default: as many as the model has")
    parser.add_argument("--empty", action="store_true")
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    generate(shape, arguments.folder, arguments.layers or shape.layers, empty=arguments.empty)


if __name__ == "__main__":
    main()
