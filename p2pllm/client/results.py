"""What a generation gives back: values for people, scripts and tests."""

from dataclasses import dataclass

from p2pllm.client.sequence import Finish
from p2pllm.ids import PeerId
from p2pllm.spans import Span


@dataclass(frozen=True, slots=True)
class HopReport:
    """One hop of the route, with the medians of its decode steps as the client saw them."""

    peer_id: PeerId
    blocks: Span
    rtt_s: float | None
    queue_s: float
    compute_s: float
    bytes_per_token: float


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """A finished (or stopped) generation.

    `ttft_s`: time to first token; `tpot_s`: mean time per output token after it; both in seconds,
    None while there is no such token. `own_s_per_token`: the client's own computation in each.
    `recoveries`: how often a lost server was replaced.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_token_ids: tuple[int, ...]
    finish: Finish | None
    ttft_s: float | None
    tpot_s: float | None
    tokens_per_s: float | None
    own_s_per_token: float | None
    route: tuple[HopReport, ...]
    recoveries: int = 0

    @property
    def bytes_per_token_per_hop(self) -> float:
        """Payload to and from a hop per generated token, on average over the hops."""
        return sum(hop.bytes_per_token for hop in self.route) / max(1, len(self.route))
