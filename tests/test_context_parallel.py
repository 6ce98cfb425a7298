"""The exact selection over keys that ranks share out, without an engine: every rank in this process."""

import pytest
import torch

from sparse_attn import reference, select_topk
from sparse_attn.integrations.vllm.context_parallel import (
    best,
    candidates,
    local_length,
    to_global,
    to_local,
)

SHARES = [(world, interleave) for world in (1, 2, 3, 4) for interleave in (1, 3, 64)]


@pytest.mark.parametrize("world, interleave", SHARES)
def test_ranks_share_out_every_position_once(world, interleave):
    position = torch.arange(-1, 700)
    held = [to_local(position, rank, world, interleave) for rank in range(world)]
    assert torch.equal(sum((local >= 0).int() for local in held), (position >= 0).int())
    for rank, local in enumerate(held):
        mine = local >= 0
        assert torch.equal(local[mine], torch.arange(int(mine.sum())))
        assert torch.equal(to_global(local[mine], rank, world, interleave), position[mine])
        counted = torch.cat([torch.zeros(1), (local[1:] >= 0).cumsum(0)])
        assert torch.equal(local_length(torch.arange(701), rank, world, interleave), counted.long())


@pytest.mark.parametrize("world, interleave", SHARES)
@pytest.mark.parametrize("kind", ["normal", "ties", "negative", "zeros of both signs", "not finite"])
def test_selections_are_those_of_one_process(world, interleave, kind):
    generator = torch.Generator().manual_seed(0)
    s_q, s_kv, topk = 40, 300, 24
    logits = torch.randn(s_q, s_kv, generator=generator)
    if kind == "ties":
        logits = (logits * 2).round()
    elif kind == "negative":
        logits = -logits.abs()
    elif kind == "zeros of both signs":
        logits = torch.where(logits > 0, 0.0, -0.0)
    elif kind == "not finite":
        logits[torch.rand(s_q, s_kv, generator=generator) < 0.3] = torch.inf
        logits[torch.rand(s_q, s_kv, generator=generator) < 0.3] = -torch.inf
        logits[torch.rand(s_q, s_kv, generator=generator) < 0.3] = torch.nan
    visible = torch.randint(0, s_kv + 1, (s_q,), generator=generator, dtype=torch.int32)
    visible[:4] = torch.tensor([0, 1, topk, s_kv])
    gathered = []
    for rank in range(world):
        mine = [p for p in range(s_kv) if p // interleave % world == rank]
        own = logits[:, mine] if mine else torch.zeros(s_q, 1)
        ke = local_length(visible, rank, world, interleave).int()
        local = select_topk(own, topk, torch.zeros_like(ke), ke)
        scores = reference.scores_of(own, local)
        gathered.append(candidates(local, scores, rank, world, interleave))
    expected = select_topk(logits, topk, torch.zeros_like(visible), visible)
    assert torch.equal(best(torch.cat(gathered, 1), topk), expected)
