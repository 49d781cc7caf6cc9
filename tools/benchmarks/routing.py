"""What the router predicts, and what it then takes, on five shaped swarms in virtual time.

For each topology of p2pllm/sim/topologies.py: a client plans and generates twice, then every chain
is tried by a client of its own. The table goes to stderr; "first" knows announcements and its own
pings only, "then" has learned from its first generation. Virtual time: the figures are the same on
every computer.
"""

import argparse
import statistics
import sys
from typing import Any

QUICK = {"topology": ["LAN"]}
HEAD = (
    "| topology | chain | | TTFT predicted | measured | | TPOT predicted | measured | | "
    "best chain | chosen / best |\n"
    "|---|---|---|--:|--:|--:|--:|--:|--:|---|--:|"
)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--topology", action="append", help="only this one; may be repeated")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from p2pllm.sim.loop import run as run_virtually
    from p2pllm.sim.topologies import TOPOLOGIES, examine

    chosen = [t for t in TOPOLOGIES if not args.topology or t.name in args.topology]
    print(HEAD, file=sys.stderr)
    found = {}
    for topology in chosen:
        report = run_virtually(examine(topology))
        for line in _rows(report):
            print(line, file=sys.stderr, flush=True)
        found[topology.name] = _as_object(report)
    return found


def _rows(report: Any) -> list[str]:
    best = f"{'-'.join(report.best.chain)} | {1 + report.regret:.3f}"
    return [
        f"| {report.topology} | {_row(report.first)} | first | {_times(report.first)} | | |",
        f"| | {_row(report.second)} | then | {_times(report.second)} | {best} |",
    ]


def _row(run: Any) -> str:
    return "-".join(run.chain)


def _times(run: Any) -> str:
    cost = run.predicted
    return (
        f"{cost.ttft_s * 1e3:.0f} ms | {run.ttft_s * 1e3:.0f} ms | {run.ttft_error:+.1%} | "
        f"{cost.tpot_s * 1e3:.1f} ms | {run.tpot_s * 1e3:.1f} ms | {run.tpot_error:+.1%}"
    )


def _as_object(report: Any) -> dict[str, Any]:
    errors = [abs(e) for run in report.tried for e in (run.ttft_error, run.tpot_error)]
    return {
        "first": _run_as_object(report.first),
        "then": _run_as_object(report.second),
        "best": _run_as_object(report.best),
        "chosen_to_best": round(1 + report.regret, 4),
        "all_chains": {
            "median_error": round(statistics.median(errors), 4),
            "largest_error": round(max(errors), 4),
            "runs": [_run_as_object(run) for run in report.tried],
        },
    }


def _run_as_object(run: Any) -> dict[str, Any]:
    return {
        "chain": "-".join(run.chain),
        "ttft_ms": {"predicted": _ms(run.predicted.ttft_s), "measured": _ms(run.ttft_s)},
        "tpot_ms": {"predicted": _ms(run.predicted.tpot_s), "measured": _ms(run.tpot_s)},
        "total_s": round(run.total_s, 4),
    }


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 2)
