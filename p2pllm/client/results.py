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
class Recovered:
    """A chain was repaired: `by` took over from `lost` (both empty: only links were mended).

    `stall_s` is how long the repair took, `replayed_tokens` how many were computed again.
    """

    lost: tuple[tuple[PeerId, Span], ...]
    by: tuple[tuple[PeerId, Span], ...]
    reason: str
    stall_s: float
    replayed_tokens: int


@dataclass(frozen=True, slots=True)
class WaitingForBlocks:
    """Nobody serves these blocks now; we wait for up to `patience_s` for somebody to."""

    missing: tuple[Span, ...]
    patience_s: float


ChainEvent = Recovered | WaitingForBlocks


def event_words(event: ChainEvent) -> tuple[str, str]:
    """What happened to a route, in a word and in a sentence."""
    if isinstance(event, WaitingForBlocks):
        spans = ", ".join(map(str, event.missing))
        return "waiting", f"no server for blocks {spans}; waiting up to {event.patience_s:g} s"
    if not event.lost:
        return "mended", f"{event.reason}; all hops told again after {event.stall_s:.2f} s"
    lost = ", ".join(f"{peer.short} ({span})" for peer, span in event.lost)
    by = ", ".join(f"{peer.short} ({span})" for peer, span in event.by)
    return (
        "replaced",
        f"server {lost} replaced by {by} after {event.stall_s:.2f} s, "
        f"{event.replayed_tokens} tokens computed again: {event.reason}",
    )


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """A finished (or stopped) generation.

    `ttft_s`: time to first token; `tpot_s`: mean time per output token after it; both in seconds,
    None while there is no such token. `own_s_per_token`: the client's own computation in each.
    `recoveries`: the repairs of its route, in order. `journal_peak_bytes`: the most memory that the
    client's journals, of all its sequences, have taken so far. `cached_prompt_tokens`: how many of
    the prompt's the servers held already, of this session or of others that began alike.
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
    recoveries: tuple[Recovered, ...] = ()
    journal_peak_bytes: int = 0
    cached_prompt_tokens: int = 0

    @property
    def bytes_per_token_per_hop(self) -> float:
        """Payload to and from a hop per generated token, on average over the hops."""
        return sum(hop.bytes_per_token for hop in self.route) / max(1, len(self.route))
