"""PiSSA as file surgery: split a checkpoint into a residual model and its principal adapter, tensor by tensor.

    from pissa_convert import convert, plan, split, verify

`convert` does what the command `pissa-convert` does, `plan` says what it would do from the headers alone, `verify`
checks a result, and `split` works on one matrix. The names are imported when they are first used, so that importing
this package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "LoraPlan",
    "LoraReport",
    "MergePlan",
    "MergeReport",
    "PissaError",
    "Plan",
    "Report",
    "Split",
    "SplitReport",
    "Verification",
    "__version__",
    "convert",
    "plan",
    "split",
    "verify",
]

if TYPE_CHECKING:
    from pissa_convert.api import convert, plan, verify
    from pissa_convert.engine.verify import Verification
    from pissa_convert.errors import PissaError
    from pissa_convert.matrix import Split, split
    from pissa_convert.plans.lora_plan import LoraPlan
    from pissa_convert.plans.merge_plan import MergePlan
    from pissa_convert.plans.split_plan import Plan
    from pissa_convert.report import LoraReport, MergeReport, Report, SplitReport

_HOMES = {
    "LoraPlan": "plans.lora_plan",
    "LoraReport": "report",
    "MergePlan": "plans.merge_plan",
    "MergeReport": "report",
    "PissaError": "errors",
    "Plan": "plans.split_plan",
    "Report": "report",
    "SplitReport": "report",
    "Split": "matrix",
    "Verification": "engine.verify",
    "split": "matrix",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'api')}"), name)
