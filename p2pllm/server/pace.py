"""How long batches take here, and so how much of a prompt may go with one.

Tokens of other streams are late by the time that a piece of a prompt adds to a batch. A piece is
therefore cut so that its batch takes so many times as long as a batch of decode rows, as measured:
stall-free batching (Sarathi-Serve, arXiv 2403.02310), which finds its token budget by profiling
beforehand. Here it is found on the way, since it depends on the blocks, the machine, and what else
the machine does.

The model is a line: a batch takes what one of decode rows takes, and `token_s` for each token of
the piece. It does not hold where starting a batch is most of its cost, as on a GPU, whose decode
batches are recorded and replayed. There a whole chunk takes hardly longer than a small piece, and
is the right one: this is looked at first.

All times are per block, for sessions may use different stretches of a server's blocks. It reads no
clock, and does not know who waits: that is `p2pllm.server.scheduler`.
"""

from dataclasses import dataclass, field

from p2pllm.metrics import MovingAverage

# The smallest piece. Reading the weights costs as much as computing about as many tokens (15 blocks
# of the default model in bfloat16 on one core: 6 ms for 1 token, 10 ms for 16, 17 ms for 48): less
# in one go would cost nearly the same, and bring less.
LEAST_TOKENS = 16
LARGE = 0.5  # of a chunk: a piece so long is a sample of how long large ones take
NEARLY_FREE = 1.25  # times a small piece's batch: a large one for so much is taken
GROWTH = 2.0  # one batch that took no longer than decode rows alone doubles the piece at most
OUTLIER = 3.0  # times the mean: what a sample counts at most, be the machine stuck or not


@dataclass
class _Typical(MovingAverage):
    """A mean that single stalls move little; a lasting change it follows within some samples."""

    def add(self, sample: float) -> float:
        if self.value:
            sample = min(sample, OUTLIER * self.value)
        return super().add(sample)


@dataclass
class Pace:
    """What batches have taken lately. `on_batch` after each, `piece_tokens` before the next."""

    chunk_tokens: int
    _decode_s: _Typical = field(default_factory=_Typical)  # a batch of decode rows alone
    _token_s: _Typical = field(default_factory=_Typical)  # what a piece's token adds to it
    _small_s: _Typical = field(default_factory=_Typical)  # a batch with a piece that is not large
    _large_s: _Typical = field(default_factory=lambda: _Typical(weight=0.5))  # they are rare

    def on_batch(self, seconds: float, num_blocks: int, piece_tokens: int) -> None:
        """A batch with so many tokens of a prompt, or with decode rows alone, took `seconds`."""
        seconds /= num_blocks
        if not piece_tokens:
            self._decode_s.add(seconds)
            return
        (self._large_s if self._is_large(piece_tokens) else self._small_s).add(seconds)
        decode_s = self._decode_s.get(0.0)
        more_s = max(seconds - decode_s, decode_s / GROWTH)
        self._token_s.add(more_s / piece_tokens)

    @property
    def knows_decode(self) -> bool:
        """Has a batch of decode rows alone been seen?"""
        return self._decode_s.value is not None

    def decode_s(self, num_blocks: int) -> float:
        """What a batch of decode rows takes; 0 if none has been seen."""
        return self._decode_s.get(0.0) * num_blocks

    def least_s(self, num_blocks: int) -> float:
        """What a batch takes with the smallest piece."""
        token_s = self._token_s.get(0.0)
        return self.decode_s(num_blocks) + LEAST_TOKENS * token_s * num_blocks

    def piece_tokens(self, within_s: float, num_blocks: int, most: int) -> int:
        """How long a piece may be whose batch takes `within_s`: of `most` tokens at most.

        It is never shorter than LEAST_TOKENS, whatever they take.
        """
        if self._is_large(most) and self._is_large_free():
            return most
        token_s = self._token_s.get(0.0)
        spare_s = max(0.0, within_s / num_blocks - self._decode_s.get(0.0))
        if spare_s >= most * token_s:
            return most
        return min(most, max(LEAST_TOKENS, int(spare_s / token_s)))

    def slowdown(self, piece_factor: float) -> float:
        """How many times as long a prompt takes beside decode rows as alone.

        It goes in pieces whose batch takes `piece_factor` decode batches, each followed by a batch
        of decode rows alone; otherwise in whole chunks.
        """
        decode_s, token_s = self._decode_s.get(0.0), self._token_s.get(0.0)
        if not (decode_s and token_s):
            return 1.0
        piece = self.piece_tokens(piece_factor * decode_s, 1, self.chunk_tokens)
        if piece == self.chunk_tokens:
            return 1.0
        alone_s = decode_s / self.chunk_tokens + token_s
        return (2 * decode_s / piece + token_s) / alone_s

    def _is_large(self, num_tokens: int) -> bool:
        return num_tokens >= LARGE * self.chunk_tokens

    def _is_large_free(self) -> bool:
        """Does a large piece take hardly longer than a small one, or is that to be found out?"""
        small_s, large_s = self._small_s.value, self._large_s.value
        if large_s is None:
            return True
        return small_s is not None and large_s <= NEARLY_FREE * small_s
