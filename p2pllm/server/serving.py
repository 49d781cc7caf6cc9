"""One span being served: its blocks and cache, who computes on them, and who answers for them.

A server has one at a time. When it moves to other blocks it gets a new one, with the same cache:
as many blocks of one model need the same pages, and whatever they hold is never looked at before
it is overwritten.
"""

from dataclasses import dataclass

from p2pllm.clock import Clock
from p2pllm.config import ServerConfig
from p2pllm.ids import ModelId
from p2pllm.model.device import Compute, numerics_of
from p2pllm.model.executor import Executor
from p2pllm.model.kv_cache import KVCache
from p2pllm.model.span_model import SpanCompute
from p2pllm.net.endpoint import Endpoint
from p2pllm.server.forwarding import Forwarding
from p2pllm.server.handlers import Service
from p2pllm.server.offer import Offer
from p2pllm.server.pages import PageAllocator, pages_for
from p2pllm.server.scheduler import Scheduler
from p2pllm.server.sessions import SessionTable
from p2pllm.server.worker import Worker
from p2pllm.spans import Span
from p2pllm.tasks import task_group
from p2pllm.wire.messages import Output


@dataclass(frozen=True, slots=True)
class Serving:
    """The parts; use `Serving.of`. `run` answers and computes until it is cancelled."""

    model: SpanCompute
    cache: KVCache
    pages: PageAllocator
    worker: Worker
    forwarding: Forwarding
    service: Service

    @classmethod
    def of(
        cls,
        model: SpanCompute,
        cache: KVCache,
        model_id: ModelId,
        endpoint: Endpoint,
        settings: ServerConfig,
        executor: Executor,
        clock: Clock,
    ) -> "Serving":
        """Everything that stands between loaded blocks and the first session."""
        num_pages = pages_for(settings.cache_tokens)
        pages = PageAllocator(num_pages, quota_pages=_quota_pages(settings, num_pages))
        scheduler = Scheduler(
            batch_tokens=settings.batch_tokens,
            chunk_tokens=settings.prefill_chunk_tokens,
            max_rows=settings.max_queue_steps,
        )
        worker = Worker(model, cache, scheduler, executor, clock)
        numerics = numerics_of(model.dtype, Compute.of(settings).scheme, settings.kv_bits)
        offer = Offer(model_id, numerics, model.span, model.config.hidden_size)
        sessions: SessionTable[Output] = SessionTable(
            pages, max_sessions=settings.max_sessions, lease_s=settings.lease_s
        )
        forwarding = Forwarding(model, offer, settings, executor, clock)
        service = Service(endpoint, offer, sessions, worker, forwarding, settings)
        return cls(model, cache, pages, worker, forwarding, service)

    @property
    def span(self) -> Span:
        """What is served."""
        return self.model.span

    async def run(self) -> None:
        """Serve until cancelled; sessions that are left then are over."""
        async with task_group() as tasks:
            tasks.create_task(self.worker.run())
            tasks.create_task(self.forwarding.run())
            tasks.create_task(self.service.run())


def _quota_pages(settings: ServerConfig, num_pages: int) -> int:
    """What one peer may hold while others wait: a quarter, if the user does not say."""
    asked = settings.max_tokens_per_peer
    return pages_for(asked) if asked else max(1, num_pages // 4)
