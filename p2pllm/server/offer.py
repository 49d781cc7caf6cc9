"""What a server serves, and whom: what is asked of every request for its blocks. Pure."""

from dataclasses import dataclass

from p2pllm.config import ServerConfig
from p2pllm.errors import Forbidden, NotServed
from p2pllm.ids import ModelId, PeerId
from p2pllm.spans import Span
from p2pllm.wire.messages import Numerics


@dataclass(frozen=True, slots=True)
class Offer:
    """What this server serves."""

    model: ModelId
    numerics: Numerics
    span: Span
    hidden_size: int

    def check(self, model: ModelId, numerics: Numerics, span: Span) -> None:
        """Raise NotServed unless these blocks are here, and computed in this way."""
        if model != self.model:
            raise NotServed(f"this server holds {self.model}, not {model}")
        if not self.span.covers(span):
            raise NotServed(f"this server holds blocks {self.span}, not {span}")
        if numerics != self.numerics:
            raise NotServed(f"this server computes in {self.numerics}")


def check_peer(peer: PeerId, config: ServerConfig) -> None:
    """Raise Forbidden if the server's lists keep this peer out."""
    name = str(peer)
    if name in config.block or (config.allow and name not in config.allow):
        raise Forbidden("this server does not serve you")
