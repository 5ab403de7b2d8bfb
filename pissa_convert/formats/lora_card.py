"""`README.md` and `adapter_config.json` of an ordinary LoRA made from a trained PiSSA adapter."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

_CARD = """# LoRA for the original model

An ordinary LoRA adapter, made by pissa-convert {version} from a PiSSA adapter and what that was before training. It
goes on the **original** model, not on the residual that the training ran on; several such adapters can share one base.

    W + B·A = W_res + s′·B′·A′        lora_alpha = rank in every module: the scaling is 1 everywhere

| | |
|---|---|
| rank | {ranks} |
| modules | {modules} |
| dtype | {dtype} |
| ‖ΔW − B·A‖ / ‖ΔW‖ as stored | in `pissa_convert.json`, module by module |

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("the-original-model", dtype="auto")
model = PeftModel.from_pretrained(model, "this-folder")
```
"""

_QUANTISED = """
The training ran on a **4-bit base**, whose sum with the initial adapter is not quite the original: ‖W − (Q + s·B·A)‖ is
{error:.2%} of ‖W‖ over the adapted layers. The original with this LoRA differs from what was trained by that much,
which is not the LoRA's rounding. Who wants exactly what was trained merges the trained adapter into the 4-bit base
instead (`--to merged`), or serves it on that base read back (`--to merged --exact-base`).
"""

_ABOUT_THE_INIT = ("corda_config", "eva_config", "lora_ga_config", "loftq_config", "peft_version")


def lora_card(ranks: Mapping[str, int], dtype: str, version: str, base_error: float | None) -> bytes:
    """The card.

    Args:
        ranks: each module's.
        base_error: ‖W − (Q + s·B·A)‖/‖W‖ of the 4-bit base that the training ran on, if it did.
    """
    low, high = min(ranks.values()), max(ranks.values())
    text = _CARD.format(
        version=version, ranks=f"{low}" if low == high else f"{low} to {high}", modules=len(ranks), dtype=dtype
    )
    return (text if base_error is None else text + _QUANTISED.format(error=base_error)).encode()


def lora_config(trained: Mapping[str, Any], base: str | None, ranks: Mapping[str, int]) -> bytes:
    """The trained adapter's configuration, made to say that every module's alpha is its rank.

    What it says of targets, modules_to_save, biases and storage stays. Where ranks differ, each module is named in
    full in rank_pattern and alpha_pattern, as a regular expression that matches nothing else; `r` is the largest, which
    is what servers reserve room for.

    Args:
        trained: the configuration that the training saved.
        base: where the original model is, if that is known.
        ranks: of every module, by run-time name.
    """
    largest = max(ranks.values())
    pattern = {f"^{re.escape(module)}": rank for module, rank in ranks.items() if rank != largest}
    values = {key: value for key, value in trained.items() if key not in _ABOUT_THE_INIT}
    values |= {
        "alpha_pattern": pattern,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": largest,
        "r": largest,
        "rank_pattern": pattern,
        "revision": None,
        "use_rslora": False,
    }
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()
