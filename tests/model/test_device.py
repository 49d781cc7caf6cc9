"""What a server computes in, by its settings."""

import pytest
import torch

from p2pllm.config import ServerConfig
from p2pllm.errors import ConfigError
from p2pllm.model.device import Compute, choose_devices
from p2pllm.model.quantize import Scheme
from p2pllm.wire.messages import Numerics


def test_full_precision_says_so() -> None:
    compute = Compute.of(ServerConfig(dtype="float32", device="cpu"))
    assert (compute.dtype, compute.scheme) == (torch.float32, Scheme.NONE)
    assert compute.numerics == Numerics("float32", "none", "float32")


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_quantized_weights_are_computed_with_in_bfloat16(dtype: str) -> None:
    compute = Compute.of(ServerConfig(dtype=dtype, quantize="int4", device="cpu"))
    assert compute.dtype is torch.bfloat16
    assert compute.numerics == Numerics("bfloat16", "int4", "bfloat16")
    assert str(compute.numerics) == "bfloat16 int4"


def test_keys_and_values_in_8_bits_are_declared() -> None:
    compute = Compute.of(ServerConfig(dtype="float32", kv_bits=8, device="cpu"))
    assert compute.numerics == Numerics("float32", "none", "int8")
    assert str(compute.numerics) == "float32 kv int8"


def test_other_widths_of_keys_and_values_are_refused() -> None:
    with pytest.raises(ConfigError, match="no keys and values of 4 bits"):
        Compute.of(ServerConfig(kv_bits=4, device="cpu"))


def test_other_types_are_refused_with_quantized_weights() -> None:
    with pytest.raises(ConfigError, match="int8 are computed with in bfloat16, not in float32"):
        Compute.of(ServerConfig(dtype="float32", quantize="int8", device="cpu"))


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(ConfigError, match="no scheme 'int3'; one of none, int8, int4"):
        Compute.of(ServerConfig(quantize="int3", device="cpu"))


def test_several_devices_may_be_named_and_one_twice() -> None:
    compute = Compute.of(ServerConfig(device="cpu, cpu"))
    assert compute.devices == (torch.device("cpu"),) * 2
    assert compute.device == torch.device("cpu")


def test_all_devices_are_the_gpus_or_else_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert choose_devices("all") == (torch.device("cpu"),)


@pytest.mark.parametrize(
    ("text", "said"), [("cpu,", "not a list of devices"), ("cpu,tpu", "no device 'tpu' here")]
)
def test_what_is_no_device_is_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        choose_devices(text)
