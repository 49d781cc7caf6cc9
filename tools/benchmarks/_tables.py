"""Results as Markdown. Pure.

A result is a JSON object. In it, and in the objects inside it, numbers and words become a table of
names and values; a list of objects becomes a table with a row for each. Objects that have the same
names in them become the rows of one table. What else there is gets a heading of its own.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

LEVEL = 3  # of the first heading below the benchmark's own


def markdown(title: str, result: Mapping[str, Any]) -> str:
    """The whole result, under a heading."""
    return "\n\n".join([f"## {title}", *_sections(result, LEVEL)]) + "\n"


def _sections(value: Mapping[str, Any], level: int) -> Iterable[str]:
    plain = {name: each for name, each in value.items() if not _is_nested(each)}
    if plain:
        yield table([{"": words(name), "value": each} for name, each in plain.items()])
    alike = _alike(value)
    if alike:
        yield table([{"": words(name), **_flat(value[name])} for name in alike])
    for name, each in value.items():
        if name in plain or name in alike:
            continue
        yield f"{'#' * level} {words(name)}"
        if not isinstance(each, Mapping):
            yield table([_flat(item) for item in each])
        elif _is_row(each) and _alike(each) != list(each):
            yield table([{"": words(key), "value": item} for key, item in _flat(each).items()])
        else:
            yield from _sections(each, level + 1)


def _alike(value: Mapping[str, Any]) -> list[str]:
    """The objects in it that are the rows of one table: the same names, and nothing else would
    stand between them. A single one is a row if there is nothing beside it."""
    rows = [name for name, each in value.items() if _is_row(each)]
    if not rows or len({tuple(_flat(value[name])) for name in rows}) > 1:
        return []
    return rows if len(rows) > 1 or len(value) == 1 else []


def _is_row(value: Any) -> bool:
    """Is it an object that `_flat` makes a row of?"""
    return isinstance(value, Mapping) and not any(map(_is_nested, _flat(value).values()))


def _is_nested(value: Any) -> bool:
    """An object, or a list of them?"""
    if isinstance(value, Mapping):
        return True
    is_list = isinstance(value, list | tuple)
    return is_list and any(isinstance(item, Mapping) for item in value)


def _flat(record: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in record.items():
        path = f"{before} {name}".strip()
        if isinstance(value, Mapping):
            flat |= _flat(value, path)
        else:
            flat[path] = value
    return flat


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """One row for each; the columns are all names, in the order in which they first come."""
    columns = list(dict.fromkeys(name for record in records for name in record))
    cells = [[cell(record.get(name)) for name in columns] for record in records]
    numeric = [
        all(_is_number(record.get(name)) for record in records if record.get(name) is not None)
        for name in columns
    ]
    lines = [
        [words(name) for name in columns],
        ["--:" if is_number else "---" for is_number in numeric],
        *cells,
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def words(name: str) -> str:
    """A name as people write it: `ttft_p50_ms` is "ttft p50 ms"."""
    return name.replace("_", " ")


def cell(value: Any) -> str:
    """A value in a table: four digits that count, and nothing that breaks the row."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(cell, value))
    return str(value).replace("|", "\\|").replace("\n", " ")
