"""What a server computes in, by its settings."""

import pytest
import torch

from p2pllm.config import ServerConfig
from p2pllm.errors import ConfigError
from p2pllm.model.device import Compute
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


def test_other_types_are_refused_with_quantized_weights() -> None:
    with pytest.raises(ConfigError, match="int8 are computed with in bfloat16, not in float32"):
        Compute.of(ServerConfig(dtype="float32", quantize="int8", device="cpu"))


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(ConfigError, match="no scheme 'int3'; one of none, int8, int4"):
        Compute.of(ServerConfig(quantize="int3", device="cpu"))
