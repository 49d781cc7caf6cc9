"""p2pllm: run and fine-tune language models together, on a swarm of ordinary computers."""

__version__ = "0.1.0"
