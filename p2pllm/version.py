"""The version of the package; of the protocol see `p2pllm.net.handshake`."""

__version__ = "0.1.0"
