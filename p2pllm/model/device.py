"""Devices and compute types by name, with "auto" for what suits the machine."""

from dataclasses import dataclass

import torch

from p2pllm.config import ServerConfig, device_names
from p2pllm.errors import ConfigError
from p2pllm.model.quantize import Scheme
from p2pllm.wire.messages import Numerics
from p2pllm.wire.tensors import DType

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KV_BITS = (16, 8)
DTYPE_NAMES = ("auto", *_DTYPES)

Device = torch.device
"""For who passes devices on, and does not compute."""


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


def all_device_names() -> tuple[str, ...]:
    """Of all GPUs, or else of the CPU. Nothing is allocated on them."""
    return tuple(f"cuda:{index}" for index in range(torch.cuda.device_count())) or ("cpu",)


def choose_devices(text: str) -> tuple[torch.device, ...]:
    """The devices of that name: one, several with commas between, or "all" GPUs (else the CPU).

    One that is named twice is there twice. Raises ConfigError.
    """
    names = all_device_names() if text == "all" else device_names(text)
    devices = [choose_device(name) for name in names]
    if len(devices) == 1:
        return (devices[0],)
    # With their numbers: "cuda" and "cuda:0" may be the same.
    return tuple(torch.empty(0, device=device).device for device in devices)


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
    """Where and in what a server computes; `scheme` is how it holds its blocks' matrices.

    `kv_bits` says how it holds keys and values: 16 for `dtype`, or 8.
    `device` is the first one, where hidden states come in; later parts of the span are on `others`.
    """

    device: torch.device
    dtype: torch.dtype
    scheme: Scheme
    others: tuple[torch.device, ...] = ()
    kv_bits: int = 16

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
        devices, name = choose_devices(settings.device), settings.dtype
        if scheme is not Scheme.NONE and name == "auto":
            name = "bfloat16"
        suiting = [choose_dtype(name, device) for device in devices]
        dtype = torch.float32 if torch.float32 in suiting else suiting[0]
        if scheme is not Scheme.NONE and dtype is not torch.bfloat16:
            raise ConfigError(
                f"weights in {scheme} are computed with in bfloat16, not in {name}: choose "
                "--dtype or --quantize"
            )
        if settings.kv_bits not in KV_BITS:
            raise ConfigError(f"no keys and values of {settings.kv_bits} bits; there are 16 and 8")
        return cls(devices[0], dtype, scheme, devices[1:], settings.kv_bits)

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """All of them, in the order of the blocks."""
        return self.device, *self.others

    @property
    def numerics(self) -> Numerics:
        """What such a server declares."""
        return numerics_of(self.dtype, self.scheme, self.kv_bits)


def numerics_of(dtype: torch.dtype, scheme: Scheme = Scheme.NONE, kv_bits: int = 16) -> Numerics:
    """What a server that computes in `dtype`, with matrices, keys and values held so, declares."""
    name = name_of(dtype)
    return Numerics(name, scheme.value, "int8" if kv_bits == 8 else name)


def wire_dtype_of(dtype: torch.dtype) -> DType:
    """The code on the wire of a compute type."""
    return DType[name_of(dtype).upper()]


def name_of(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")
