"""Settings: frozen, small, composed. Every number has its unit in the name and its reason here.

A config is passed whole, never taken apart into keyword arguments. Defaults are right for a
home computer in a public swarm; tests and labs replace single fields (`dataclasses.replace`).
Flags, environment and file are read by `p2pllm.cli`, which builds these.
"""

from dataclasses import dataclass, field

from p2pllm.addresses import Address
from p2pllm.errors import ConfigError

DEFAULT_NETWORK = "main"
DEFAULT_PORT = 31337


@dataclass(frozen=True, slots=True)
class ShaperConfig:
    """An artificial link: how wide-area networks are reproduced on one machine."""

    delay_s: float = 0.0  # one way
    bandwidth_bytes_s: float = float("inf")
    jitter_s: float = 0.0  # up to this much more, never reordering

    @property
    def is_active(self) -> bool:
        """Does it change anything?"""
        return self != ShaperConfig()


@dataclass(frozen=True, slots=True)
class NetConfig:
    """The transport of one node."""

    network_id: str = DEFAULT_NETWORK  # peers of other networks are refused in the handshake
    listen_host: str = "0.0.0.0"
    listen_port: int = DEFAULT_PORT  # 0: any free port
    announce: tuple[Address, ...] = ()  # what to tell others instead of what we observe
    is_listening: bool = True  # clients need no port of their own
    shaper: ShaperConfig = ShaperConfig()

    max_connections: int = 512
    max_handshakes: int = 64  # half open, in all
    max_handshakes_per_host: int = 8
    handshake_timeout_s: float = 5.0
    dial_timeout_s: float = 5.0
    dial_stagger_s: float = 0.25  # head start of each address (RFC 8305 §8)
    signature_checks_per_host_s: float = 50.0  # handshakes' checks; 150 µs each
    idle_close_s: float = 300.0

    frame_bytes: int = 16 * 2**10  # what a decode step may have to wait behind
    large_frame_bytes: int = 65_000  # a Noise message ends at 65,535 bytes, tag included
    connection_window_bytes: int = 16 * 2**20
    process_memory_bytes: int = 512 * 2**20  # received and not yet consumed, all connections
    max_message_bytes: int = 256 * 2**20
    max_streams: int = 256  # open at once per connection, opened by the peer

    heartbeat_s: float = 5.0  # on an idle connection
    ping_after_silence_s: float = 1.0  # while requests are pending
    suspect_min_s: float = 1.0  # without any byte after a ping; or 4 × RTT
    dead_s: float = 15.0


@dataclass(frozen=True, slots=True)
class DhtConfig:
    """Kademlia's constants (Maymounkov & Mazières 2002) and ours."""

    k: int = 20  # bucket size and number of closest nodes
    alpha: int = 10  # parallel queries of an interactive lookup: 3 rounds at 1,000 nodes
    alpha_maintenance: int = 3
    beta: int = 3  # answers from the closest peers that end the reading of one slot
    replicas: int = 8
    record_ttl_s: float = 120.0
    republish_s: float = 40.0  # ± republish_jitter: two of three may be lost
    republish_jitter: float = 0.2
    max_ttl_s: float = 600.0  # longer lifetimes are cut to this
    max_skew_s: float = 60.0  # clocks may differ by this much
    max_subkeys_per_key: int = 1000
    max_records: int = 50_000
    max_bytes_per_writer: int = 64 * 2**10
    max_bytes_per_group: int = 4 * 2**20  # per /16 (IPv4) or /48 (IPv6) of the writer's address
    page_bytes: int = 16 * 2**10  # of a reply
    rpc_timeout_min_s: float = 0.3
    rpc_timeout_max_s: float = 2.0
    max_per_group_in_bucket: int = 2  # 0: no limit (LAN, tests)
    max_per_group_in_table: int = 3
    refresh_bucket_s: float = 900.0
    refresh_self_s: float = 600.0
    is_client: bool = False  # asks, and is never asked: peers that cannot be dialled


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """What a server offers, and how much of itself it gives."""

    dtype: str = "auto"  # float32 on CPU without fast bfloat16, else bfloat16
    quantize: str = "none"  # how blocks' matrices are held: none, int8, int4
    kv_bits: int = 16  # of cached keys and values: 16 is the compute type's own, or 8
    device: str = "auto"  # several with commas between, or "all": parts of the span on each
    load: str = "checkpoint"  # or "dummy": random weights of the model's shape, to measure with
    cache_tokens: int = 16_384  # tokens in the K/V cache, over all sessions: 8 of 2048 each
    max_sessions: int = 256
    max_tokens_per_session: int = 8192
    max_tokens_per_peer: int = 0  # 0: a quarter of cache_tokens while others wait
    lease_s: float = 60.0  # a session unused for so long may be dropped
    prefill_chunk_tokens: int = 256  # less while others decode
    batch_tokens: int = 512  # tokens computed in one go
    max_queue_steps: int = 1024
    max_forward_tokens: int = 8192  # of one request without a session (training, scoring)
    public_name: str = ""
    allow: frozenset[str] = frozenset()  # PeerIds; empty: everyone
    block: frozenset[str] = frozenset()
    throughput: float = 0.0  # tokens × blocks per second; 0: measure
    is_balanced: bool = True  # moves to blocks that the swarm needs more, if it chose its own


@dataclass(frozen=True, slots=True)
class ClientConfig:
    """How a client uses the swarm."""

    dtype: str = "auto"
    device: str = "auto"  # of embedding and head; auto is the CPU, where a GPU may serve blocks
    load: str = "checkpoint"  # or "dummy", as servers do
    wire_codec: str = "auto"  # raw, bf16, int8, auto
    view_refresh_s: float = 15.0  # half of it at most in age when a route is planned
    is_chained: bool = True  # servers push to each other; else all goes through the client
    is_prefix_shared: bool = True  # sequences that begin alike are computed once
    prefill_chunk_tokens: int = 256
    micro_batch_tokens: int = 512  # of a batch without sessions, sent together
    open_timeout_s: float = 10.0
    step_timeout_s: float = 60.0
    patience_s: float = 60.0  # for free cache or a missing block to appear
    journal_bytes: int = 512 * 2**20  # of hop inputs in memory; older ones go to a temporary file
    max_pings: int = 16  # servers measured before a route is planned
    allowed_servers: frozenset[str] = frozenset()
    blocked_servers: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """Everything a node needs to take part."""

    net: NetConfig = NetConfig()
    dht: DhtConfig = DhtConfig()
    peers: tuple[Address, ...] = ()  # members of the swarm to begin with
    table_path: str = ""  # where the routing table is kept between runs; empty: nowhere
    server: ServerConfig = field(default_factory=ServerConfig)
    client: ClientConfig = field(default_factory=ClientConfig)


def device_names(text: str) -> tuple[str, ...]:
    """The devices that "cuda:0,cuda:1" names; raises ConfigError for an empty name."""
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise ConfigError(f"not a list of devices: {text!r}; write for example cuda:0,cuda:1")
    return names
