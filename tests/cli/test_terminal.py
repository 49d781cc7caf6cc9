"""What a terminal is given to show."""

import pytest

from p2pllm.cli.terminal import Activity, printable


def test_escape_sequences_of_a_model_are_not_obeyed() -> None:
    assert printable("a\x1b[2Jb\x07\x9bc") == "a�[2Jb��c"


def test_text_in_any_script_stays_as_it_is() -> None:
    text = "naïve\n\t日本語 👩‍🚀"
    assert printable(text) == text


def test_nothing_is_drawn_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    with Activity() as activity:
        activity.say("working")
        activity.on_bytes("fetching", 1, 2)
    assert capsys.readouterr() == ("", "")
