"""Many decode steps over sequences that grow and are freed: results stay right, memory does not grow.

    python tests/soak.py --steps 100000          (make soak)

Two users take turns. A layer decodes with a DSACache, and some of its draft tokens are rejected. An engine
has a pool of pages: it gives them to sequences that grow, and fills them with NaN when it takes them back.
"""

import argparse
import gc
import random
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

import sparse_attn
from sparse_attn import DSACache, DSAConfig, SparseMLA, reference
from sparse_attn.testing import assert_close

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from bench.timing import return_free_memory

MAX_TOKENS, SEQUENCES, TOPK = 96, 5, 16
NEAR_TIE = 1e-5  # index logits that rounding may put in either order
GROWTH_BYTES, GROWTH_OBJECTS = 16 << 20, 2000
CONFIG = DSAConfig.deepseek_v32(
    **{"hidden_size": 64, "num_attention_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 48},
    **{"qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16},
    **{"index_n_heads": 4, "index_head_dim": 32, "index_topk": TOPK},
)


class Layer:
    """A layer that decodes a batch; ``check`` compares newest tokens with a prefill of the whole sequence."""

    def __init__(self, seed: int):
        torch.manual_seed(seed)
        self.random = random.Random(seed)
        self.layer = SparseMLA(CONFIG)
        self.cache = DSACache(CONFIG, MAX_TOKENS, SEQUENCES)
        self.history = torch.zeros(SEQUENCES, MAX_TOKENS, CONFIG.hidden_size)
        self.last: list[Tensor | None] = [None] * SEQUENCES  # output of the newest token

    def step(self) -> None:
        counts = [self.random.choice((0, 1, 1, 1, 3)) for _ in range(SEQUENCES)]
        for b, length in enumerate(self.cache.lengths):
            if length + counts[b] > MAX_TOKENS or self.random.random() < 0.01:
                self.cache.truncate(0, b)
        tokens = torch.randn(sum(counts), CONFIG.hidden_size)
        for b, new in enumerate(tokens.split(counts)):
            length = self.cache.lengths[b]
            self.history[b, length : length + len(new)] = new
        out = self.layer(tokens, cache=self.cache, cu_seqlens_q=torch.tensor([0, *counts]).cumsum(0))
        for b, mine in enumerate(out.split(counts)):
            if counts[b] == 3 and self.random.random() < 0.5:  # two drafts are rejected
                self.cache.truncate(self.cache.lengths[b] - 2, b)
                mine = mine[:1]
            self.last[b] = mine[-1].clone() if len(mine) else self.last[b]

    def check(self) -> None:
        for b, length in enumerate(self.cache.lengths):
            if length == 0:
                continue
            history = self.history[b, :length]
            error = (self.layer(history)[-1] - self.last[b]).norm() / self.last[b].norm()
            assert error < 1e-4 or self._is_near_tie(history), f"sequence {b} of {length}: error {error:.1e}"

    def _is_near_tie(self, history: Tensor) -> bool:
        positions, indexer = torch.arange(len(history)), self.layer.indexer
        _, _, q_lora = self.layer._project(history, positions)
        q, weights = indexer.queries(history, q_lora, positions)
        ke = (positions + 1).int()
        logits = reference.index_logits(q, indexer.keys(history, positions), weights, ke * 0, ke)
        order = logits[-1].sort(descending=True).values
        gap = order[TOPK - 1] - order[TOPK] if len(order) > TOPK else torch.inf
        return bool(gap < NEAR_TIE * order[0].abs())


class Engine:
    """Paged caches shared by sequences: ``check`` compares with the reference on contiguous copies."""

    PAGE, HEADS, D, INDEX_D = 8, 4, 40, 32

    def __init__(self, seed: int):
        self.random, self.g = random.Random(seed), torch.Generator().manual_seed(seed)
        pages = SEQUENCES * MAX_TOKENS // self.PAGE // 2  # too few for all: sequences are evicted
        self.kv = torch.full((pages, self.PAGE, self.D), float("nan"))
        self.index_k = torch.full((pages, self.PAGE, self.INDEX_D), float("nan"))
        self.free, self.tables = list(range(pages)), [[] for _ in range(SEQUENCES)]
        self.lengths, self.done = [0] * SEQUENCES, None

    def release(self, b: int) -> None:
        for page in self.tables[b]:
            self.kv[page], self.index_k[page] = float("nan"), float("nan")
        self.free += self.tables[b]
        self.random.shuffle(self.free)
        self.tables[b], self.lengths[b] = [], 0

    def step(self) -> None:
        for b in range(SEQUENCES):
            if self.lengths[b] == MAX_TOKENS or self.random.random() < 0.01:
                self.release(b)
            if self.lengths[b] == len(self.tables[b]) * self.PAGE:
                while not self.free:
                    self.release(self.random.choice([o for o in range(SEQUENCES) if o != b]))
                self.tables[b].append(self.free.pop())
            slot = self.tables[b][-1], self.lengths[b] % self.PAGE
            self.kv[slot], self.index_k[slot] = self.normal(self.D), self.normal(self.INDEX_D)
            self.lengths[b] += 1
        running = [b for b in range(SEQUENCES) if self.lengths[b]]
        n = len(running)
        table = torch.full((n, MAX_TOKENS // self.PAGE), -1, dtype=torch.int32)
        for row, b in enumerate(running):
            table[row, : len(self.tables[b])] = torch.tensor(self.tables[b], dtype=torch.int32)
        index_q, weights = self.normal(n, 4, self.INDEX_D), self.normal(n, 4)
        ke = torch.tensor([self.lengths[b] for b in running], dtype=torch.int32)
        index = index_q, self.index_k, weights, TOPK, ke * 0, ke
        picked = sparse_attn.lightning_topk(*index, block_table=table)
        slots = sparse_attn.physical_slots(picked, table, self.PAGE)
        q = self.normal(n, self.HEADS, self.D)
        out = sparse_attn.sparse_mla(q, self.kv, slots, d_v=32)
        self.done = running, index_q, weights, picked, q, out

    def check(self) -> None:
        for row, b in enumerate(self.done[0]):
            index_q, weights, picked, q, out = (x[row : row + 1] for x in self.done[1:])
            pages, length = torch.tensor(self.tables[b]), self.lengths[b]
            kv, keys = (x[pages].flatten(0, 1)[:length] for x in (self.kv, self.index_k))
            ke = torch.tensor([length], dtype=torch.int32)
            logits = sparse_attn.index_logits(index_q, keys, weights, ke * 0, ke)
            assert torch.equal(picked, reference.select_topk(logits, TOPK, ke * 0, ke))
            expected, *_ = reference.sparse_mla(q.double(), kv.double(), picked, 32, self.D**-0.5)
            assert_close(out, expected)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.g)


def soak(steps: int, seed: int = 0, show=lambda step: None) -> None:
    """Raise AssertionError where a result is wrong or memory grows."""
    users, before = [Layer(seed), Engine(seed)], None
    warm, check_every = max(steps // 20, min(steps // 2, 200)), max(steps // 1000, 40)
    for step in range(steps):
        users[step % 2].step()
        if step % check_every < 2:
            users[step % 2].check()
        if step == warm:
            before = measure()
        if step % max(steps // 20, 1) == 0:
            show(step)
    if before is None:
        return
    after = measure()
    assert after[0] - before[0] < GROWTH_BYTES, f"resident bytes grew from {before[0]} to {after[0]}"
    assert after[1] - before[1] < GROWTH_OBJECTS, f"objects grew from {before[1]} to {after[1]}"


def measure() -> tuple[int, int]:
    """Bytes in use and live objects."""
    gc.collect()
    return_free_memory()  # a reserve would hide a leak, or look like one
    return resident(), len(gc.get_objects())


def resident() -> int:
    """Resident bytes without mapped files, whose pages come and go; 0 where the system does not say."""
    status = Path("/proc/self/status")
    return int(status.read_text().split("RssAnon:")[1].split()[0]) * 1024 if status.exists() else 0


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000, help="default 100000")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    options = parser.parse_args(arguments)
    start = time.perf_counter()

    def show(step: int) -> None:
        seconds, mib = time.perf_counter() - start, resident() / 2**20
        print(f"{step:>9,} steps, {seconds:6.1f} s, {mib:.1f} MiB", flush=True)

    with torch.inference_mode():
        try:
            soak(options.steps, options.seed, show)
        except AssertionError as error:
            sys.exit(f"Wrong: {error}")
    print(f"{options.steps:,} steps in {time.perf_counter() - start:.0f} s: results right, memory constant.")


if __name__ == "__main__":
    main()
