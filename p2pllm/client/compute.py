"""The client's own computation: embeddings in, logits and tokens out.

One call to the compute thread per step: it decodes the last hop's output, applies head and
sampling, and embeds and codes the next tokens, so that a generated token costs one hop to the
thread and back. Where the sequences stand is in `Sequence` objects, which the thread changes
while their owner waits for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from p2pllm.client.exchange import Part
from p2pllm.client.sequence import Sequence as TextSequence
from p2pllm.client.state import WireFormat
from p2pllm.errors import RemoteProtocolError
from p2pllm.model.edges import EdgeCompute
from p2pllm.model.executor import Executor
from p2pllm.model.sampling import Draw, SamplingParams, sample
from p2pllm.model.tensor_io import decode_tensor, encode_tensor
from p2pllm.wire.messages import Row
from p2pllm.wire.tensors import WireTensor


@dataclass(eq=False)
class Drawing:
    """A sequence whose tokens are drawn; `number` tells sequences of one seed apart."""

    sequence: TextSequence
    number: int = 0

    def next_draw(self) -> Draw:
        """Which choice comes next."""
        position = len(self.sequence.prompt_ids) + len(self.sequence.token_ids)
        return Draw(self.number, position)


@dataclass(frozen=True, slots=True)
class Advance:
    """What one step brought: the text of each sequence, and the input of those that go on."""

    pieces: tuple[str, ...]
    going_on: tuple[int, ...]  # indices of the sequences that are not finished
    tensor: WireTensor | None  # their embedded tokens, (len(going_on), D); None if none goes on


class ClientCompute:
    """Embedding, LM head and sampling, in a thread."""

    def __init__(self, edges: EdgeCompute, executor: Executor) -> None:
        self._edges = edges
        self._executor = executor

    async def embed(self, token_ids: Sequence[int], wire: WireFormat) -> WireTensor:
        """Hidden states of tokens, (N, D), coded."""
        return await self._executor.run(lambda: self._embed(token_ids, wire))

    async def advance(
        self,
        tensors: Sequence[WireTensor],
        drawings: Sequence[Drawing],
        params: SamplingParams,
        wire: WireFormat,
    ) -> Advance:
        """Draw each sequence's next token from its last hidden state.

        The tensors hold (len(drawings), D) together, in order.
        """
        return await self._executor.run(lambda: self._advance(tensors, drawings, params, wire))

    async def logits(self, tensors: Sequence[WireTensor]) -> Tensor:
        """Logits (N, V) in float32 of coded hidden states, (N, D) together."""
        return await self._executor.run(lambda: self._logits(tensors))

    async def repack(
        self, rows: Sequence[Row], parts: Sequence[Part], wire: WireFormat
    ) -> WireTensor:
        """Join an answer that came in parts, in the order of `rows`."""
        return await self._executor.run(lambda: self._repack(rows, parts, wire))

    # --- in the thread ---------------------------------------------------------------------

    @torch.inference_mode()
    def _repack(self, rows: Sequence[Row], parts: Sequence[Part], wire: WireFormat) -> WireTensor:
        found: dict[tuple[object, int], Tensor] = {}
        for part in parts:
            tensor, start = self._decode(part.tensor), 0
            for row in part.rows:
                found[row.session, row.step] = tensor[start : start + row.num_outputs]
                start += row.num_outputs
        joined = torch.cat([found[row.session, row.step] for row in rows])
        return encode_tensor(joined, wire.codec, compress=wire.is_compressed)

    @torch.inference_mode()
    def _embed(self, token_ids: Sequence[int], wire: WireFormat) -> WireTensor:
        hidden = self._edges.embed(torch.tensor(token_ids))
        return encode_tensor(hidden, wire.codec, compress=wire.is_compressed)

    @torch.inference_mode()
    def _advance(
        self,
        tensors: Sequence[WireTensor],
        drawings: Sequence[Drawing],
        params: SamplingParams,
        wire: WireFormat,
    ) -> Advance:
        draws = [drawing.next_draw() for drawing in drawings]
        tokens = sample(self._logits(tensors), params, draws)
        pieces, going_on, next_ids = [], [], []
        for index, (drawing, token) in enumerate(zip(drawings, tokens, strict=True)):
            pieces.append(drawing.sequence.push(token))
            if drawing.sequence.finish is None:
                going_on.append(index)
                next_ids.append(token)
        following = self._embed(next_ids, wire) if next_ids else None
        return Advance(tuple(pieces), tuple(going_on), following)

    @torch.inference_mode()
    def _logits(self, tensors: Sequence[WireTensor]) -> Tensor:
        return self._edges.logits(torch.cat([self._decode(tensor) for tensor in tensors]))

    def _decode(self, tensor: WireTensor) -> Tensor:
        hidden = decode_tensor(tensor, dtype=self._edges.dtype)
        if not torch.isfinite(hidden).all():
            raise RemoteProtocolError("a server answered with NaN or infinity")
        return hidden
