"""Devices and compute types by name, with "auto" for what suits the machine."""

from dataclasses import dataclass

import torch

from p2pllm.config import ServerConfig
from p2pllm.errors import ConfigError
from p2pllm.model.quantize import Scheme
from p2pllm.wire.messages import Numerics
from p2pllm.wire.tensors import DType

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPE_NAMES = ("auto", *_DTYPES)


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto": the first GPU, else the CPU. Raises ConfigError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as exc:
        reason = str(exc).splitlines()[0]
        raise ConfigError(f"no device {name!r} here ({reason}); try --device cpu") from exc
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type of that name; "auto": bfloat16 where the device multiplies it fast, else float32."""
    if name != "auto":
        if name not in _DTYPES:
            raise ConfigError(f"no dtype {name!r}; one of {', '.join(DTYPE_NAMES)}")
        return _DTYPES[name]
    if device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.float32
    return torch.bfloat16


@dataclass(frozen=True, slots=True)
class Compute:
    """Where and in what a server computes; `scheme` is how it holds its blocks' matrices."""

    device: torch.device
    dtype: torch.dtype
    scheme: Scheme

    @classmethod
    def of(cls, settings: ServerConfig) -> "Compute":
        """What the settings say, "auto" decided. Raises ConfigError.

        Kernels for quantized weights take bfloat16 only.
        """
        try:
            scheme = Scheme(settings.quantize)
        except ValueError:
            known = ", ".join(Scheme)
            raise ConfigError(f"no scheme {settings.quantize!r}; one of {known}") from None
        device, name = choose_device(settings.device), settings.dtype
        if scheme is not Scheme.NONE and name == "auto":
            name = "bfloat16"
        dtype = choose_dtype(name, device)
        if scheme is not Scheme.NONE and dtype is not torch.bfloat16:
            raise ConfigError(
                f"weights in {scheme} are computed with in bfloat16, not in {name}: choose "
                "--dtype or --quantize"
            )
        return cls(device, dtype, scheme)

    @property
    def numerics(self) -> Numerics:
        """What such a server declares."""
        return numerics_of(self.dtype, self.scheme)


def numerics_of(dtype: torch.dtype, scheme: Scheme = Scheme.NONE) -> Numerics:
    """What a server that computes in `dtype`, with matrices held so, declares."""
    name = name_of(dtype)
    return Numerics(name, scheme.value, name)


def wire_dtype_of(dtype: torch.dtype) -> DType:
    """The code on the wire of a compute type."""
    return DType[name_of(dtype).upper()]


def name_of(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")
