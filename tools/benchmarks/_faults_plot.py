"""The figure of `tools/bench faults` as SVG: steps per second over the rate of failures.

One panel per text length, a logarithmic axis, one line per method. A method that did not finish
has a cross at the bottom.
"""

import math
from collections.abc import Sequence

PANEL_WIDTH, PANEL_HEIGHT = 300, 250
LEFT, TOP, BETWEEN, BOTTOM = 56, 44, 40, 70
COLOURS = ("#0b6e99", "#d9730d", "#787774")
INK, GRID = "#37352f", "#e3e2e0"
SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
    'font-family="sans-serif" font-size="12" fill="{ink}">'
)

Speeds = dict[str, dict[str, list[float | None]]]  # by length and method, in the order of rates


def draw(rates: Sequence[float], speeds: Speeds) -> str:
    """The whole figure."""
    width = LEFT + len(speeds) * (PANEL_WIDTH + BETWEEN)
    height = TOP + PANEL_HEIGHT + BOTTOM
    known = [s for methods in speeds.values() for line in methods.values() for s in line if s]
    low = math.floor(math.log10(min(known)))
    high = math.ceil(math.log10(max(known)))
    parts = [
        SVG.format(width=width, height=height, ink=INK),
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for number, (length, methods) in enumerate(speeds.items()):
        left = LEFT + number * (PANEL_WIDTH + BETWEEN)
        parts += _frame(left, f"{length} tokens", rates, low, high)
        for colour, line in zip(COLOURS, methods.values(), strict=True):
            parts += _line(left, line, colour, low, high)
    parts += _legend(list(next(iter(speeds.values()))), height)
    label = f"translate(16 {TOP + PANEL_HEIGHT / 2:.0f}) rotate(-90)"
    parts.append(f'<text transform="{label}" text-anchor="middle">steps per second</text>')
    return "\n".join([*parts, "</svg>", ""])


def _frame(left: float, title: str, rates: Sequence[float], low: int, high: int) -> list[str]:
    bottom, middle = TOP + PANEL_HEIGHT, left + PANEL_WIDTH / 2
    parts = [f'<text x="{middle:.0f}" y="{TOP - 14}" text-anchor="middle">{title}</text>']
    for power in range(low, high + 1):
        y = _y(10.0**power, low, high)
        parts.append(
            f'<line x1="{left}" x2="{left + PANEL_WIDTH}" y1="{y:.1f}" y2="{y:.1f}" '
            f'stroke="{GRID}"/>'
        )
        parts.append(
            f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{10.0**power:g}</text>'
        )
    for index, rate in enumerate(rates):
        x = _x(left, index, len(rates))
        parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{rate:g}</text>')
    parts.append(
        f'<text x="{middle:.0f}" y="{bottom + 36}" text-anchor="middle">'
        "failures per step and server</text>"
    )
    return parts


def _line(
    left: float, speeds: Sequence[float | None], colour: str, low: int, high: int
) -> list[str]:
    parts, points = [], []
    for index, speed in enumerate(speeds):
        x = _x(left, index, len(speeds))
        if speed is None:
            y = float(TOP + PANEL_HEIGHT)
            cross = f"M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8"
            parts.append(f'<path d="{cross}" stroke="{colour}" stroke-width="2"/>')
        else:
            y = _y(speed, low, high)
            points.append(f"{x:.1f},{y:.1f}")
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>')
    drawn = f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}"'
    return [f'{drawn} stroke-width="2"/>', *parts]


def _legend(methods: Sequence[str], height: float) -> list[str]:
    parts = []
    for index, (method, colour) in enumerate(zip(methods, COLOURS, strict=True)):
        x, y = LEFT + 130 * index, height - 14
        parts.append(f'<circle cx="{x + 4}" cy="{y - 4}" r="4" fill="{colour}"/>')
        parts.append(f'<text x="{x + 14}" y="{y}">{method}</text>')
    x = LEFT + 130 * len(methods)
    cross = f"M{x} {height - 22:.0f}l8 8m0 -8l-8 8"
    parts.append(f'<path d="{cross}" stroke="{INK}" stroke-width="2"/>')
    parts.append(f'<text x="{x + 14}" y="{height - 14}">not finished</text>')
    return parts


def _x(left: float, index: int, count: int) -> float:
    return left + PANEL_WIDTH * (index + 0.5) / count


def _y(speed: float, low: int, high: int) -> float:
    share = (math.log10(speed) - low) / (high - low)
    return TOP + PANEL_HEIGHT * (1 - share)
