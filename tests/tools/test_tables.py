"""Results as Markdown."""

from tools.benchmarks._tables import cell, markdown, table


def test_numbers_and_words_become_names_and_values() -> None:
    assert markdown("decode", {"num_hops": 2, "loop": "uvloop"}) == (
        "## decode\n\n|  | value |\n| --- | --- |\n| num hops | 2 |\n| loop | uvloop |\n"
    )


def test_a_list_of_objects_becomes_a_row_for_each() -> None:
    text = markdown("load", {"rows": [{"weights": "int4", "ratio": 1.5}, {"weights": "int8"}]})

    assert text.endswith(
        "### rows\n\n| weights | ratio |\n| --- | --: |\n| int4 | 1.5 |\n| int8 | – |\n"
    )


def test_objects_with_the_same_names_become_rows_of_one_table() -> None:
    text = markdown("routing", {"first": {"ttft_ms": 1.0}, "then": {"ttft_ms": 2.0}})

    assert text.endswith("|  | ttft ms |\n| --- | --: |\n| first | 1 |\n| then | 2 |\n")


def test_other_objects_get_a_heading_and_are_flattened() -> None:
    text = markdown("x", {"a": {"b": 1, "c": {"d": 2}}, "e": {"f": 3}})

    assert "### a\n\n|  | value |\n| --- | --: |\n| b | 1 |\n| c d | 2 |\n\n### e" in text


def test_lists_of_objects_inside_objects_get_deeper_headings() -> None:
    text = markdown("x", {"outer": {"number": 1, "runs": [{"a": 1}]}})

    assert "### outer\n" in text
    assert "#### runs\n\n| a |" in text


def test_an_empty_object_is_no_error() -> None:
    assert "### nothing" in markdown("x", {"nothing": {}, "a": 1})


def test_only_columns_of_numbers_are_aligned_to_the_right() -> None:
    lines = table([{"a": 1, "b": "x", "c": True}, {"a": 2.5, "b": 3, "c": False}]).splitlines()

    assert lines[1] == "| --: | --- | --- |"


def test_cells_show_four_digits_and_never_break_the_row() -> None:
    assert cell(None) == "–"
    assert cell(True) == "yes"
    assert cell(0.123456) == "0.1235"
    assert cell(12345.678) == "12,346"
    assert cell([1, 2.5]) == "1, 2.5"
    assert cell("a|b\nc") == "a\\|b c"
