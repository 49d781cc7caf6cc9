"""GgufFile against the writer of the `gguf` library, and against damaged files."""

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from p2pllm.errors import CheckpointError
from p2pllm.model.gguf import SUPPORTED, GgufFile

ROWS, COLUMNS = 3, 512


def write(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("a.number", 7)
    writer.add_float32("a.float", 0.5)
    writer.add_bool("a.flag", True)
    writer.add_string("a.text", "käse")
    writer.add_array("some.texts", ["a", "", "ß"])
    writer.add_array("some.numbers", [1, -2, 3])
    writer.add_tensor("first.weight", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("second.weight", np.ones(5, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "small.gguf")


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("damaged") / "small.gguf")


def use(path: Path) -> None:
    """Do all that can be done with a file."""
    file = GgufFile(path)
    for key in file:
        file.scalar(key)
        file.raw(key)
        for read in (file.strings, file.numbers):
            try:
                read(key)
            except CheckpointError:
                pass  # of the other type
    for name in file.tensors:
        file.read(name)
        file.codes(name)


def test_scalars_and_arrays_are_read(path: Path) -> None:
    file = GgufFile(path)
    assert file.scalar("a.number") == 7
    assert file.scalar("a.float") == 0.5
    assert file.scalar("a.flag") is True
    assert file.scalar("a.text") == "käse"
    assert file.strings("some.texts") == ["a", "", "ß"]
    assert file.numbers("some.numbers") == [1, -2, 3]


def test_what_is_absent_is_none_or_empty(path: Path) -> None:
    file = GgufFile(path)
    assert "absent" not in file
    assert file.scalar("absent") is None
    assert file.strings("absent") == []
    assert file.numbers("absent") == []


def test_an_array_of_the_wrong_type_is_refused(path: Path) -> None:
    file = GgufFile(path)
    with pytest.raises(CheckpointError, match=r"small\.gguf: some\.numbers is of an unexpected"):
        file.strings("some.numbers")
    with pytest.raises(CheckpointError, match=r"a\.number"):
        file.numbers("a.number")


def test_tensors_have_their_outermost_dimension_first(path: Path) -> None:
    file = GgufFile(path)
    np.testing.assert_array_equal(
        file.read("first.weight"), np.arange(6, dtype=np.float32).reshape(2, 3)
    )
    np.testing.assert_array_equal(file.read("second.weight"), np.ones(5, dtype=np.float32))


@pytest.mark.parametrize("kind", sorted(SUPPORTED), ids=lambda kind: str(kind.name))
def test_every_supported_type_is_dequantized(kind: GGMLQuantizationType, tmp_path: Path) -> None:
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(
        0, 255, (ROWS, COLUMNS // block * block_bytes), dtype=np.uint8
    )
    path = write_tensor(tmp_path / "x.gguf", raw, kind)
    with np.errstate(all="ignore"):  # random bytes make infinite scales, too
        values = GgufFile(path).read("x")
        expected = gguf.dequantize(raw, kind)
    assert values.shape == (ROWS, COLUMNS)
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, expected)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q8_0"])
def test_groups_with_one_scale_are_given_as_they_are(name: str, tmp_path: Path) -> None:
    kind = GGMLQuantizationType[name]
    weights = np.random.default_rng(0).normal(size=(ROWS, COLUMNS)).astype(np.float32)
    raw = gguf.quantize(weights, kind)
    file = GgufFile(write_tensor(tmp_path / "x.gguf", raw, kind))
    codes = file.codes("x")
    assert codes is not None
    assert codes.bits == (8 if name == "Q8_0" else 4)
    assert codes.codes.dtype == np.int8
    assert codes.codes.shape == (ROWS, COLUMNS)
    groups = codes.codes.reshape(ROWS, -1, 32).astype(np.float32)
    values = groups * codes.scales[..., None] + codes.centres[..., None]
    expected = file.read("x")
    np.testing.assert_allclose(values.reshape(expected.shape), expected, rtol=0, atol=1e-6)


def test_codes_of_other_types_are_not_given(tmp_path: Path) -> None:
    raw = np.zeros((ROWS, 210), dtype=np.uint8)
    file = GgufFile(write_tensor(tmp_path / "x.gguf", raw, GGMLQuantizationType.Q6_K))
    assert file.codes("x") is None


def write_tensor(
    path: Path, raw: "np.ndarray[Any, np.dtype[Any]]", kind: GGMLQuantizationType
) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("x", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_an_unsupported_type_is_named_with_the_tensor(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    kind = GGMLQuantizationType.Q2_K
    writer.add_tensor("x", np.zeros((1, 84), dtype=np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"x\.gguf: tensor x is Q2_K"):
        GgufFile(tmp_path / "x.gguf").read("x")


def test_a_missing_tensor_is_named(path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"small\.gguf: tensor third is missing"):
        GgufFile(path).read("third")


def test_a_file_cut_anywhere_gives_checkpoint_error_only(damaged: Path) -> None:
    whole = write(damaged).read_bytes()
    for length in range(0, len(whole) - 32, 3):  # the end is padding, up to the alignment
        damaged.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"small\.gguf"):
            GgufFile(damaged)


def test_a_truncated_tensor_is_named(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - 32])
    with pytest.raises(CheckpointError, match=r"truncated: tensor second\.weight ends at byte"):
        GgufFile(path)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_bytes_give_checkpoint_error_or_a_readable_file(
    damaged: Path, data: st.DataObject
) -> None:
    whole = bytearray(write(damaged).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(whole) - 9))
        value: Any = data.draw(
            st.sampled_from([0, 1, 8, 9, 2**31, 2**32 - 1, 2**63, 2**64 - 1])
            | st.integers(0, 2**64 - 1)
        )
        width = data.draw(st.sampled_from(["<B", "<I", "<Q"]))
        struct.pack_into(width, whole, at, value % 2 ** (8 * struct.calcsize(width)))
    damaged.write_bytes(whole)
    try:
        with np.errstate(all="ignore"):
            use(damaged)
    except CheckpointError:
        pass  # anything else fails the test


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    with pytest.raises(CheckpointError, match="cannot be read"):
        GgufFile(path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot be read"):
        GgufFile(path)
    path.write_bytes(b"PK\x03\x04" + bytes(40))
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        GgufFile(path)
    path.write_bytes(b"GGUF" + struct.pack(">I", 3) + bytes(40))
    with pytest.raises(CheckpointError, match="big-endian"):
        GgufFile(path)
    path.write_bytes(b"GGUF" + struct.pack("<I", 1) + bytes(40))
    with pytest.raises(CheckpointError, match="version 1"):
        GgufFile(path)
