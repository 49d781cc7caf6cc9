"""Tokenizer: text and chat messages to token ids, and token ids back to text as they appear.

The ids come from the `tokenizers` library. The way back is our own: each token *is* some bytes,
so text is the concatenation of them, decoded as UTF-8. Then a stream of tokens needs no look-back,
a character that is split over several tokens appears when its last byte does, and text once given
never changes. Two layouts of vocabularies exist: byte-level (GPT-2's printable stand-ins for
bytes) and SentencePiece ("▁" for a space, "<0x0A>" for single bytes).

Chat templates are programs that came with a model, so they run in jinja2's sandbox, where they
can neither reach Python's internals nor change what they are given. They get no clock: those
that ask for the date have a fallback, and a prompt should not change at midnight.

Imports no torch, so that it can be used where none is needed.
"""

import codecs
import enum
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

from p2pllm.errors import CheckpointError, ConfigError
from p2pllm.model.files import read_json

Messages = Sequence[Mapping[str, str]]  # of "role" and "content"

SPACE_MARK = "▁"  # SentencePiece's stand-in for a space (U+2581)
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


class Layout(enum.Enum):
    """How a vocabulary writes bytes."""

    BYTE_LEVEL = enum.auto()
    SENTENCEPIECE = enum.auto()


class Tokenizer:
    """Of one model. Made by `load_tokenizer`, or from a GGUF file by `gguf_tokenizer`.

    `strips_space`: a text begins with a space that is not its own. `special` holds the texts of
    bos_token and so on, for the chat template. `eos_ids`: any of them ends a text.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        layout: Layout,
        *,
        strips_space: bool = False,
        eos_ids: Iterable[int] = (),
        special: Mapping[str, str] | None = None,
        template: str | None = None,
    ) -> None:
        backend.no_truncation()  # a tokenizer.json may ask for both, from training
        backend.no_padding()
        self._backend = backend
        self._layout = layout
        self._strips_space = strips_space
        self._added: dict[int, tokenizers.AddedToken] = backend.get_added_tokens_decoder()
        self._size: int = backend.get_vocab_size()
        self._bytes: dict[int, bytes] = {}  # found so far
        self._special = dict(special or {})
        self._template_source = template
        self.eos_ids = frozenset(eos_ids)

    @property
    def base_size(self) -> int:
        """How many tokens there are without those that were added later."""
        return int(self._backend.get_vocab_size(with_added_tokens=False))

    @property
    def has_chat_template(self) -> bool:
        """May `encode_chat` be used?"""
        return self._template_source is not None

    # --- text to ids ---------------------------------------------------------------------

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids of a text; special tokens written out in it ("<|im_end|>") are recognised.

        `add_special` puts the beginning-of-sequence token in front, if the model wants one.
        """
        try:
            text.encode()
        except UnicodeEncodeError as exc:  # lone surrogates, from undecodable command lines
            raise ConfigError(f"the text is not valid Unicode ({exc.reason})") from exc
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special).ids
        return ids

    def encode_chat(self, messages: Messages, *, add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a conversation, ready for the assistant's answer."""
        text = self.render_chat(messages, add_generation_prompt=add_generation_prompt)
        return self.encode(text, add_special=False)  # the template writes what is needed

    def render_chat(self, messages: Messages, *, add_generation_prompt: bool = True) -> str:
        """The text that the model's template makes of a conversation.

        Raises ConfigError if there is no template, or it does not accept these messages.
        """
        if not all({"role", "content"} <= message.keys() for message in messages):
            raise ConfigError("each chat message needs a role and a content")
        template = self._template
        variables = {**self._special, "add_generation_prompt": add_generation_prompt}
        try:
            return template.render(messages=[dict(message) for message in messages], **variables)
        except Exception as exc:  # somebody else's program, which may fail in any way
            raise ConfigError(f"the model's chat template refuses the messages: {exc}") from exc

    @cached_property
    def _template(self) -> jinja2.Template:
        if self._template_source is None:
            raise ConfigError("the model has no chat template; give it plain text (--raw)")
        # The settings and functions that templates rely on, as `transformers` provides them.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        try:
            return environment.from_string(self._template_source)
        except (jinja2.TemplateError, RecursionError) as exc:
            raise CheckpointError(f"the model's chat template does not parse: {exc}") from exc

    # --- ids to text ---------------------------------------------------------------------

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of token ids; what is no UTF-8 becomes U+FFFD."""
        detokenizer = Detokenizer(self, self._strips_space, skip_special)
        return "".join([detokenizer.push(token) for token in ids]) + detokenizer.flush()

    def stream(self, prompt_ids: Sequence[int] = (), *, skip_special: bool = True) -> "Detokenizer":
        """A detokenizer for what follows `prompt_ids`."""
        return Detokenizer(self, self._strips_space and not prompt_ids, skip_special)

    def bytes_of(self, token: int, *, skip_special: bool = True) -> bytes:
        """The bytes that a token stands for; none for an id that is not in the vocabulary."""
        added = self._added.get(token)
        if added is not None:
            return b"" if added.special and skip_special else added.content.encode()
        found = self._bytes.get(token)
        if found is None:
            if not 0 <= token < self._size:  # of a head that is padded, perhaps
                return b""
            piece = self._backend.id_to_token(token)
            found = b"" if piece is None else _piece_bytes(piece, self._layout)
            self._bytes[token] = found
        return found


class Detokenizer:
    """Turns a growing list of tokens into growing text.

    What `push` returned so far, plus `flush`, is what `Tokenizer.decode` gives for all tokens.
    """

    def __init__(self, tokenizer: Tokenizer, strips_space: bool, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._strips_space = strips_space  # of the first character that comes
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that this token makes certain; whole UTF-8 characters only."""
        return self._strip(self._utf8.decode(self._bytes_of(token)))

    def flush(self) -> str:
        """What was held back: U+FFFD if the text ends inside a character, else nothing."""
        return self._strip(self._utf8.decode(b"", final=True))

    def _bytes_of(self, token: int) -> bytes:
        return self._tokenizer.bytes_of(token, skip_special=self._skip_special)

    def _strip(self, text: str) -> str:
        if self._strips_space and text:
            self._strips_space = False
            return text.removeprefix(" ")
        return text


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face model directory; raises CheckpointError."""
    path = directory / "tokenizer.json"
    try:
        backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise CheckpointError(f"{path}: cannot be read ({exc.strerror})") from exc
    except Exception as exc:  # the library raises nothing narrower
        raise CheckpointError(f"{path}: not a tokenizer ({exc})") from exc
    layout, strips_space = _layout_of(path, backend.decoder)
    settings = _Settings(directory)
    special = settings.special()
    eos_ids = settings.eos_ids()
    if (eos_id := backend.token_to_id(special.get("eos_token", ""))) is not None:
        eos_ids |= {eos_id}
    return Tokenizer(
        backend,
        layout,
        strips_space=strips_space,
        eos_ids=eos_ids,
        special=special,
        template=settings.template(),
    )


def hash_directory(directory: Path) -> bytes:
    """SHA-256 of everything that decides what `load_tokenizer` makes of a directory."""
    settings = _Settings(directory)
    try:
        vocabulary = (directory / "tokenizer.json").read_bytes()
    except OSError as exc:
        raise CheckpointError(f"{directory / 'tokenizer.json'}: {exc.strerror}") from exc
    rest = [settings.special(), sorted(settings.eos_ids()), settings.template()]
    digest = hashlib.sha256(hashlib.sha256(vocabulary).digest())
    digest.update(json.dumps(rest, sort_keys=True).encode())
    return digest.digest()


class _Settings:
    """The JSON files beside a tokenizer.json; all are optional."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._tokenizer = self._read("tokenizer_config.json")
        self._generation = self._read("generation_config.json")
        self._model = self._read("config.json")

    def special(self) -> dict[str, str]:
        """Texts of the special tokens that templates name."""
        found = {}
        for name in SPECIAL_NAMES:
            value = self._tokenizer.get(name)
            if isinstance(value, dict):  # an AddedToken, written out
                value = value.get("content")
            if isinstance(value, str):
                found[name] = value
        return found

    def eos_ids(self) -> frozenset[int]:
        """generation_config.json counts, where it is there: chat models add to it."""
        value = self._generation.get("eos_token_id", self._model.get("eos_token_id"))
        ids = value if isinstance(value, list) else [value]
        return frozenset(token for token in ids if type(token) is int)

    def template(self) -> str | None:
        """The chat template: its own file, or part of the tokenizer's settings."""
        path = self._directory / "chat_template.jinja"
        if path.is_file():
            try:
                return path.read_text(encoding="utf-8")
            except (OSError, ValueError) as exc:
                raise CheckpointError(f"{path}: cannot be read ({exc})") from exc
        value = self._tokenizer.get("chat_template")
        if isinstance(value, list):  # several, by name
            named = [entry for entry in value if isinstance(entry, dict)]
            value = next((e.get("template") for e in named if e.get("name") == "default"), None)
        return value if isinstance(value, str) else None

    def _read(self, name: str) -> dict[str, Any]:
        path = self._directory / name
        return read_json(path) if path.is_file() else {}


def _layout_of(path: Path, decoder: Any) -> tuple[Layout, bool]:
    """Layout and strips_space, from the decoder that a tokenizer.json asks for."""
    state = json.loads(decoder.__getstate__()) if decoder is not None else {}
    steps = state.get("decoders", [state])
    by_type = {step.get("type"): step for step in steps}
    if "ByteLevel" in by_type:
        return Layout.BYTE_LEVEL, False
    if "Metaspace" in by_type:
        return Layout.SENTENCEPIECE, by_type["Metaspace"].get("prepend_scheme") != "never"
    if "ByteFallback" in by_type:
        return Layout.SENTENCEPIECE, by_type.get("Strip", {}).get("start", 0) > 0
    raise CheckpointError(
        f"{path}: decoder {state.get('type')!r} is not supported; ByteLevel, Metaspace and "
        "ByteFallback are"
    )


def _piece_bytes(piece: str, layout: Layout) -> bytes:
    if layout is Layout.BYTE_LEVEL:
        table = _byte_level_table()
        # A character that stands for no byte can only be meant literally.
        return b"".join([table.get(char) or char.encode() for char in piece])
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        try:
            return bytes.fromhex(piece[3:5])
        except ValueError:
            pass  # an ordinary piece that looks like one
    return piece.replace(SPACE_MARK, " ").encode()


@functools.cache
def _byte_level_table() -> dict[str, bytes]:
    """GPT-2's printable stand-ins: Latin-1's visible characters are themselves, others follow."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    table = {chr(byte): bytes([byte]) for byte in visible}
    return table | {chr(0x100 + place): bytes([byte]) for place, byte in enumerate(others)}


def _to_json(value: object, indent: int | None = None) -> str:
    """jinja2's own filter escapes for HTML, which a prompt must not be."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
