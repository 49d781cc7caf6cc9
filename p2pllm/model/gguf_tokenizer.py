"""A tokenizer built from a GGUF file's metadata.

Two kinds are known: "gpt2", byte-level BPE with its merges, and "llama", SentencePiece BPE, whose
merges follow from the pieces' scores. How a text is cut into words before BPE is not in the file:
`tokenizer.ggml.pre` names one of llama.cpp's regular expressions (its llama-vocab.cpp). A wrong
one would give slightly wrong ids for ever, so a name that is not known is refused.
"""

import enum
import hashlib
from collections.abc import Sequence

import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, processors

from p2pllm.errors import CheckpointError
from p2pllm.model.gguf import GgufFile
from p2pllm.model.tokenizer import SPACE_MARK, SPECIAL_NAMES, Layout, Tokenizer

PREFIX = "tokenizer."

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
# Expressions are applied one after the other, each to the pieces that the last one left.
_WORDS = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "gpt-2": (_GPT2,),
    "llama-bpe": (_LLAMA3,),
    "qwen2": (_QWEN2,),
    "smollm": (r"\p{N}", _GPT2),
}
_SYNONYMS = {"llama3": "llama-bpe", "llama-v3": "llama-bpe"}


class TokenType(enum.IntEnum):
    """tokenizer.ggml.token_type: SentencePiece's piece types."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def build_tokenizer(file: GgufFile) -> Tokenizer:
    """The tokenizer of a GGUF file; raises CheckpointError for what is not supported."""
    tokens = file.strings("tokenizer.ggml.tokens")
    kind = file.scalar("tokenizer.ggml.model")
    if not tokens or kind is None:
        raise CheckpointError(f"{file.path}: has no tokenizer")
    try:
        if kind == "gpt2":
            backend, layout = _byte_level(file, tokens), Layout.BYTE_LEVEL
        elif kind == "llama":
            backend, layout = _sentencepiece(file, tokens), Layout.SENTENCEPIECE
        else:
            raise CheckpointError(
                f"{file.path}: tokenizer {kind!r} is not supported; gpt2 and llama are"
            )
        _add_special(file, backend, tokens)
        _add_ends(file, backend, tokens, adds_bos=kind == "llama" or _pre(file) == "llama-bpe")
    except CheckpointError:
        raise
    except Exception as exc:  # the library raises nothing narrower
        raise CheckpointError(f"{file.path}: the tokenizer is damaged ({exc})") from exc
    template = file.scalar("tokenizer.chat_template")
    return Tokenizer(
        backend,
        layout,
        strips_space=layout is Layout.SENTENCEPIECE and _adds_space(file),
        eos_ids=eos_ids(file),
        special=_special_texts(file, tokens),
        template=template if isinstance(template, str) else None,
    )


def hash_tokenizer(file: GgufFile) -> bytes:
    """SHA-256 of all metadata that describes the tokenizer and the chat template."""
    digest = hashlib.sha256()
    for key in sorted(file):
        if key.startswith(PREFIX):
            value = file.raw(key)
            digest.update(f"{key}\0{len(value)}\0".encode())
            digest.update(value)
    return digest.digest()


def eos_ids(file: GgufFile) -> frozenset[int]:
    """Tokens that end a text: end of sequence, of turn, of message."""
    names = ("eos_token_id", "eot_token_id", "eom_token_id")
    ids = [file.scalar(f"tokenizer.ggml.{name}") for name in names]
    return frozenset(token for token in ids if type(token) is int)


def _byte_level(file: GgufFile, tokens: Sequence[str]) -> tokenizers.Tokenizer:
    parts = [line.partition(" ") for line in file.strings("tokenizer.ggml.merges")]
    merges = [(left, right) for left, _, right in parts]
    if not merges:
        raise CheckpointError(f"{file.path}: tokenizer.ggml.merges are missing")
    pre = _pre(file)
    expressions = _WORDS.get(pre)
    if expressions is None:
        raise CheckpointError(
            f"{file.path}: pre-tokenizer {pre!r} is not supported; {', '.join(_WORDS)} are"
        )
    # Llama 3 takes a word that is a token as it is, whatever its merges would make of it.
    model = models.BPE(_vocabulary(tokens), merges, ignore_merges=pre == "llama-bpe")
    backend = tokenizers.Tokenizer(model)
    splits = [pre_tokenizers.Split(Regex(each), "isolated") for each in expressions]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    return backend


def _sentencepiece(file: GgufFile, tokens: Sequence[str]) -> tokenizers.Tokenizer:
    """As `transformers` converts Llama 1 and 2: BPE, with merges in the order of scores."""
    scores = file.numbers("tokenizer.ggml.scores")
    if len(scores) != len(tokens):
        raise CheckpointError(
            f"{file.path}: {len(scores)} tokenizer.ggml.scores for {len(tokens)} tokens"
        )
    vocabulary = _vocabulary(tokens)
    unknown = file.scalar("tokenizer.ggml.unknown_token_id") or 0
    model = models.BPE(
        vocabulary,
        _merges(vocabulary, scores),
        unk_token=tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = tokenizers.Tokenizer(model)
    marks: list[normalizers.Normalizer] = [normalizers.Replace(" ", SPACE_MARK)]
    if _adds_space(file):
        marks.insert(0, normalizers.Prepend(SPACE_MARK))
    backend.normalizer = normalizers.Sequence(marks)
    return backend


def _merges(vocabulary: dict[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every way to make a piece of two pieces, the best-scored results first."""
    found = []
    for piece, token in vocabulary.items():
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [pair for pair in halves if pair[0] in vocabulary and pair[1] in vocabulary]
        known.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        found += [(scores[token], pair) for pair in known]
    found.sort(key=lambda item: (item[0], len(item[1][0]), len(item[1][1])), reverse=True)
    return [pair for _, pair in found]


