"""Bytes and messages: what travels, without keys, sockets or tensors' meaning."""
