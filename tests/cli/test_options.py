"""Where an option's value comes from: flag, environment, file, default, in this order."""

import json
from pathlib import Path
from typing import Any

import pytest

from p2pllm.cli import generate
from p2pllm.cli.asking import client_settings
from p2pllm.cli.generate import Question
from p2pllm.cli.options import ClientOptions, UseOptions
from p2pllm.client.results import GenerationResult
from p2pllm.config import NodeConfig
from tests.cli.conftest import Terminal

PEERS = ["--peers", "127.0.0.1:4"]
RESULT = GenerationResult(
    text="an answer",
    token_ids=(1, 2),
    prompt_token_ids=(3,),
    finish=None,
    ttft_s=0.5,
    tpot_s=0.25,
    tokens_per_s=4.0,
    own_s_per_token=0.01,
    route=(),
)


class Asked:
    """What the last `p2pllm generate` would have done."""

    config: NodeConfig
    use: UseOptions
    question: Question


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    seen = Asked()

    async def note(
        config: NodeConfig, network: ClientOptions, use: UseOptions, question: Question
    ) -> GenerationResult:
        seen.config, seen.use, seen.question = config, use, question
        return RESULT

    monkeypatch.setattr(generate, "_generate", note)
    return seen


def ask(terminal: Terminal, *arguments: str, **settings: Any) -> None:
    result = terminal.type("generate", "hi", *arguments, **settings)
    assert result.exit_code == 0, result.output


def write_config(home: Path, text: str) -> Path:
    path = home / "xdg_config_home" / "p2pllm" / "config.toml"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    return path


def test_defaults_hold_where_nobody_says_anything(terminal: Terminal, asked: Asked) -> None:
    ask(terminal, *PEERS)
    assert asked.question.sampling.max_new_tokens == 128
    assert asked.config.net.network_id == "main"


def test_the_file_goes_before_the_default(terminal: Terminal, asked: Asked, home: Path) -> None:
    write_config(home, "max-new-tokens = 7\nswarm = 'home'\npeers = ['127.0.0.1:5']")
    ask(terminal)
    assert asked.question.sampling.max_new_tokens == 7
    assert asked.config.net.network_id == "home"
    assert [address.port for address in asked.config.peers] == [5]


def test_a_table_goes_before_the_rest_of_the_file(
    terminal: Terminal, asked: Asked, home: Path
) -> None:
    write_config(home, "max_new_tokens = 7\n[generate]\nmax_new_tokens = 8\n[chat]\ntop_k = 3")
    ask(terminal, *PEERS)
    assert asked.question.sampling.max_new_tokens == 8
    assert asked.question.sampling.top_k == 0


def test_the_environment_goes_before_the_file(terminal: Terminal, asked: Asked, home: Path) -> None:
    write_config(home, "[generate]\nmax-new-tokens = 7")
    ask(terminal, *PEERS, env={"P2PLLM_MAX_NEW_TOKENS": "9", "P2PLLM_DTYPE": "float32"})
    assert asked.question.sampling.max_new_tokens == 9
    assert asked.use.dtype == "float32"


def test_a_flag_goes_before_the_environment(terminal: Terminal, asked: Asked) -> None:
    ask(terminal, *PEERS, "--max-new-tokens", "10", env={"P2PLLM_MAX_NEW_TOKENS": "9"})
    assert asked.question.sampling.max_new_tokens == 10


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("0", False)])
def test_a_switch_can_be_set_by_environment(
    terminal: Terminal, asked: Asked, value: str, expected: bool
) -> None:
    ask(terminal, *PEERS, env={"P2PLLM_CHAT": value})
    assert asked.question.is_chat is expected


