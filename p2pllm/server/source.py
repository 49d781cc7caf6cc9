"""Where a server's blocks come from: a checkpoint, or whatever stands in for one."""

import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from p2pllm.config import ServerConfig
from p2pllm.errors import ConfigError
from p2pllm.ids import ModelId
from p2pllm.model.checkpoint import Checkpoint, open_checkpoint
from p2pllm.model.config import ModelConfig
from p2pllm.model.device import Compute, Device
from p2pllm.model.dummy import dummy_block_bytes, dummy_model_id, dummy_weights, read_config
from p2pllm.model.families.family import Weights
from p2pllm.model.hub import resolve_model
from p2pllm.model.kv_store import token_bytes
from p2pllm.model.memory import free_memories, return_freed
from p2pllm.model.quantize import Scheme
from p2pllm.model.span_model import SpanCompute, SpanModel
from p2pllm.model.split_span import ReadBlock, SplitSpan
from p2pllm.server.capacity import BlockCost, block_cost, divide, rooms_of, usable_of
from p2pllm.spans import Span

logger = logging.getLogger(__name__)

LoadProgress = Callable[[int, int], None]  # blocks loaded, blocks in all
FetchProgress = Callable[[int, int], None]  # bytes fetched, bytes in all


class ModelSource(Protocol):
    """What a server must know of a model: a `Checkpoint`, or the simulator's stand-in."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def model_id(self) -> ModelId: ...

    def block_bytes(self, settings: ServerConfig) -> int:
        """Memory that one block's weights take."""
        ...

    def load_span(
        self,
        span: Span,
        settings: ServerConfig,
        on_progress: LoadProgress | None,
        loaded: SpanCompute | None = None,
    ) -> SpanCompute:
        """Read the blocks of a span into memory; runs in a thread.

        Blocks that `loaded` has are shared with it and not read again.
        """
        ...


@dataclass(frozen=True, slots=True)
class CheckpointSource:
    """The blocks of an open checkpoint.

    With a `name` (what `resolve_model` takes), the files that hold a span are fetched when the
    span is known: of a large Hub repo only its shards.
    """

    checkpoint: Checkpoint
    name: str = ""
    on_fetch: FetchProgress | None = None

    @property
    def config(self) -> ModelConfig:
        return self.checkpoint.config

    @property
    def model_id(self) -> ModelId:
        return self.checkpoint.model_id

    def block_bytes(self, settings: ServerConfig) -> int:
        compute = Compute.of(settings)
        return self.checkpoint.block_bytes(compute.dtype, compute.scheme)

    def load_span(
        self,
        span: Span,
        settings: ServerConfig,
        on_progress: LoadProgress | None,
        loaded: SpanCompute | None = None,
    ) -> SpanCompute:
        compute = Compute.of(settings)
        dtype, scheme = compute.dtype, compute.scheme
        checkpoint = self.checkpoint
        if self.name:
            path = resolve_model(self.name, span=span, progress=self.on_fetch)
            checkpoint = open_checkpoint(path, self.model_id.name)

        def read(index: int, device: Device) -> Weights:
            if scheme is Scheme.NONE:
                return checkpoint.block_weights(index, dtype)
            return checkpoint.quantized_block(index, dtype, scheme, device)

        model = _load(self, span, settings, read, on_progress, loaded)
        checkpoint.let_go()
        return model


class DummySource:
    """Random blocks of a config's shape; `name` is that of the model it is the shape of."""

    def __init__(self, config: ModelConfig, name: str) -> None:
        self._config = config
        self._model_id = dummy_model_id(config, name)

    @property
    def config(self) -> ModelConfig:
        return self._config

    @property
    def model_id(self) -> ModelId:
        return self._model_id

    def block_bytes(self, settings: ServerConfig) -> int:
        compute = Compute.of(settings)
        return dummy_block_bytes(self._config, compute.dtype, compute.scheme)

    def load_span(
        self,
        span: Span,
        settings: ServerConfig,
        on_progress: LoadProgress | None,
        loaded: SpanCompute | None = None,
    ) -> SpanCompute:
        logger.warning("RANDOM WEIGHTS model=%s: what it answers means nothing", self._model_id)
        compute = Compute.of(settings)

        def read(index: int, device: Device) -> Weights:
            return dummy_weights(self._config, index, compute.dtype, compute.scheme, device)

        return _load(self, span, settings, read, on_progress, loaded)


def cost_of(source: ModelSource, settings: ServerConfig) -> BlockCost:
    """What one block of a model takes."""
    compute = Compute.of(settings)
    return block_cost(
        weight_bytes=source.block_bytes(settings),
        kv_bytes_per_token=token_bytes(source.config, compute.dtype, compute.kv_bits),
        cache_tokens=settings.cache_tokens,
    )


def _load(
    source: ModelSource,
    span: Span,
    settings: ServerConfig,
    read: ReadBlock,
    on_progress: LoadProgress | None,
    loaded: SpanCompute | None,
) -> SpanModel | SplitSpan:
    """The blocks of a span, read one after the other, on the device or devices of the settings."""
    assert loaded is None or isinstance(loaded, SpanModel | SplitSpan)
    compute = Compute.of(settings)
    num_lacking = len(span) if loaded is None else len(loaded.missing(span))
    numbers = itertools.count(1)

    def read_one(index: int, device: Device) -> Weights:
        return_freed(device)  # what the block before left over
        weights = read(index, device)
        if on_progress is not None:
            on_progress(next(numbers), num_lacking)
        return weights

    model: SpanModel | SplitSpan
    if compute.others:
        assert loaded is None or isinstance(loaded, SplitSpan)
        model = SplitSpan.load(
            source.config,
            span,
            read_one,
            sizes=loaded.sizes if loaded is not None else _sizes(source, span, settings, compute),
            devices=compute.devices,
            dtype=compute.dtype,
            kv_bits=compute.kv_bits,
            loaded=loaded,
        )
    else:
        assert loaded is None or isinstance(loaded, SpanModel)
        lacking = span if loaded is None else loaded.missing(span)
        model = SpanModel.load(
            source.config,
            span,
            (read_one(index, compute.device) for index in lacking),
            dtype=compute.dtype,
            device=compute.device,
            kv_bits=compute.kv_bits,
            loaded=loaded,
        )
    for device in set(compute.devices):
        return_freed(device)
    return model


def _sizes(
    source: ModelSource, span: Span, settings: ServerConfig, compute: Compute
) -> tuple[int, ...]:
    """How many blocks of a span go to each device."""
    limits = [usable_of(free) for free in free_memories(compute.devices)]
    return divide(len(span), rooms_of(limits, cost_of(source, settings)))


def source_of(
    name: str, path: Path, settings: ServerConfig, on_fetch: FetchProgress | None = None
) -> ModelSource:
    """The source that `settings.load` asks for; `path` is what `resolve_model` gave for `name`.

    Raises CheckpointError, or ConfigError for a way of loading that is none.
    """
    if settings.load == "dummy":
        return DummySource(read_config(path), path.name)
    if settings.load != "checkpoint":
        raise ConfigError(f"no load {settings.load!r}; there are checkpoint, dummy")
    return CheckpointSource(open_checkpoint(path), name, on_fetch)
