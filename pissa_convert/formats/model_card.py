"""`README.md` of a residual model: ours comes first, the source's own card is kept below it."""

from __future__ import annotations

from pissa_convert.options import SplitOptions

CARD_NAME = "README.md"

ORIGINAL_FOLLOWS = "*The card of the original model follows.*"
"""The line between our card and the source's."""

RESIDUAL_TITLE = "# Residual model with its PiSSA adapter"

_CARD = (
    RESIDUAL_TITLE
    + """

**This folder is not a complete model.** Its weights are the *residual* of the original ones: the {rank} largest
singular directions of each targeted linear layer were moved into the adapter in `pissa_init/`. The two belong together;
without its adapter the residual answers with noise, and the adapter does not fit the original model.

    W = W_res + s·B·A        s = {scaling}

| | |
|---|---|
| rank | {rank} |
| lora_alpha | {alpha} |
| rslora | {rslora} |
| layers split | {layers} |
| adapter dtype | {adapter_dtype} |
| made with | pissa-convert {version}, seed {seed} |

Train it with PEFT; only A and B learn:

```python
from peft import PeftModel
from transformers import {auto_class}

model = {auto_class}.from_pretrained("this-folder", dtype="auto")
model = PeftModel.from_pretrained(model, "this-folder", subfolder="pissa_init", is_trainable=True)
```

Keep `pissa_init/` as it is: what training has changed can only be told by comparing with it.
`pissa_convert.json` holds the digests of every file, and for every layer its singular values, the share of its energy
that the adapter took, and the rounding error of storing it.
"""
)


def split_front_matter(card: str) -> tuple[str, str]:
    """A card's YAML block with its `---` lines ("" without one), and the rest."""
    lines = card.splitlines(keepends=True)
    if lines and lines[0].strip() == "---":
        for number, line in enumerate(lines[1:], start=1):
            if line.strip() == "---":
                return "".join(lines[: number + 1]), "".join(lines[number + 1 :])
    return "", card


def residual_card(
    original: bytes | None, options: SplitOptions, layers: int, architectures: list[str], version: str
) -> bytes:
    """The card of a `--to pissa` result.

    Args:
        original: the source's README.md, or None.
        layers: number of weights that were split.
        architectures: `architectures` of config.json.
    """
    is_causal = any(name.endswith("ForCausalLM") for name in architectures)
    ours = _CARD.format(
        rank=options.rank,
        alpha=f"{options.alpha:g}",
        scaling=f"{options.scaling:g}",
        rslora="yes" if options.rslora else "no",
        layers=layers,
        adapter_dtype=options.adapter_dtype,
        seed=options.seed,
        version=version,
        auto_class="AutoModelForCausalLM" if is_causal else "AutoModel",
    )
    return with_original(ours, original)


def with_original(ours: str, original: bytes | None) -> bytes:
    """Our card, and below it the source's, whose YAML front matter stays on top, where the Hub looks for it."""
    if original is None:
        return ours.encode()
    front, body = split_front_matter(original.decode("utf-8", "surrogateescape"))
    card = f"{front}\n{ours}\n---\n\n{ORIGINAL_FOLLOWS}\n\n{body.lstrip()}"
    return card.encode("utf-8", "surrogateescape")
