"""`README.md` of a quantised base with its adapter: ours comes first, the source's own card is kept below it."""

from __future__ import annotations

from pissa_convert.formats.model_card import with_original
from pissa_convert.options import QuantOptions

QUANTISED_TITLE = "# 4-bit base with its QPiSSA adapter"

_CARD = (
    QUANTISED_TITLE
    + """

**This folder is not a complete model.** Its linear layers hold the 4-bit *rest* of the original weights: the largest
singular directions of each targeted layer are in the adapter in `pissa_init/`, in full precision. The two belong
together; the adapter fits neither the original model nor another quantisation of it.

    W ≈ Q + s·B·A        s = {scaling}, Q in {quant}{double}

| | |
|---|---|
| rank | {rank} |
| lora_alpha | {alpha} |
| rslora | {rslora} |
| layers with an adapter | {layers} |
| adapter dtype | {adapter_dtype} |
| quantisations of each weight, at most | {iterations} |
| made with | pissa-convert {version}, seed {seed} |

Train it with PEFT and bitsandbytes; only A and B learn:

```python
from peft import PeftModel
from transformers import {auto_class}

model = {auto_class}.from_pretrained("this-folder")
model = PeftModel.from_pretrained(model, "this-folder", subfolder="pissa_init", is_trainable=True)
```

Keep `pissa_init/` as it is: what training has changed can only be told by comparing with it.
`pissa_convert.json` holds the digests of every file and for every layer ‖W − (Q + s·B·A)‖/‖W‖, and how much smaller
that difference is than that of quantising W itself.
"""
)


def quantised_card(
    original: bytes | None, options: QuantOptions, layers: int, architectures: list[str], version: str
) -> bytes:
    """The card of a `--to qpissa` result.

    Args:
        original: the source's README.md, or None.
        layers: number of weights with an adapter.
        architectures: `architectures` of config.json.
    """
    split = options.split
    is_causal = any(name.endswith("ForCausalLM") for name in architectures)
    ours = _CARD.format(
        rank=split.rank,
        alpha=f"{split.alpha:g}",
        scaling=f"{split.scaling:g}",
        rslora="yes" if split.rslora else "no",
        layers=layers,
        adapter_dtype=split.adapter_dtype,
        quant=options.quant.upper(),
        double=" with double quantisation" if options.double_quant else "",
        iterations=options.iterations,
        seed=split.seed,
        version=version,
        auto_class="AutoModelForCausalLM" if is_causal else "AutoModel",
    )
    return with_original(ours, original)
