"""Which kernels of our own there are for a tensor: Triton's, on a CUDA device.

Triton comes with torch for CUDA on Linux. Where it is missing nothing is lost but time. It is
imported when the first tensor on a GPU asks, because that takes a second and a CPU never needs it.
"""

import functools
import importlib.util
from types import ModuleType

import torch
from torch import Tensor


def decode_kernels(x: Tensor) -> ModuleType | None:
    """`p2pllm.model.decode_triton`, if it can be used on `x`."""
    return _decode_triton() if x.is_cuda else None


def int4_kernels(codes: Tensor) -> ModuleType | None:
    """`p2pllm.model.int4_triton`, if it can be used on `codes`: on NVIDIA's, since Ampere."""
    if not codes.is_cuda or torch.version.cuda is None:
        return None
    return _int4_triton() if torch.cuda.get_device_capability(codes.device) >= (8, 0) else None


@functools.cache
def _int4_triton() -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    from p2pllm.model import int4_triton

    return int4_triton


@functools.cache
def _decode_triton() -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    from p2pllm.model import decode_triton

    return decode_triton
