"""Serving a span of blocks to anyone who asks."""
