"""Which device and dtype a model runs with, from what the user asked for and what this machine has."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from typing import Any

import torch

from vlmfx.errors import DeviceError

log = logging.getLogger("vlmfx")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ALIASES = {"float": "float32", "fp32": "float32", "half": "float16", "fp16": "float16", "bf16": "bfloat16"}


def resolve_device(device: str | torch.device | None = None) -> torch.device:
    """The device to run on; None or "auto" is CUDA where there is a GPU, MLU where torch_mlu finds one, else the CPU.

    Raises DeviceError for a device that is unknown or absent."""
    if device is None or (isinstance(device, str) and device == "auto"):
        return torch.device("cuda" if torch.cuda.is_available() else "mlu" if _has_mlu() else "cpu")
    kind = str(device).split(":")[0] if isinstance(device, (str, torch.device)) else None
    if kind not in ("cpu", "cuda", "mlu"):
        raise DeviceError(_unknown(device))
    count = _device_count(kind)
    try:
        found = torch.device(device) if count else None
    except (RuntimeError, ValueError):
        raise DeviceError(_unknown(device)) from None
    if found is None or not 0 <= (found.index or 0) < count:
        raise DeviceError(
            f'device "{_shown(device)}" is not present on this machine, which has {count} of kind {kind}; '
            'use device="cpu" or leave it out.'
        )
    return torch.device("cpu") if kind == "cpu" else found


def _unknown(device: object) -> str:
    return (
        f'device is "{_shown(device)}" but must be one of "auto", "cpu", "cuda", "cuda:N", "mlu"; choose one of these.'
    )


def _shown(device: object) -> str:
    return str(device).encode("unicode_escape").decode()[:80]


def _device_count(kind: str) -> int:
    if kind == "cuda":
        return torch.cuda.device_count() if torch.cuda.is_available() else 0
    return 1 if kind == "cpu" else int(torch.mlu.device_count()) if _has_mlu() else 0  # type: ignore[attr-defined]


def resolve_dtype(dtype: str | torch.dtype | None, device: torch.device, stored: torch.dtype) -> torch.dtype:
    """The compute dtype; None or "auto" is the checkpoint's own on CUDA, float32 on the CPU, and on an MLU, which has no bfloat16,
    float16 for a checkpoint of 16 bits.

    Raises DeviceError for a name that is not one of float32, float16, bfloat16 (or a short form of these), or that the device lacks."""
    if is_auto(dtype):
        if device.type == "mlu":
            return torch.float32 if stored == torch.float32 else torch.float16
        return stored if device.type == "cuda" else torch.float32
    name = ALIASES.get(dtype, dtype) if isinstance(dtype, str) else str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise DeviceError(f'dtype is "{dtype}" but must be "auto" or one of {", ".join(DTYPES)}; choose one of these.')
    if device.type == "mlu" and DTYPES[name] == torch.bfloat16:
        raise DeviceError('dtype is "bfloat16", which an MLU370 does not have; use "auto", "float16" or "float32".')
    return DTYPES[name]


def is_auto(dtype: str | torch.dtype | None) -> bool:
    """Whether the dtype is left to us."""
    return dtype is None or (isinstance(dtype, str) and dtype == "auto")


def accelerator(device: torch.device) -> Any:
    """torch.cuda, or torch.mlu, in which the same names mean the same; None for another device."""
    return getattr(torch, device.type) if device.type in ("cuda", "mlu") else None


def num_cores(device: torch.device) -> int | None:
    """The cores among which a launch is shared out: SMs of a GPU, cores of an MLU; None for another device."""
    api = accelerator(device)
    return None if api is None else int(api.get_device_properties(device).multi_processor_count)


def _has_mlu() -> bool:
    """Whether torch_mlu, whose import makes the device, is here and finds one; one that cannot be imported finds none."""
    if not hasattr(torch, "mlu") and importlib.util.find_spec("torch_mlu") is not None:
        try:
            importlib.import_module("torch_mlu")
        except (ImportError, OSError, RuntimeError) as error:  # for another torch, or without Cambricon's libraries
            log.warning(
                "torch_mlu is here but cannot be imported (%s); install the one for torch %s", error, torch.__version__
            )
    module: Any = getattr(torch, "mlu", None)
    return module is not None and bool(module.is_available())
