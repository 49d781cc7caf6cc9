"""Tokenizers of Hugging Face directories: ids, streamed text, chat templates."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers

from p2pllm.errors import CheckpointError, ConfigError
from p2pllm.model.tokenizer import Tokenizer, hash_directory, load_tokenizer

Tiny = Any  # conftest.TinyModel; a conftest cannot be imported
USER = [{"role": "user", "content": "the fox"}]
SHARED = settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])

_made: dict[str, Tokenizer] = {}


@pytest.fixture
def tokenizer(tiny: Tiny, tmp_path: Path) -> Tokenizer:
    if not _made:  # it is immutable, and hypothesis asks often
        _made["tiny"] = load_tokenizer(tiny.write_hf(tmp_path))
    return _made["tiny"]


def sentencepiece(directory: Path, decoder: decoders.Decoder) -> Tokenizer:
    vocabulary = {"<unk>": 0, "▁": 1, "▁a": 2, "a": 3, "b": 4}
    vocabulary |= {f"<0x{byte:02X}>": 5 + byte for byte in range(256)}
    merges = [("▁", "a")]
    model = models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>")
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoder
    backend.save(str(directory / "tokenizer.json"))
    return load_tokenizer(directory)


LLAMA_DECODER = decoders.Sequence(
    [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
)


# --- ids and text -----------------------------------------------------------------------------


@SHARED
@given(text=st.text())
def test_text_survives_encoding_and_decoding(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text


@SHARED
@given(ids=st.lists(st.integers(3, 310)))
def test_decoding_is_that_of_the_library(tokenizer: Tokenizer, ids: list[int]) -> None:
    theirs: str = tokenizer._backend.decode(ids)
    assert tokenizer.decode(ids) == theirs


@SHARED
@given(text=st.text(alphabet="ab ß漢🐟\n", max_size=12))
def test_sentencepiece_text_survives_and_is_that_of_the_library(tmp_path: Path, text: str) -> None:
    if "sp" not in _made:
        _made["sp"] = sentencepiece(tmp_path, LLAMA_DECODER)
    tokenizer = _made["sp"]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text == tokenizer._backend.decode(ids)


def test_special_tokens_in_a_text_are_recognised(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("<|im_start|>") == [1]
    assert tokenizer.decode([1]) == ""
    assert tokenizer.decode([1], skip_special=False) == "<|im_start|>"


def test_ids_outside_the_vocabulary_are_no_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([-1, 300, 2**40]) == ""


def test_a_text_that_is_no_unicode_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="not valid Unicode"):
        tokenizer.encode("a\udc80")


def test_truncation_and_padding_from_training_are_switched_off(tiny: Tiny, tmp_path: Path) -> None:
    tiny.tokenizer.enable_truncation(4)
    tiny.tokenizer.enable_padding(length=8)
    tokenizer = load_tokenizer(tiny.write_hf(tmp_path))
    assert len(tokenizer.encode("x" * 30)) > 8
    assert len(tokenizer.encode("x")) == 1


# --- streaming --------------------------------------------------------------------------------


@SHARED
@given(ids=st.lists(st.integers(0, 310)), skip=st.booleans())
def test_streamed_text_adds_up_to_decoded_text(
    tokenizer: Tokenizer, ids: list[int], skip: bool
) -> None:
    stream = tokenizer.stream(skip_special=skip)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids, skip_special=skip)


def test_a_character_split_over_tokens_appears_when_it_is_whole(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🐟")
    assert len(ids) == 4
    stream = tokenizer.stream()
    assert [stream.push(token) for token in ids] == ["", "", "", "🐟"]
    assert stream.flush() == ""


def test_an_unfinished_character_ends_as_a_replacement(tokenizer: Tokenizer) -> None:
    stream = tokenizer.stream()
    assert [stream.push(token) for token in tokenizer.encode("🐟")[:2]] == ["", ""]
    assert stream.flush() == "\ufffd"


def test_bytes_that_never_become_a_character_do_not_hold_the_text_back(
    tokenizer: Tokenizer,
) -> None:
    lead = tokenizer.encode("🐟")[0]
    stream = tokenizer.stream()
    shown = "".join(stream.push(lead) for _ in range(100))
    assert len(shown) == 99


def test_the_first_space_is_stripped_at_the_beginning_of_a_text_only(tmp_path: Path) -> None:
    tokenizer = sentencepiece(tmp_path, LLAMA_DECODER)
    assert tokenizer.decode([2, 2]) == "a a"
    stream = tokenizer.stream()
    assert stream.push(2) + stream.push(2) == "a a"
    stream = tokenizer.stream(prompt_ids=[4])
    assert stream.push(2) + stream.push(2) == " a a"


@pytest.mark.parametrize(
    ("decoder", "text"),
    [
        (decoders.Metaspace(), "a a"),
        (decoders.Metaspace(prepend_scheme="never"), " a a"),
        (decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()]), " a a"),
    ],
)
def test_the_decoder_says_whether_a_space_is_stripped(
    tmp_path: Path, decoder: decoders.Decoder, text: str
) -> None:
    tokenizer = sentencepiece(tmp_path, decoder)
    assert tokenizer.decode([2, 2]) == text == tokenizer._backend.decode([2, 2])


# --- chat -------------------------------------------------------------------------------------


def test_a_chat_is_written_by_the_template(tokenizer: Tokenizer) -> None:
    text = "<|im_start|>user\nthe fox<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.has_chat_template
    assert tokenizer.render_chat(USER) == text
    assert tokenizer.encode_chat(USER) == tokenizer.encode(text)
    shorter = tokenizer.render_chat(USER, add_generation_prompt=False)
    assert text == shorter + "<|im_start|>assistant\n"


@pytest.mark.parametrize("place", ["file", "setting", "named"])
def test_a_template_may_stand_in_three_places(tiny: Tiny, tmp_path: Path, place: str) -> None:
    path = tiny.write_hf(tmp_path)
    template = "{{ bos_token }}{{ messages[0]['content'] | tojson }}"
    values: dict[str, Any] = {"bos_token": {"content": "<s>", "lstrip": False}}
    if place == "file":
        (path / "chat_template.jinja").write_text(template)
    elif place == "setting":
        values["chat_template"] = template
    else:
        named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": template}]
        values["chat_template"] = named
    (path / "tokenizer_config.json").write_text(json.dumps(values))
    assert load_tokenizer(path).render_chat([{"role": "user", "content": "<ä>"}]) == '<s>"<ä>"'


def rendering(tiny: Tiny, path: Path, template: str) -> str:
    tiny.template = template
    return load_tokenizer(tiny.write_hf(path)).render_chat(USER)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no system role') }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ range(10000000) | list }}",
        "{{ messages[5].content }}",
        "{{ 1 / 0 }}",
        "{{ nothing() }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    ],
)
def test_whatever_a_template_does_ends_in_config_error(
    tiny: Tiny, tmp_path: Path, template: str
) -> None:
    with pytest.raises(ConfigError, match="chat template refuses the messages"):
        rendering(tiny, tmp_path, template)


def test_a_template_that_does_not_parse_matters_to_chats_only(tiny: Tiny, tmp_path: Path) -> None:
    tiny.template = "{% for %}"
    tokenizer = load_tokenizer(tiny.write_hf(tmp_path))
    assert tokenizer.encode("fox")
    with pytest.raises(CheckpointError, match="does not parse"):
        tokenizer.encode_chat(USER)


def test_without_a_template_there_is_no_chat(tiny: Tiny, tmp_path: Path) -> None:
    path = tiny.write_hf(tmp_path)
    (path / "tokenizer_config.json").unlink()
    tokenizer = load_tokenizer(path)
    assert not tokenizer.has_chat_template
    with pytest.raises(ConfigError, match="no chat template"):
        tokenizer.encode_chat(USER)


def test_messages_need_a_role_and_a_content(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="role and a content"):
        tokenizer.encode_chat([{"content": "x"}])


# --- settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("generation", "ids"),
    [({}, {2}), ({"eos_token_id": 0}, {0, 2}), ({"eos_token_id": [0, 7, "x"]}, {0, 7, 2})],
)
def test_eos_ids_are_those_of_the_generation_config_and_the_tokenizers_own(
    tiny: Tiny, tmp_path: Path, generation: dict[str, Any], ids: set[int]
) -> None:
    path = tiny.write_hf(tmp_path)
    (path / "generation_config.json").write_text(json.dumps(generation))
    assert load_tokenizer(path).eos_ids == ids


def test_the_hash_depends_on_all_that_the_tokenizer_does(tiny: Tiny, tmp_path: Path) -> None:
    path = tiny.write_hf(tmp_path)
    hashes = [hash_directory(path), hash_directory(path)]
    (path / "generation_config.json").write_text('{"eos_token_id": [0]}')
    hashes.append(hash_directory(path))
    (path / "generation_config.json").write_text('{"eos_token_id": [0], "temperature": 1}')
    hashes.append(hash_directory(path))
    assert hashes[0] == hashes[1] != hashes[2] == hashes[3]


def test_an_unknown_decoder_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    tiny.tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(CheckpointError, match="decoder 'WordPiece' is not supported"):
        load_tokenizer(tiny.write_hf(tmp_path))
