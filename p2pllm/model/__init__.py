"""Models: where they come from, their blocks in torch, and what a client computes itself."""
