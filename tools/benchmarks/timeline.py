"""Where one token's time goes, station by station, from the client's socket back to it.

One stream through servers on loopback, every process noting when a token passes which station
(`_traced`). The table has the median time from one station to the next, over all tokens but the
first ones.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks import _lab
from benchmarks._program import Program, running
from benchmarks._setups import ClientSetup, ServerSetup
from benchmarks._way import Note, rounds_of, way_of

QUICK = {"tokens": 16, "identity": True}
SKIPPED = 8  # tokens until everything is warm


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--prompt-tokens", type=int, default=5)
    parser.add_argument("--identity", action="store_true", help="blocks that do nothing")
    parser.add_argument("--weights", choices=_lab.WEIGHTS, default="bfloat16")
    _lab.add_swarm(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        with _swarm(args, Path(directory)) as client:
            _lab.warm_up([client], 1, args.prompt_tokens)
            sizes = {"prompt_tokens": args.prompt_tokens, "tokens": args.tokens}
            (request,) = _lab.closed_loop([client], 1, **sizes, seed=0)
            _lab.check([request])
        lines = "".join(path.read_text() for path in Path(directory).iterdir()).splitlines()
    notes = sorted(Note(*json.loads(line)) for line in lines)
    began = request.tokens[SKIPPED]
    tokens = rounds_of([note for note in notes if note.moment >= began])
    return {
        "weights": "identity" if args.identity else args.weights,
        "loop": args.loop,
        "tokens": len(tokens),
        "ms_per_token": round(1e3 * request.tpot_s, 3),
        "way": way_of(tokens, args.hops),
    }


@contextmanager
def _swarm(args: argparse.Namespace, directory: Path) -> Iterator[Program]:
    """Traced servers, and the client."""
    dtype = _lab.dtype_beside(args.weights)
    with ExitStack() as stack:
        servers: list[Program] = []

        def start(role: str, name: str, setup: ServerSetup | ClientSetup) -> Program:
            path = str(directory / name)
            order = {"role": role, "name": name, "path": path, "setup": setup.to_json()}
            return stack.enter_context(running("_traced", order))

        for number, span in enumerate(_lab.spans(args.hops), 1):
            peers = _lab.addresses(servers)
            weights = dtype if args.identity else args.weights
            setup = ServerSetup(span, weights, args.identity, peers, args.loop)
            servers.append(start("_server", f"server {number}", setup))
        yield start("_client", "client", ClientSetup(_lab.addresses(servers), dtype, args.loop))
