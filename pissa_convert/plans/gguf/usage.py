"""The commands that use a GGUF, to be copied from the screen."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path


def usage(model: Path, adapters: Sequence[Path] = ()) -> str:
    """llama.cpp's commands and an Ollama Modelfile for a model with its adapters."""
    given = " ".join(["-m", shlex.quote(str(model)), *(f"--lora {shlex.quote(str(path))}" for path in adapters)])
    lines = [
        "with llama.cpp:",
        f"    llama-server {given}",
        f'    llama-cli {given} -p "Once upon a time"',
        "with Ollama, in a file called Modelfile, then `ollama create NAME -f Modelfile`:",
        f"    FROM {model}",
        *(f"    ADAPTER {path}" for path in adapters),
    ]
    return "\n".join(lines)