def _vocabulary(tokens: Sequence[str]) -> dict[str, int]:
    """Ids by token; of equal tokens, which padding may bring, the first one counts."""
    return {token: number for number, token in reversed(list(enumerate(tokens)))}


def _add_special(file: GgufFile, backend: tokenizers.Tokenizer, tokens: Sequence[str]) -> None:
    """Tokens that are recognised in a text as a whole."""
    for token, kind in zip(tokens, file.numbers("tokenizer.ggml.token_type"), strict=False):
        if kind in (TokenType.CONTROL, TokenType.UNKNOWN):
            backend.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind == TokenType.USER_DEFINED:
            backend.add_tokens([AddedToken(token, normalized=False, special=False)])


def _add_ends(
    file: GgufFile, backend: tokenizers.Tokenizer, tokens: Sequence[str], *, adds_bos: bool
) -> None:
    """Put tokens before and after a text where the file says so, or its kind by default."""
    wanted = file.scalar("tokenizer.ggml.add_bos_token")
    bos = _id(file, "bos") if (adds_bos if wanted is None else wanted) else None
    eos = _id(file, "eos") if file.scalar("tokenizer.ggml.add_eos_token") else None
    ends = [token for token in (bos, eos) if token is not None]
    if ends:
        backend.post_processor = processors.TemplateProcessing(
            single=[
                *([tokens[bos]] if bos is not None else []),
                "$A",
                *([tokens[eos]] if eos is not None else []),
            ],
            special_tokens=[(tokens[token], token) for token in ends],
        )


def _special_texts(file: GgufFile, tokens: Sequence[str]) -> dict[str, str]:
    found = {}
    for name in SPECIAL_NAMES:
        token = _id(file, name.removesuffix("_token"))
        if token is not None and 0 <= token < len(tokens):
            found[name] = tokens[token]
    return found


def _id(file: GgufFile, name: str) -> int | None:
    names = {"unk": "unknown", "pad": "padding"}
    value = file.scalar(f"tokenizer.ggml.{names.get(name, name)}_token_id")
    return value if type(value) is int else None


def _pre(file: GgufFile) -> str:
    name = str(file.scalar("tokenizer.ggml.pre") or "default")
    return _SYNONYMS.get(name, name)


def _adds_space(file: GgufFile) -> bool:
    return file.scalar("tokenizer.ggml.add_space_prefix") is not False
