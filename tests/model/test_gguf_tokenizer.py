"""Tokenizers built from GGUF metadata, against independent ways to the same ids."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from p2pllm.errors import CheckpointError
from p2pllm.model.gguf import GgufFile
from p2pllm.model.gguf_tokenizer import build_tokenizer, hash_tokenizer
from p2pllm.model.tokenizer import Tokenizer, load_tokenizer

Tiny = Any  # conftest.TinyModel; a conftest cannot be imported
Change = Callable[[gguf.GGUFWriter], None]
SHARED = settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])

PIECES = {  # scores: the higher, the earlier merged
    "▁": -20.0, "a": -21.0, "b": -22.0, "c": -23.0, "é": -24.0,
    "ab": -1.0, "bc": -2.0, "▁a": -3.0, "abc": -4.0, "ca": -5.0, "▁ab": -6.0, "cab": -7.0,
    "aa": -8.0, "aaaa": -9.0, "▁▁": -10.0,
}  # fmt: skip
BASE = 3 + 256
_made: dict[str, Tokenizer] = {}


def write(path: Path, change: Change) -> GgufFile:
    writer = gguf.GGUFWriter(path, "llama")
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufFile(path)


def sentencepiece(writer: gguf.GGUFWriter) -> None:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * BASE + list(PIECES.values()))
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * len(PIECES))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def merge_by_scores(text: str) -> list[int]:
    """SentencePiece's BPE as it is defined: merge the best-scored neighbours until none are."""
    symbols = list("▁" + text.replace(" ", "▁"))
    while True:
        pairs = [(PIECES.get(a + b), -at) for at, (a, b) in enumerate(itertools.pairwise(symbols))]
        scored = [(score, at) for score, at in pairs if score is not None]
        if not scored:
            break
        at = -max(scored)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    ids, numbers = [], {piece: BASE + number for number, piece in enumerate(PIECES)}
    for symbol in symbols:
        if symbol in numbers:
            ids.append(numbers[symbol])
        else:
            ids += [3 + byte for byte in symbol.encode()]
    return ids


def once(name: str, make: Callable[[], Tokenizer]) -> Tokenizer:
    if name not in _made:
        _made[name] = make()
    return _made[name]


@SHARED
@given(text=st.text(alphabet="aabbc é漢", min_size=1, max_size=20))
def test_sentencepiece_ids_are_those_of_the_definition(tmp_path: Path, text: str) -> None:
    tokenizer = once("sp", lambda: build_tokenizer(write(tmp_path / "x.gguf", sentencepiece)))
    assert tokenizer.encode(text) == [1, *merge_by_scores(text)]
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_sentencepiece_without_bos_and_without_prefix(tmp_path: Path) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        sentencepiece(writer)
        writer.add_add_bos_token(False)
        writer.add_add_eos_token(True)
        writer.add_add_space_prefix(False)

    tokenizer = build_tokenizer(write(tmp_path / "x.gguf", change))
    assert tokenizer.encode("ab") == [BASE + list(PIECES).index("ab"), 2]
    assert tokenizer.encode("ab", add_special=False) == [BASE + list(PIECES).index("ab")]
    assert tokenizer.decode(tokenizer.encode(" ab")) == " ab"
    assert tokenizer.encode("</s>", add_special=False) == [2]


@SHARED
@given(text=st.text())
def test_byte_level_ids_are_those_of_the_same_tokenizer_in_json(
    tiny: Tiny, tmp_path: Path, text: str
) -> None:
    theirs = once("hf", lambda: load_tokenizer(tiny.write_hf(tmp_path / "hf")))
    ours = once("gguf", lambda: build_tokenizer(GgufFile(tiny.write_gguf(tmp_path / "tiny.gguf"))))
    assert ours.encode(text) == theirs.encode(text)
    assert ours.eos_ids == theirs.eos_ids
    assert ours.render_chat([{"role": "user", "content": text}]) == theirs.render_chat(
        [{"role": "user", "content": text}]
    )


