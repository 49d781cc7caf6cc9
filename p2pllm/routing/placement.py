"""Which span a new server should take: Petals' rule.

The throughput of a block is the sum over the servers that hold it; a new server takes the window
whose blocks are weakest: the one whose throughputs, sorted upwards, come first in lexicographic
order (`block_selection.choose_best_blocks` of bigscience-workshop/petals). A server counts with
its prefill rate over the (n + 1) / 2 of its n blocks that a request entering anywhere would use
on average. Cache memory is not looked at, and nobody is asked to move.
"""

from p2pllm.errors import ConfigError
from p2pllm.ids import PeerId
from p2pllm.spans import Span
from p2pllm.swarm.announcements import Presence, ServerState
from p2pllm.swarm.view import SwarmView


def choose_span(view: SwarmView, num_blocks: int, own: PeerId | None = None) -> Span:
    """The span of `num_blocks` blocks that helps the swarm most; the first of equal ones.

    `own` is the server that chooses: what it announced before its restart does not count.
    Raises ConfigError unless 0 < num_blocks ≤ the model's.
    """
    if not 0 < num_blocks <= view.num_blocks:
        raise ConfigError(f"{num_blocks} blocks; the model has {view.num_blocks}: serve 1 or more")
    throughputs = block_throughputs(view, own)
    starts = range(view.num_blocks - num_blocks + 1)
    best = min(starts, key=lambda start: sorted(throughputs[start : start + num_blocks]))
    return Span(best, best + num_blocks)


def block_throughputs(view: SwarmView, own: PeerId | None = None) -> list[float]:
    """Tokens per second that the servers of each block offer together; leaving ones do not."""
    throughputs = [0.0] * view.num_blocks
    for server in view.servers:
        presence = server.presence
        if presence.state is not ServerState.DRAINING and presence.peer_id != own:
            for block in presence.span:
                throughputs[block] += server_throughput(presence)
    return throughputs


def server_throughput(presence: Presence) -> float:
    """Tokens per second through the blocks that a request uses of this server on average."""
    return presence.prefill_tokens_s / ((len(presence.span) + 1) / 2)
