"""TCP links: the operating system's network behind the `Network` and `Link` protocols.

Three things differ from a plain asyncio server:

- Outgoing connections leave from the listening port where the system allows it, because hole
  punching later needs a NAT to show the same outside port for both. Every such option is asked
  for and never required: a system without it gets an ephemeral port.
- Little is kept in buffers that cannot be overtaken. `can_write` is False as soon as one byte
  waits in user space, and TCP_NOTSENT_LOWAT keeps the kernel from taking more than it sends.
- Bytes are received into one large buffer and handed on as a view, without a copy.

Works alike on asyncio's own loop and on uvloop. Not here: racing several addresses, limits and
deadlines (`p2pllm.net.endpoint`), and punching.
"""

import asyncio
import errno
import logging
import os
import socket
from collections.abc import Callable
from typing import cast

from p2pllm.errors import PeerUnreachable, TransportError
from p2pllm.net.link import Buffer, Link, LinkKind, LinkUser, Listener

logger = logging.getLogger(__name__)

# Received in one go. A view of it is handed on; over loopback, 256 KiB moved 10 to 30 % more bytes
# per CPU second than 64 KiB.
RECEIVE_BYTES = 256 * 2**10
# Bytes that the kernel takes before it sends them: one frame, so that a decode step finds at most
# this ahead of it on a full line. Over loopback 16 KiB was as fast as 128 KiB.
NOTSENT_LOWAT_BYTES = 16 * 2**10
BACKLOG = 128  # connections that the kernel keeps for us; the endpoint accepts at once

_IS_WINDOWS = os.name == "nt"

# A family and an address as `bind` and `connect` take it; its form is the family's own business.
_SocketAddress = tuple[socket.AddressFamily, tuple[str | int | bytes, ...]]


class TcpNetwork:
    """The operating system's TCP; keeps the contract of `p2pllm.net.link.Network`."""

    def __init__(self) -> None:
        # Loops on POSIX fill the buffer and hand it over in one go, so all links share one;
        # Windows' proactor fills it in the background.
        self._shared_buffer = memoryview(bytearray(RECEIVE_BYTES))

    async def listen(self, host: str, port: int, on_link: Callable[[Link], None]) -> Listener:
        """Accept links at `host` ("::" means both families) and `port` (0: any free one)."""
        loop = asyncio.get_running_loop()
        # "localhost" is both 127.0.0.1 and ::1 in many places; we listen at one address: IPv4's.
        where = min(await _resolve(host, port), key=lambda item: item[0] != socket.AF_INET)
        try:
            if port:
                _probe(where)
            sock = _listening_socket(where)
        except OSError as exc:
            raise TransportError(_why_not_listening(host, port, exc)) from exc
        server = await loop.create_server(
            lambda: TcpLink(self._buffer(), on_link), sock=sock, backlog=BACKLOG
        )
        return Listener(host, sock.getsockname()[1], server.close)

    async def dial(self, host: str, port: int, *, local_port: int = 0) -> Link:
        """Open a link to the first address of `host` that answers; PeerUnreachable says why not."""
        failure = "no such host"
        for where in await _resolve(host, port):
            try:
                return await _connect(where, local_port, self._buffer())
            except OSError as exc:
                failure = _why(exc)
        raise PeerUnreachable(f"{host} port {port}: {failure}")

    def _buffer(self) -> memoryview:
        return memoryview(bytearray(RECEIVE_BYTES)) if _IS_WINDOWS else self._shared_buffer


