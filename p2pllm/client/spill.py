"""Where journals go when they outgrow the memory allowed for them: a temporary file.

Ranges of the file are handed out first fit and taken back when their rows are forgotten, so the
file is as long as what was ever in it at once, and shrinks when its end becomes free. It has no
name (it is gone when the process is, however that ends) and only its owner may read it: it holds
hidden states, from which a prompt can be guessed. `TMPDIR` says on which disk it lies.

Writes go to the page cache, a piece of 1 MiB in well under a millisecond, so they are done in place
rather than in a thread.
"""

import logging
import tempfile
from bisect import bisect_left

from p2pllm.errors import LocalProtocolError, SessionLost

logger = logging.getLogger(__name__)


class SpillFile:
    """Byte ranges in an unnamed temporary file."""

    def __init__(self) -> None:
        """Create the file.  Raises SessionLost if that cannot be."""
        try:
            # Unbuffered: whatever cannot be written must be known before the bytes are let go.
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (closed by `close`)
        except OSError as exc:
            raise SessionLost(f"no file for journals in the temporary directory: {exc}") from exc
        self._end = 0  # bytes from here on have not been handed out
        self._free: list[tuple[int, int]] = []  # (start, stop), sorted, never touching
        logger.info("spill opened directory=%s", tempfile.gettempdir())

    @property
    def num_bytes(self) -> int:
        """Length of the file."""
        return self._end

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Keep `data`; returns its offset.  Raises SessionLost if the disk is full."""
        offset = self._take(len(data))
        try:
            self._file.seek(offset)
            with memoryview(data) as view:
                done = 0
                while done < len(view):  # a raw file may write less than it is asked to
                    done += self._file.write(view[done:])
        except OSError as exc:
            self.free(offset, len(data))
            raise SessionLost(
                f"no room for journals in {tempfile.gettempdir()}: {exc}; free some, let TMPDIR "
                "name another directory, or allow journals more memory"
            ) from exc
        return offset

    def read(self, offset: int, length: int) -> bytes:
        """Bytes [offset, offset + length).  Raises SessionLost if they cannot be read."""
        if not 0 <= offset <= offset + length <= self._end:
            raise LocalProtocolError(f"{length} bytes at {offset} of a file of {self._end}")
        data = bytearray()
        try:
            self._file.seek(offset)
            while len(data) < length:
                piece = self._file.read(length - len(data))
                if not piece:
                    raise SessionLost("the file of the journals has become shorter")
                data += piece
        except OSError as exc:
            raise SessionLost(f"the file of the journals cannot be read: {exc}") from exc
        return bytes(data)

    def free(self, offset: int, length: int) -> None:
        """Forget bytes [offset, offset + length), all of or part of what was written."""
        if length == 0:
            return
        start, stop = offset, offset + length
        at = bisect_left(self._free, (start, stop))
        if (
            not 0 <= start < stop <= self._end
            or (at > 0 and self._free[at - 1][1] > start)
            or (at < len(self._free) and self._free[at][0] < stop)
        ):
            raise LocalProtocolError(f"{length} bytes at {offset} are not in use")
        if at < len(self._free) and self._free[at][0] == stop:
            stop = self._free.pop(at)[1]
        if at > 0 and self._free[at - 1][1] == start:
            at -= 1
            start = self._free.pop(at)[0]
        if stop == self._end:
            self._end = start
            self._file.truncate(start)
        else:
            self._free.insert(at, (start, stop))

    def close(self) -> None:
        """Give the disk space back."""
        self._file.close()

    def _take(self, length: int) -> int:
        """A range of this length: the first hole that is large enough, or the end of the file."""
        for at, (start, stop) in enumerate(self._free):
            if stop - start >= length:
                if stop - start == length:
                    del self._free[at]
                else:
                    self._free[at] = (start + length, stop)
                return start
        self._end += length
        return self._end - length
