"""What a client wants a route for."""

import enum
from dataclasses import dataclass

from p2pllm.ids import PeerId
from p2pllm.spans import Span
from p2pllm.wire.messages import Numerics


class Objective(enum.Enum):
    """What is to be short."""

    TOTAL = "total"  # the whole request: TTFT + new tokens × TPOT
    FIRST_TOKEN = "first-token"  # TTFT: long prompts, short answers, forward passes
    EACH_TOKEN = "each-token"  # TPOT: somebody reads along


@dataclass(frozen=True, slots=True)
class RouteRequest:
    """One generation (or a batch of like ones), as far as the choice of servers depends on it.

    `span`: the blocks to cover; None: the whole model. A repair asks for the lost span, with the
    route's living hops in `excluded` (a server holds one session of a route at most) and, in a
    chain, `before` and `after`: the hops around the gap (None: this client).
    `prompt_tokens` (or those to replay) and `new_tokens` are per sequence, `batch` the number of
    sequences; `max_tokens` is the cache each one needs (0: prompt and new tokens).
    `chunk_tokens`: prompts go through the hops in chunks of so many tokens.
    `activation_bytes_per_token` counts the encoded hidden state.
    `own_step_s` and `own_chunk_s`: the client's own computation per new token (head, sampling,
    embedding) and per chunk of a prompt (embedding), as measured; they change no choice.
    `relayed`: the client carries every activation itself; else servers push to each other.
    `numerics` are preferred, or demanded where `is_strict`; None: any will do.
    `seed` and `spread` keep clients from all choosing the same of several equal servers: costs
    are weighed with a factor from 1 to 1 + spread that depends on seed and server. Each client
    uses a seed of its own; None weighs exactly.
    """

    prompt_tokens: int = 128
    new_tokens: int = 128
    batch: int = 1
    max_tokens: int = 0
    chunk_tokens: int = 256
    activation_bytes_per_token: float = 2 * 4096
    own_step_s: float = 0.0
    own_chunk_s: float = 0.0
    objective: Objective = Objective.TOTAL
    span: Span | None = None
    relayed: bool = True
    before: PeerId | None = None
    after: PeerId | None = None
    excluded: frozenset[PeerId] = frozenset()
    numerics: Numerics | None = None
    is_strict: bool = False
    seed: int | None = None
    spread: float = 0.05

    @property
    def cache_tokens(self) -> int:
        """Tokens of K/V cache that each sequence needs at every hop."""
        return self.max_tokens or self.prompt_tokens + self.new_tokens

    @property
    def chunks(self) -> tuple[int, ...]:
        """The sizes of the prompt's chunks, in order, of one sequence."""
        whole, rest = divmod(max(self.prompt_tokens, 1), self.chunk_tokens)
        return (self.chunk_tokens,) * whole + ((rest,) if rest else ())