class TcpLink(asyncio.BufferedProtocol):
    """One TCP connection; keeps the contract of `p2pllm.net.link.Link`."""

    kind = LinkKind.TCP

    def __init__(self, buffer: memoryview, on_link: Callable[[Link], None] | None = None) -> None:
        self.local: tuple[str, int] | None = None
        self.remote: tuple[str, int] | None = None
        self._on_link = on_link
        self._transport: asyncio.Transport
        self._user: LinkUser | None = None
        self._buffer = buffer
        self._early = b""  # received before `start`; at most one buffer
        self._can_write = True
        self._is_started = False
        self._is_paused = False
        self._is_closing = False  # nothing more is written
        self._is_lost = False  # the transport is gone
        self._close_reason = ""

    # --- Link ----------------------------------------------------------------------------------

    def start(self, user: LinkUser) -> None:
        self._user = user
        asyncio.get_running_loop().call_soon(self._begin, user)

    def _begin(self, user: LinkUser) -> None:
        self._is_started = True
        if self._early:
            user.link_received(self._early)
            self._early = b""
        if self._is_lost:
            user.link_closed(self._close_reason)
        elif not self._is_paused:
            self.resume_reading()

    @property
    def can_write(self) -> bool:
        return self._can_write and not self._is_closing

    def write(self, data: Buffer) -> None:
        if not self._is_closing:
            self._transport.write(data)

    def pause_reading(self) -> None:
        self._is_paused = True
        if not self._is_closing:
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        self._is_paused = False
        if not self._is_closing:
            self._transport.resume_reading()

    def close(self) -> None:
        self._end("closed")
        if not self._is_lost:
            self._transport.close()

    def abort(self) -> None:
        self._end("aborted")
        if not self._is_lost:
            self._transport.abort()

    # --- asyncio's callbacks -------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's has no such base class
        self.local = _host_port(transport.get_extra_info("sockname"))
        self.remote = _host_port(transport.get_extra_info("peername"))
        self._transport.set_write_buffer_limits(high=0)
        self._transport.pause_reading()  # until `start`
        if self._on_link is not None:
            self._on_link(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self._user is None:  # uvloop begins to read whatever `connection_made` says
            self._early += bytes(self._buffer[:nbytes])
            self._transport.pause_reading()
        else:
            self._user.link_received(self._buffer[:nbytes])

    def pause_writing(self) -> None:
        self._can_write = False

    def resume_writing(self) -> None:
        self._can_write = True
        if self._user is not None and not self._is_closing:
            self._user.link_writable()

    def eof_received(self) -> None:
        self._end("closed by the peer")  # links are not closed by halves: the transport follows

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(_why(exc) if isinstance(exc, OSError) else str(exc or "closed"))
        self._is_lost = True
        if self._user is not None and self._is_started:
            self._user.link_closed(self._close_reason)

    def _end(self, reason: str) -> None:
        self._is_closing = True
        self._close_reason = self._close_reason or reason


# --- sockets ---------------------------------------------------------------------------------


async def _connect(where: _SocketAddress, local_port: int, buffer: memoryview) -> TcpLink:
    """Connect from `local_port`, or from any port where that one cannot be used."""
    if local_port:
        try:
            return await _connect_from(where, local_port, buffer)
        except OSError as exc:
            # The port is taken without sharing, or this pair of addresses is connected already.
            if exc.errno not in (errno.EADDRNOTAVAIL, errno.EADDRINUSE, errno.EACCES):
                raise
            logger.debug("dial from the listening port failed port=%d error=%s", local_port, exc)
    return await _connect_from(where, 0, buffer)


async def _connect_from(where: _SocketAddress, local_port: int, buffer: memoryview) -> TcpLink:
    loop = asyncio.get_running_loop()
    family, address = where
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        _tune(sock)
        if local_port:
            _share_port(sock)
            sock.bind(("::" if family == socket.AF_INET6 else "0.0.0.0", local_port))
        await loop.sock_connect(sock, address)
        _, link = await loop.create_connection(lambda: TcpLink(buffer), sock=sock)
    except BaseException:  # also when cancelled by the caller's deadline
        sock.close()
        raise
    return link


def _listening_socket(where: _SocketAddress) -> socket.socket:
    family, address = where
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        _tune(sock)  # accepted sockets inherit it
        _share_port(sock)
        if family == socket.AF_INET6:
            _set(sock, socket.IPPROTO_IPV6, "IPV6_V6ONLY", 0)
        sock.bind(address)
    except BaseException:
        sock.close()
        raise
    return sock


def _probe(where: _SocketAddress) -> None:
    """Raise OSError if somebody listens at `address`.

    SO_REUSEPORT, which dialling from the listening port needs, would let two nodes listen on one
    port, each getting half of the connections. Without it the system says no.
    """
    family, address = where
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        if not _IS_WINDOWS:
            _set(sock, socket.SOL_SOCKET, "SO_REUSEADDR", 1)
        sock.bind(address)


def _tune(sock: socket.socket) -> None:
    _set(sock, socket.IPPROTO_TCP, "TCP_NODELAY", 1)
    _set(sock, socket.IPPROTO_TCP, "TCP_NOTSENT_LOWAT", NOTSENT_LOWAT_BYTES)


def _share_port(sock: socket.socket) -> None:
    if not _IS_WINDOWS:  # there SO_REUSEADDR means that anyone may take the port over
        _set(sock, socket.SOL_SOCKET, "SO_REUSEADDR", 1)
        _set(sock, socket.SOL_SOCKET, "SO_REUSEPORT", 1)


def _set(sock: socket.socket, level: int, option: str, value: int) -> None:
    """Set an option if this system has it and allows it; a link works without any of them."""
    number = getattr(socket, option, None)
    if number is None:
        return
    try:
        sock.setsockopt(level, number, value)
    except OSError as exc:
        logger.debug("socket option refused option=%s error=%s", option, exc)


# --- addresses and words ---------------------------------------------------------------------


async def _resolve(host: str, port: int) -> list[_SocketAddress]:
    """The addresses of `host` in the system's order; literals are read without asking anyone."""
    kind = socket.SOCK_STREAM
    try:
        try:
            found = socket.getaddrinfo(host, port, type=kind, flags=socket.AI_NUMERICHOST)
        except socket.gaierror:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=kind)
    except (OSError, ValueError) as exc:  # ValueError: not even the form of a name
        raise PeerUnreachable(f"no such host: {host!r}") from exc
    return [(family, address) for family, _, _, _, address in found]


def _host_port(name: object) -> tuple[str, int] | None:
    """(host, port) of a socket's name; IPv4 inside IPv6 is shown as IPv4."""
    if not isinstance(name, tuple) or len(name) < 2:
        return None
    return str(name[0]).removeprefix("::ffff:"), int(name[1])


def _why(exc: OSError) -> str:
    """What happened, in words for a person."""
    match exc.errno:
        case errno.ECONNREFUSED:
            return "connection refused (nothing listens there)"
        case errno.ETIMEDOUT:
            return "no answer"
        case errno.ENETUNREACH | errno.EHOSTUNREACH:
            return "no route to this address from here"
        case errno.ECONNRESET | errno.EPIPE:
            return "reset by the peer"
        case errno.EMFILE | errno.ENFILE:
            return "too many open files (raise the limit with `ulimit -n`)"
    return os.strerror(exc.errno) if exc.errno else str(exc)


def _why_not_listening(host: str, port: int, exc: OSError) -> str:
    match exc.errno:
        case errno.EADDRINUSE:
            return (
                f"port {port} is in use on {host}; stop the other program, "
                f"or choose another port (0 takes any free one)"
            )
        case errno.EACCES:
            return f"no permission to listen on port {port}; ports above 1023 need none"
        case errno.EADDRNOTAVAIL:
            return f"{host} is not an address of this computer; 0.0.0.0 listens on all of them"
    return f"cannot listen on {host} port {port}: {_why(exc)}"