def with_pre(name: str) -> Change:
    """All bytes are tokens, nothing merges but "12", "123" and "abcd" (the last by no rule)."""

    def change(writer: gguf.GGUFWriter) -> None:
        from tokenizers.pre_tokenizers import ByteLevel

        tokens = [*sorted(ByteLevel.alphabet()), "12", "123", "ab", "bcd", "abcd", "<s>", "Ġ1"]
        writer.add_tokenizer_model("gpt2")
        if name:
            writer.add_tokenizer_pre(name)
        writer.add_token_list(tokens)
        writer.add_token_types([1] * 261 + [3, 1])
        writer.add_token_merges(["Ġ 1", "1 2", "12 3", "a b"])
        writer.add_bos_token_id(261)

    return change


@pytest.mark.parametrize(
    ("name", "text", "pieces"),
    [
        ("smollm", "1234 a", ["1", "2", "3", "4", " ", "a"]),
        ("gpt-2", "1234 12", ["123", "4", " 1", "2"]),
        ("default", "1234 12", ["123", "4", " ", "12"]),
        ("", "1234", ["123", "4"]),
        ("llama-bpe", "12345 abcd", ["<s>", "123", "4", "5", " ", "ab", "c", "d"]),
        ("llama-bpe", "abcd", ["<s>", "abcd"]),  # a word that is a token stays whole
        ("llama3", "abcd", ["<s>", "abcd"]),
        ("qwen2", "12 abcd", ["1", "2", " ", "ab", "c", "d"]),
        ("gpt-2", "abcd", ["ab", "c", "d"]),
    ],
)
def test_words_are_cut_as_the_pre_tokenizer_says(
    tmp_path: Path, name: str, text: str, pieces: list[str]
) -> None:
    tokenizer = build_tokenizer(write(tmp_path / "x.gguf", with_pre(name)))
    ids = tokenizer.encode(text)
    assert [tokenizer.decode([token], skip_special=False) for token in ids] == pieces


def test_kinds_that_are_not_known_are_refused_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="pre-tokenizer 'tekken' is not supported; default,"):
        build_tokenizer(write(tmp_path / "x.gguf", with_pre("tekken")))

    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("bert")
        writer.add_token_list(["a"])

    with pytest.raises(CheckpointError, match="tokenizer 'bert' is not supported; gpt2 and llama"):
        build_tokenizer(write(tmp_path / "y.gguf", change))


@pytest.mark.parametrize("missing", ["tokens", "merges", "model"])
def test_a_tokenizer_with_a_part_missing_is_refused(tmp_path: Path, missing: str) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        with_pre("gpt-2")(writer)
        writer.kv_data[0].pop(f"tokenizer.ggml.{missing}")

    with pytest.raises(CheckpointError, match=r"x\.gguf"):
        build_tokenizer(write(tmp_path / "x.gguf", change))


@pytest.mark.parametrize(
    ("key", "damage"),
    [
        ("merges", lambda w: w.add_array("tokenizer.ggml.merges", ["1 9", "no-space"])),
        ("merges", lambda w: w.add_array("tokenizer.ggml.merges", [1, 2])),
        ("tokens", lambda w: w.add_array("tokenizer.ggml.tokens", ["a", "b"])),
        ("bos_token_id", lambda w: w.add_bos_token_id(10**6)),
    ],
)
def test_a_damaged_tokenizer_is_refused(tmp_path: Path, key: str, damage: Change) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        with_pre("llama-bpe")(writer)
        writer.kv_data[0].pop(f"tokenizer.ggml.{key}")
        damage(writer)

    with pytest.raises(CheckpointError, match=r"x\.gguf"):
        build_tokenizer(write(tmp_path / "x.gguf", change))


def test_the_hash_is_of_the_tokenizers_metadata_only(tmp_path: Path) -> None:
    def hashed(name: str, extra: Change) -> bytes:
        def change(writer: gguf.GGUFWriter) -> None:
            with_pre("gpt-2")(writer)
            extra(writer)

        return hash_tokenizer(write(tmp_path / name, change))

    plain = hashed("a.gguf", lambda w: None)
    assert plain == hashed("b.gguf", lambda w: w.add_name("other"))
    assert plain != hashed("c.gguf", lambda w: w.add_chat_template("x"))
    assert plain != hashed("d.gguf", lambda w: w.add_eos_token_id(5))
