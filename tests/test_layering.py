"""The import rules of docs/architecture.md, checked.

Two rules, both read off the source with `ast`, so nothing is imported:

1. A module imports only from packages on a *lower* line of LAYERS, or its own.
2. Only the modules named in IO may import the event loop, sockets, threads or the clock; only
   those named in TORCH may import torch. Everything else is pure.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent / "p2pllm"

# Lowest first. Packages on one line are siblings and may not import each other.
LAYERS = [
    {"errors", "version"},
    {"ids", "spans", "clock", "metrics"},
    {"addresses", "loops", "tasks"},
    {"config"},
    {"identity", "wire"},
    {"net", "model"},
    {"dht"},
    {"swarm"},
    {"routing"},
    {"server", "client"},
    {"gateway", "sim"},
    {"cli", "__init__", "sync"},
    {"__main__"},
]
IO = {
    "clock", "loops", "tasks", "net/tcp", "net/memory", "net/shaper", "net/endpoint", "net/rpc",
    "model/hub", "model/executor", "dht/node", "swarm/tracker", "swarm/node",
    "server/worker", "server/throughput", "server/handlers", "server/announcer", "server/server",
    "server/balancer", "server/serving",
    "server/admission", "server/outbox", "server/handover", "server/forwarding",
    "client/session", "client/exchange", "client/generate", "client/model", "client/compute",
    "client/moves", "client/recovery", "client/replacement", "client/routes", "client/client",
    "client/generation", "client/forwarding",
    "sync", "sim", "cli",
}  # fmt: skip
TORCH = {
    "model", "server/worker", "server/throughput", "server/forwarding", "sync",
    "client/compute", "client/generate", "client/generation", "client/model", "client/forwarding",
    "sim/fake_model", "cli/doctor",
}  # fmt: skip
PURE_BUT = {  # root module -> who may import it
    **dict.fromkeys(
        ["asyncio", "concurrent", "socket", "ssl", "threading", "time", "subprocess", "select"], IO
    ),
    "torch": TORCH,
    "multiprocessing": set[str](),
}


def rank(package: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if package in layer)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) for every import in the file, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write imports in full"
            if node.module == "p2pllm":
                yield from ((node.lineno, f"p2pllm.{alias.name}") for alias in node.names)
            elif node.module:
                yield node.lineno, node.module


def violations(root: Path = ROOT) -> Iterator[str]:
    for path in sorted(root.rglob("*.py")):
        module = path.relative_to(root).with_suffix("").as_posix()
        package = module.split("/")[0]
        for line, name in imports(path):
            top, _, rest = name.partition(".")
            if top == "p2pllm" and rest:
                target = rest.split(".")[0]
                if target != package and rank(target) >= rank(package):
                    yield f"{path}:{line}: {package} may not import {target}"
            elif top in PURE_BUT and not {module, package} & PURE_BUT[top]:
                yield f"{path}:{line}: {module} is pure and may not import {top}"


def test_imports_go_downwards_and_pure_modules_stay_pure() -> None:
    assert list(violations()) == []


def test_a_violation_is_seen(tmp_path: Path) -> None:
    (tmp_path / "wire").mkdir()
    (tmp_path / "wire" / "bad.py").write_text("import asyncio\nfrom p2pllm.client import session\n")
    assert len(list(violations(tmp_path))) == 2
