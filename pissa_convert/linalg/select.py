"""Which backend a request gets. torch, which takes seconds to import, is left alone where there is no GPU to use."""

from __future__ import annotations

from pathlib import Path

from pissa_convert.errors import RequestError
from pissa_convert.linalg import Backend
from pissa_convert.linalg.native import NativeBackend

_DRIVER = (Path("/dev/nvidiactl"), Path("/proc/driver/nvidia/version"), Path("/dev/dxg"))
"""What is there where NVIDIA's driver is: of Linux, of Linux in a container, of WSL."""


def has_driver() -> bool:
    """Whether this machine may have a CUDA device."""
    return any(path.exists() for path in _DRIVER)


def select_backend(device: str = "auto", threads: int | None = None, max_vram: int | None = None) -> Backend:
    """The backend for `--device`, `--threads` (of the CPU) and `--max-vram` (bytes on each GPU).

    Raises:
        RequestError: the device is not known or cannot be used.
    """
    kind, _, number = device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (number and (kind != "cuda" or not number.isdecimal())):
        raise RequestError("--device is unknown", expected="auto, cpu, cuda or cuda:N", found=device)
    if kind == "cuda" or (kind == "auto" and has_driver()):
        from pissa_convert.linalg.torch_device import find_devices

        devices = find_devices(int(number) if number else None, max_vram, is_needed=kind == "cuda")
        if devices:
            from pissa_convert.linalg.torch_backend import TorchBackend

            return TorchBackend(devices)
    if max_vram is not None:
        raise RequestError("--max-vram is of a CUDA device", found="the CPU", fix="leave it out, or give --device cuda")
    return NativeBackend(threads)
