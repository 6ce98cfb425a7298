"""A failure on one of three ranks, of each kind, in forks of their own.

python tests/distributed/failures.py [NAME]
"""

import os
import sys
import time

import pytest
import torch
import torch.distributed as dist
from ranks import MLA, mesh_of

from bench.ranks import on_ranks
from sparse_attn import DSACache, SparseMLA, layers
from sparse_attn.distributed import EndedError
from sparse_attn.distributed.ranks import PATIENCE

WORLD, FAILS = 3, 1  # which rank
HIDDEN = MLA.hidden_size


class Step:
    """A layer that has made a call; the cache must stay as it was then."""

    def __init__(self):
        mesh = mesh_of(cp=WORLD)
        self.layer, self.cache = SparseMLA(MLA, mesh=mesh), DSACache(MLA, 100, mesh=mesh)
        self.layer(torch.randn(50, HIDDEN), cache=self.cache)
        self.before = self.held()

    def held(self):
        own = self.cache.shards.local_length(torch.tensor(50))
        return [self.cache[name][:, :own].clone() for name in ("kv", "index_k")]

    def __call__(self, width=HIDDEN):
        return self.layer(torch.randn(2, width), cache=self.cache)

    def assert_unchanged(self):
        assert self.cache.lengths == (50,)
        assert all(torch.equal(*pair) for pair in zip(self.held(), self.before, strict=True))

    def assert_ended(self, message):
        """Every call is refused from now on, at once, with the message of the rank that failed."""
        with pytest.raises(EndedError, match=message):
            self()
        self.assert_unchanged()


def i_fail():
    return dist.get_rank() == FAILS


def the_same_wrong_argument_on_all():
    """It is no divergence: the next call works."""
    step = Step()
    for _ in range(2):
        start = time.monotonic()
        with pytest.raises(ValueError, match="hidden_states: expected shape"):
            step(width=3)
        assert time.monotonic() - start < PATIENCE - 1  # so each knew that the others failed too
        step.assert_unchanged()
    step()
    assert step.cache.lengths == (52,)


def a_wrong_argument_on_one():
    step = Step()
    message = (
        rf"rank {FAILS} failed with ValueError: hidden_states: expected shape \[tokens, hidden_size=64\]"
    )
    if i_fail():
        with pytest.raises(ValueError, match="hidden_states: expected shape"):
            step(width=3)
    else:
        with pytest.raises(EndedError, match=message):
            step()
    step.assert_unchanged()
    step.assert_ended(message)


def a_lack_of_memory_on_one():
    """In the middle of a call, when some collectives are done."""
    step = Step()
    message = f"rank {FAILS} failed with OutOfMemoryError: on purpose"
    if i_fail():

        def fail(*args, **kwargs):
            raise torch.OutOfMemoryError("on purpose")

        kept, layers.sparse_mla = layers.sparse_mla, fail
        with pytest.raises(torch.OutOfMemoryError, match="on purpose"):
            step()
        layers.sparse_mla = kept
    else:
        with pytest.raises(EndedError, match=message):
            step()
    step.assert_ended(message)


def an_interrupt_on_one():
    step = Step()
    if i_fail():

        def fail(*args, **kwargs):
            raise KeyboardInterrupt

        step.layer._project = fail
        with pytest.raises(KeyboardInterrupt):
            step()
    else:
        with pytest.raises(EndedError, match=f"rank {FAILS} failed with KeyboardInterrupt"):
            step()
    step.assert_unchanged()


def a_rank_that_ends():
    step = Step()
    if i_fail():
        time.sleep(1)
        os._exit(0)
    with pytest.raises(EndedError, match="a rank of 3 ended, or did not answer"):
        step()
    step.assert_unchanged()


def a_rank_that_does_not_come():
    step, store = Step(), dist.distributed_c10d._get_default_store()
    if i_fail():
        while store.add("noticed", 0) < WORLD - 1:
            time.sleep(0.1)
        os._exit(0)
    with pytest.raises(EndedError, match="a rank of 3 ended, or did not answer within"):
        step()
    step.assert_unchanged()
    store.add("noticed", 1)


CASES = [
    the_same_wrong_argument_on_all,
    a_wrong_argument_on_one,
    a_lack_of_memory_on_one,
    an_interrupt_on_one,
    a_rank_that_ends,
    a_rank_that_does_not_come,
]

if __name__ == "__main__":
    for case in CASES:
        if case.__name__ in (sys.argv[1:] or [case.__name__]):
            on_ranks(WORLD, case, seconds=8 if case is a_rank_that_does_not_come else 60)
