"""Names for the beginnings of prompts, so that servers compute what they hold only once.

Servers see no tokens, and hidden states differ in their last bits with the shapes of batches, so
neither says that two sequences begin alike. The client says it: for every whole page of a prompt
it sends a *key*, an HMAC-SHA256 (RFC 2104) under a secret of this client, of all tokens up to the
page's end and of everything else that the page's contents depend on. Equal keys are equal pages.
Without the secret a key tells nothing about the tokens, not even to who guesses them.

What a page holds at a hop depends on the model, the coding of hidden states, the hop's own blocks
and numerics, and on those of all hops before it. HMACs are chained page by page, so that a prompt
costs time in proportion to its length.

`leaders` finds prompts of one batch that begin alike. Pure.
"""

import hashlib
import hmac
from collections.abc import Sequence

from p2pllm.client.state import Hop
from p2pllm.ids import ModelId
from p2pllm.wire.messages import MAX_PREFIX_KEYS, PREFIX_KEY_BYTES, PREFIX_TOKENS
from p2pllm.wire.tensors import TensorCodec

SECRET_BYTES = 32
TOKEN_BYTES = 8  # of a token id in what is hashed

Prompt = Sequence[int]


class PrefixKeys:
    """Makes the keys of one client for one model; `adapter` names what changes its blocks."""

    def __init__(self, secret: bytes, model: ModelId, adapter: bytes = b"") -> None:
        self._secret = secret
        self._origin = self._digest(b"prefix", model.digest, adapter)

    def of(
        self, token_ids: Prompt, codec: TensorCodec, hops: Sequence[Hop]
    ) -> list[tuple[bytes, ...]]:
        """The keys of a prompt's pages at each hop.

        The last token is in none of them: what follows it must be computed by somebody.
        """
        pages = self._pages(token_ids[: num_shareable(token_ids)])
        place = self._digest(b"client", codec.name.encode())
        keys: list[tuple[bytes, ...]] = []
        for hop in hops:
            place = self._digest(place, repr((hop.span, hop.numerics)).encode())
            keys.append(tuple(self._digest(place, page)[:PREFIX_KEY_BYTES] for page in pages))
        return keys

    def _pages(self, token_ids: Prompt) -> list[bytes]:
        """A digest of all tokens up to the end of each page."""
        digest, digests = self._origin, list[bytes]()
        for start in range(0, len(token_ids), PREFIX_TOKENS):
            page = token_ids[start : start + PREFIX_TOKENS]
            digest = self._digest(digest, *(token.to_bytes(TOKEN_BYTES, "big") for token in page))
            digests.append(digest)
        return digests

    def _digest(self, first: bytes, *rest: bytes) -> bytes:
        """An HMAC of parts, all but the last of which have a fixed length."""
        return hmac.digest(self._secret, b"".join((first, *rest)), hashlib.sha256)


def num_shareable(token_ids: Prompt) -> int:
    """How many tokens of a prompt others may share: whole pages, and not the last token."""
    num_pages = min((len(token_ids) - 1) // PREFIX_TOKENS, MAX_PREFIX_KEYS)
    return max(0, num_pages) * PREFIX_TOKENS


def leaders(prompts: Sequence[Prompt]) -> list[tuple[int, int] | None]:
    """Which prompts of a batch should wait for an earlier one, and how many tokens that saves.

    Each entry is (index of the earlier prompt, tokens in common), None for those that need not
    wait. It pays if at least half of a prompt is there then.
    """
    found: list[tuple[int, int] | None] = []
    candidates: dict[tuple[int, ...], list[int]] = {}  # that wait for nobody, by their first page
    for index, prompt in enumerate(prompts):
        same = candidates.setdefault(tuple(prompt[:PREFIX_TOKENS]), [])
        num_tokens, leader = max(
            ((_in_common(prompts[other], prompt), other) for other in same), default=(0, 0)
        )
        if num_tokens and 2 * num_tokens >= len(prompt):
            found.append((leader, num_tokens))
        else:
            found.append(None)
            same.append(index)
    return found


def _in_common(one: Prompt, other: Prompt) -> int:
    """Tokens of whole pages that both begin with."""
    most = min(num_shareable(one), num_shareable(other))
    for start in range(0, most, PREFIX_TOKENS):
        page = slice(start, start + PREFIX_TOKENS)
        if tuple(one[page]) != tuple(other[page]):
            return start
    return most