def test_another_file_can_be_named(terminal: Terminal, asked: Asked, home: Path) -> None:
    path = home / "mine.toml"
    path.write_text("top-p = 0.5")
    ask(terminal, *PEERS, "--config", str(path))
    assert asked.question.sampling.top_p == 0.5


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("max-new-token = 7", "did you mean 'max-new-tokens'"),
        ("[genrate]\nseed = 1", "did you mean 'generate'"),
        ("[generate]\nblocks = '0:10'", "[generate] blocks"),
        ("seed = [1, 2]", "seed takes one value"),
        ("seed = ", "cannot read"),
    ],
)
def test_a_wrong_file_is_a_usage_error_that_names_what_is_wrong(
    terminal: Terminal, home: Path, text: str, named: str
) -> None:
    path = write_config(home, text)
    result = terminal.type("generate", "hi", *PEERS)
    assert result.exit_code == 2
    assert str(path) in result.output
    assert named in result.output


def test_a_named_file_that_is_not_there_is_an_error(terminal: Terminal) -> None:
    result = terminal.type("status", "--config", "nowhere.toml")
    assert result.exit_code == 2
    assert "No such file" in result.output


def test_a_bad_value_says_where_it_came_from(terminal: Terminal, home: Path) -> None:
    by_environment = terminal.type("generate", "hi", *PEERS, env={"P2PLLM_SEED": "x"})
    write_config(home, "seed = 'x'")
    by_file = terminal.type("generate", "hi", *PEERS)
    assert "(from the environment: P2PLLM_SEED)" in by_environment.output
    assert "(from the configuration file)" in by_file.output


def test_peers_are_repeated_or_listed(terminal: Terminal, asked: Asked) -> None:
    ask(terminal, "--peers", "127.0.0.1:1,[::1]:2", "--peers", "example.org:3")
    assert [address.port for address in asked.config.peers] == [1, 2, 3]


def test_a_shape_reaches_the_transport(terminal: Terminal, asked: Asked) -> None:
    ask(terminal, *PEERS, "--shape", "delay=15ms")
    assert asked.config.net.shaper.delay_s == 0.015


def test_a_client_does_not_listen(terminal: Terminal, asked: Asked) -> None:
    ask(terminal, *PEERS)
    assert not asked.config.net.is_listening
    assert asked.config.dht.is_client


@pytest.mark.parametrize("prompt", [["-"], []])
def test_the_prompt_may_come_from_standard_input(
    terminal: Terminal, asked: Asked, prompt: list[str]
) -> None:
    terminal.type("generate", *prompt, *PEERS, input="from a file")
    assert asked.question.prompt == "from a file"


def test_json_is_one_object_with_the_fields_that_scripts_rely_on(
    terminal: Terminal, asked: Asked
) -> None:
    result = terminal.type("generate", "hi", *PEERS, "--json")
    assert not asked.question.is_streamed
    assert json.loads(result.stdout) == {
        "text": "an answer",
        "token_ids": [1, 2],
        "prompt_token_ids": [3],
        "finish": None,
        "ttft_s": 0.5,
        "tpot_s": 0.25,
        "tokens_per_s": 4.0,
        "bytes_per_token_per_hop": 0.0,
        "route": [],
        "recoveries": [],
        "journal_peak_bytes": 0,
        "cached_prompt_tokens": 0,
    }


@pytest.mark.parametrize(
    ("flags", "expected"), [([], True), (["--chain"], True), (["--no-chain"], False)]
)
def test_servers_push_to_each_other_unless_it_is_switched_off(
    terminal: Terminal, asked: Asked, flags: list[str], expected: bool
) -> None:
    ask(terminal, *PEERS, *flags)
    assert client_settings(asked.use).is_chained is expected


def test_the_chain_can_be_switched_off_in_the_file_and_by_environment(
    terminal: Terminal, asked: Asked, home: Path
) -> None:
    write_config(home, "chain = false")
    ask(terminal, *PEERS)
    assert asked.use.is_chained is False
    ask(terminal, *PEERS, env={"P2PLLM_CHAIN": "1"})
    assert asked.use.is_chained is True


@pytest.mark.parametrize("flag", ["--save", "--trace"])
def test_a_file_that_cannot_be_written_is_told_of_before_anything_is_generated(
    terminal: Terminal, asked: Asked, tmp_path: Path, flag: str
) -> None:
    result = terminal.type("generate", "hi", *PEERS, flag, str(tmp_path / "nowhere" / "file"))
    assert result.exit_code == 2
    assert "no directory" in result.stderr
