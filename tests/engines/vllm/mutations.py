"""Wrong forms of the plug-in, which the tests must tell from the right one."""

import torch

from sparse_attn.integrations.vllm import backend, layers


def local_topk(monkeypatch) -> None:
    """Each rank attends to its own best keys, as if they were the best of all."""

    def candidates(position, scores):
        seen.append(original(position, scores))
        return seen[-1]

    seen: list[torch.Tensor] = []
    original, best = layers.candidates, layers.best
    monkeypatch.setattr(layers, "candidates", candidates)
    monkeypatch.setattr(layers, "best", lambda gathered, topk: best(seen.pop(), topk))


def dense_attention(monkeypatch) -> None:
    """Queries attend to every token that they see."""

    def forward_mqa(self, q, cache, metadata, layer):
        builder_tokens = torch.arange(q[0].shape[0])
        starts = metadata.query_start_loc
        request = torch.searchsorted(starts[1:], builder_tokens, right=True)
        visible = metadata.seq_lens[request] - starts[request + 1] + builder_tokens + 1
        positions = torch.arange(int(metadata.seq_lens.max()))
        selected = torch.where(positions < visible[:, None], positions, -1).int()
        kept, self.topk_indices_buffer = self.topk_indices_buffer, selected
        try:
            return original(self, q, cache, metadata, layer)
        finally:
            self.topk_indices_buffer = kept

    original = backend.SparseAttnImpl.forward_mqa
    monkeypatch.setattr(backend.SparseAttnImpl, "forward_mqa", forward_mqa)


def shifted_position(monkeypatch) -> None:
    """A query does not see its own token."""
    original = backend.IndexerMetadataBuilder.visible_keys
    monkeypatch.setattr(
        backend.IndexerMetadataBuilder, "visible_keys", lambda self, batch: original(self, batch) - 1
    )


def stale_page(monkeypatch) -> None:
    """The second page of a sequence is read where its first one lies."""
    original = backend.physical_slots

    def physical_slots(indices, block_table, *rest, **options):
        block_table = block_table.clone()
        block_table[:, 1] = block_table[:, 0]
        return original(indices, block_table, *rest, **options)

    monkeypatch.setattr(backend, "physical_slots", physical_slots)


def rotated_keys(monkeypatch) -> None:
    """Index keys are turned by the position before theirs."""
    original = layers.write_index_k

    def write_index_k(k, cache, slots, *, cos, sin, **options):
        original(k, cache, slots, cos=cos.roll(1, 0), sin=sin.roll(1, 0), **options)

    monkeypatch.setattr(layers, "write_index_k", write_index_k)


IN_PROCESS = (dense_attention, shifted_position, stale_page, rotated_keys)
