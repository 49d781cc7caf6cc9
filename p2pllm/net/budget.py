"""The process's memory for what peers send: one number that all connections share.

Two things take from it. *Windows*: what a connection has allowed its peer to send unasked. They
may take a quarter in all, so that many peers with large windows cannot keep messages out.
*Messages*: buffers for messages that are arriving or being worked on. Large ones leave an
eighth free, so that the small messages of a decode step still find room while bulk fills the rest.

Each connection's first windows (`mux.FIRST_WINDOW`) stand outside: 128 KiB × 512 at most.
"""

from p2pllm.errors import LocalProtocolError

SMALL_MESSAGE = 64 * 2**10


class MemoryBudget:
    """Counts bytes; never allocates."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.windows = 0
        self.messages = 0

    def reserve_window(self, num_bytes: int) -> bool:
        """Take `num_bytes` for a larger window, if windows' share allows."""
        if self.windows + num_bytes > self.limit // 4 or self._free < num_bytes:
            return False
        self.windows += num_bytes
        return True

    def release_window(self, num_bytes: int) -> None:
        """Give back what `reserve_window` took."""
        self.windows -= num_bytes
        self._check()

    def reserve_message(self, num_bytes: int) -> bool:
        """Take `num_bytes` for a message, if there are as many."""
        kept_free = 0 if num_bytes <= SMALL_MESSAGE else self.limit // 8
        if self._free - kept_free < num_bytes:
            return False
        self.messages += num_bytes
        return True

    def release_message(self, num_bytes: int) -> None:
        """Give back what `reserve_message` took."""
        self.messages -= num_bytes
        self._check()

    @property
    def _free(self) -> int:
        return self.limit - self.windows - self.messages

    def _check(self) -> None:
        if self.windows < 0 or self.messages < 0:
            raise LocalProtocolError("more memory was given back than taken")
