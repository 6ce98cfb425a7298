"""Who stores which position, and the exact selection over all of them: every rank in this process."""

import pytest
import torch

from sparse_attn import reference, select_topk
from sparse_attn.distributed.ranks import Ranks
from sparse_attn.distributed.shards import Shards, best, candidates, joined, parts

SHARES = [(world, interleave) for world in (1, 2, 3, 4) for interleave in (1, 3, 64)]


@pytest.mark.parametrize("world, interleave", SHARES)
def test_ranks_share_out_every_position_once(world, interleave):
    position = torch.arange(-1, 700)
    every = [Shards(Ranks(rank, world), interleave) for rank in range(world)]
    held = [shards.to_local(position) for shards in every]
    assert torch.equal(sum((local >= 0).int() for local in held), (position >= 0).int())
    for shards, local in zip(every, held, strict=True):
        mine = local >= 0
        assert torch.equal(local[mine], torch.arange(int(mine.sum())))
        assert torch.equal(shards.to_global(local), torch.where(mine, position, -1))
        counted = torch.cat([torch.zeros(1), (local[1:] >= 0).cumsum(0)])
        assert torch.equal(shards.local_length(torch.arange(701)), counted.long())
        assert all(shards.rows(n) >= int(counted[n]) for n in range(701))


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
        shards = Shards(Ranks(rank, world), interleave)
        mine = [p for p in range(s_kv) if p // interleave % world == rank]
        own = logits[:, mine] if mine else torch.zeros(s_q, 1)
        ke = shards.local_length(visible).int()
        local = select_topk(own, topk, torch.zeros_like(ke), ke)
        scores = reference.scores_of(own, local)
        gathered.append(candidates(shards.to_global(local), scores))
    expected = select_topk(logits, topk, torch.zeros_like(visible), visible)
    assert torch.equal(best(torch.cat(gathered, 1), topk), expected)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("queries", [8, 9, 15, 16, 61])
def test_ranks_divide_queries_into_parts_of_one_size(size, queries):
    rows = torch.arange(queries * 3).view(queries, 3)
    divided = parts(queries, size)
    assert len({end - begin for begin, end in divided}) == 1
    assert torch.equal(joined(torch.stack([rows[begin:end] for begin, end in divided]), queries), rows)
