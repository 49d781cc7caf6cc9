"""Tensors between CPU and GPU without waiting more than once.

A copy from or to ordinary memory makes the caller wait until the device has come to it. From
pinned memory it is queued like any other work; torch keeps such memory for the next time, and
until the copy is done.
"""

import torch
from torch import Tensor


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device. To a GPU the copy is queued, and nothing waits for it."""
    if device.type == "cuda" and not tensor.is_cuda:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def for_device(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor on the CPU, for what is to be sent to a device."""
    return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")


def on_cpu(tensor: Tensor) -> Tensor:
    """The tensor in the computer's memory; waits for the device to finish all that is queued."""
    if not tensor.is_cuda:
        return tensor
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return copy
