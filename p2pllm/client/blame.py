"""Who is to blame for a failed step: what the client does about it follows from that. Pure.

A hop that dies takes others' messages with it, so what arrives is often somebody else's view, and
may be a lie about a rival. So nobody is *lost*, which is penalised, by what others say. The rules,
by what came:

    our connection to a hop was lost          it is *doubted*: it is asked whether it is there
    a hop could not pass a step on            the next one is doubted; if it is there for us, the
                                              link between the two is broken, and we relay it
    no answer within the step's deadline      the same, for the hop that the step has come to and
                                              the one before it: either may be to blame
    a replacement does not get ready in time  it is *moved*: others are tried first, no penalty
    a hop says that the next one refuses      the next one is *behind* if that is what it says,
                                              else doubted
    a hop has lost the session or its place   it is behind: its cache is built again
    a hop answers nonsense or breaks down     it is lost: others do its part
    a hop speaks of one it does not push to   it is lost, too
    a hop finds its input wrong (NaN)         it is lost if we have seen that input, and it is good;
                                              else it or the one before lies, and both are moved
    a hop has no room                         others do its part, and it has not failed
    epoch or token do not fit                 it is doubted; all hops are told again

Someone who is doubted or behind again, before a step went through, is moved.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from p2pllm.errors import (
    Busy,
    CacheFull,
    DeadlineExceeded,
    Forbidden,
    OpenFailed,
    OutOfOrder,
    P2PLLMError,
    RequestFailed,
    SessionUnknown,
    StaleEpoch,
    StepFailed,
    TransportError,
)
from p2pllm.ids import PeerId


@dataclass
class Blame:
    """What a failure says about peers."""

    lost: set[PeerId] = field(default_factory=set)  # have failed, and are penalised
    moved: set[PeerId] = field(default_factory=set)  # others do their part, without a penalty
    doubted: set[PeerId] = field(default_factory=set)
    behind: set[PeerId] = field(default_factory=set)
    full: dict[PeerId, float] = field(default_factory=dict)  # no room for us for so many seconds
    links: set[tuple[PeerId, PeerId]] = field(default_factory=set)  # broken if both ends are there
    has_stale_epoch: bool = False


def blame(failure: P2PLLMError, hops: Sequence[PeerId], reached: int = 0) -> Blame:
    """Who failed; `reached`: the latest hop whose input of the step we have, and found good."""
    found = Blame()
    if isinstance(failure, StepFailed):
        _blame_step(found, failure, hops, reached)
    elif isinstance(failure, OpenFailed):
        for peer, exc in failure.failures.items():
            _blame_peer(found, peer, exc)
    elif isinstance(failure, DeadlineExceeded):
        _doubt(found, hops, reached)
    return found


def _blame_step(found: Blame, failure: StepFailed, hops: Sequence[PeerId], reached: int) -> None:
    peer, cause, next_hop = failure.peer, failure.cause, failure.next_hop
    accuser = peer if next_hop is None else next_hop
    if next_hop is not None and (peer, next_hop) not in pairwise(hops):
        found.lost.add(peer)
    elif failure.is_input and accuser in hops[1:]:
        index = hops.index(accuser)
        if next_hop is None and index <= reached:
            found.lost.add(accuser)
        else:
            found.moved.update(hops[index - 1 : index + 1])
    elif peer not in hops and isinstance(cause, DeadlineExceeded):
        found.moved.add(peer)
    elif next_hop is None:
        _blame_peer(found, peer, cause)
    elif isinstance(cause, SessionUnknown | OutOfOrder):
        found.behind.add(next_hop)
    elif type(cause) is RequestFailed:  # the link's fault, says the one before it
        _doubt(found, hops, hops.index(next_hop))
    else:
        found.doubted.add(next_hop)


def _doubt(found: Blame, hops: Sequence[PeerId], index: int) -> None:
    """A hop does not answer, or is not reached."""
    found.doubted.add(hops[index])
    if index:
        found.links.add((hops[index - 1], hops[index]))


def _blame_peer(found: Blame, peer: PeerId, cause: P2PLLMError) -> None:
    """What a peer itself has said, or not said."""
    if isinstance(cause, TransportError):
        found.doubted.add(peer)
    elif isinstance(cause, SessionUnknown | OutOfOrder):
        found.behind.add(peer)
    elif isinstance(cause, CacheFull | Busy):
        found.full[peer] = cause.retry_after_s
    elif isinstance(cause, StaleEpoch | Forbidden):
        found.doubted.add(peer)
        found.has_stale_epoch |= isinstance(cause, StaleEpoch)
    else:
        found.lost.add(peer)
