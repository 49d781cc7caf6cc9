"""p2pllm: run and fine-tune language models together, on a swarm of ordinary computers.

    async with p2pllm.connect(peers=["203.0.113.7:31337"]) as swarm:
        model = await swarm.model()
        async for piece in model.generate("The capital of France is", max_new_tokens=32):
            print(piece, end="", flush=True)

`p2pllm.sync` has the same calls without async. Importing this package is cheap: torch and the
transport are imported when something of them is first used.
"""

import os
from typing import TYPE_CHECKING

from p2pllm.version import __version__

__all__ = ["Swarm", "SwarmModel", "__version__", "connect"]

# OpenMP reads this when torch is loaded. By default its threads spin for milliseconds after each
# product: where several processes share the cores they then spin on the core that another one
# needs, and a step takes tens of times as long. Sleeping at once costs a wake-up per product, half
# of a decode step. This many turns last from one product of a step to the next, and no longer.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")

# oneDNN keeps code for every shape that it has met, half a MiB each, of up to 1024 shapes; batches
# have new ones for ever. So many are enough for those that come again, and a miss costs 1 ms.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
os.environ.setdefault("LRU_CACHE_CAPACITY", "128")

if TYPE_CHECKING:
    from p2pllm.client.client import Swarm, connect
    from p2pllm.client.model import SwarmModel

_LAZY = {
    "connect": "p2pllm.client.client",
    "Swarm": "p2pllm.client.client",
    "SwarmModel": "p2pllm.client.model",
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first asked for (PEP 562)."""
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module 'p2pllm' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(module), name)
