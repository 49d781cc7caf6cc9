"""Where a server's blocks come from: a checkpoint, or whatever stands in for one."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from p2pllm.config import ServerConfig
from p2pllm.ids import ModelId
from p2pllm.model.checkpoint import Checkpoint, open_checkpoint
from p2pllm.model.config import ModelConfig
from p2pllm.model.device import Compute
from p2pllm.model.families.family import Weights
from p2pllm.model.hub import resolve_model
from p2pllm.model.memory import return_freed
from p2pllm.model.quantize import Scheme
from p2pllm.model.span_model import SpanCompute, SpanModel
from p2pllm.spans import Span

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
        assert loaded is None or isinstance(loaded, SpanModel)
        compute = Compute.of(settings)
        dtype, scheme = compute.dtype, compute.scheme
        checkpoint = self.checkpoint
        if self.name:
            path = resolve_model(self.name, span=span, progress=self.on_fetch)
            checkpoint = open_checkpoint(path, self.model_id.name)

        lacking = list(span) if loaded is None else loaded.missing(span)

        def weights() -> Iterator[Weights]:
            for number, index in enumerate(lacking, 1):
                if scheme is Scheme.NONE:
                    yield checkpoint.block_weights(index, dtype)
                else:
                    yield checkpoint.quantized_block(index, dtype, scheme, compute.device)
                return_freed()  # what reading this block left over
                if on_progress is not None:
                    on_progress(number, len(lacking))

        return SpanModel.load(
            self.config, span, weights(), dtype=dtype, device=compute.device, loaded=loaded
        )
