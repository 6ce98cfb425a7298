"""What a step of an attention layer costs when it is divided over many cards: arithmetic, nothing runs.

A step is the sum of its parts: no part overlaps another. A kernel takes its floor, and the longer of bytes /
bandwidth and operations / peak (bench/limits.py counts both); a collective takes a latency, and bytes
received / bandwidth. Bytes come from sparse_attn/distributed/traffic.py, and what travels is chosen as in
sparse_attn/distributed/division.py, with one position at a time dealt to each rank. Left out: element-wise
kernels of the projections (the same in every division) and everything of a model but attention.
"""

import dataclasses
import math
from typing import NamedTuple

from sparse_attn import DSAConfig
from sparse_attn.distributed import traffic
from sparse_attn.ops.index import DEFAULT_WORKSPACE_BYTES

from .limits import Work, attention_work, index_work

LAYERS = 61  # of DeepSeek-V3.2
PARTS = ("projections", "indexer", "top-k", "merge", "attention", "collectives")


@dataclasses.dataclass(frozen=True)
class Rate:
    """Of a kind of kernel."""

    floor: float  # seconds that a launch takes however little it does
    bytes_per_second: float
    operations_per_second: float = math.inf

    def seconds(self, work: Work, launches: int = 1) -> float:
        computing = work.operations / self.operations_per_second
        return launches * self.floor + max(computing, work.bytes / self.bytes_per_second)


@dataclasses.dataclass(frozen=True)
class TopK:
    """Of ``select_topk``: few long rows are cut into segments, see kernels/select_topk.py."""

    floor: float
    cut: float  # seconds more where rows are cut: two more launches
    scores_per_second: float
    scores_per_second_of_a_program: float

    def seconds(self, rows: float, columns: int) -> float:
        segments = min(int(256 / rows), columns // 4096, 64)
        segments = 1 << segments.bit_length() - 1 if segments >= 4 else 1
        rate = min(self.scores_per_second, rows * segments * self.scores_per_second_of_a_program)
        return self.floor + (self.cut if segments > 1 else 0.0) + rows * columns / rate


@dataclasses.dataclass(frozen=True)
class Device:
    name: str
    memory_bytes: float
    project: Rate
    index: Rate
    topk: TopK
    attend: Rate
    merge: Rate  # merge_attention, and the copies around a collective
    candidates: Rate  # the k best of candidates, of which one has 8 bytes; torch's operations


@dataclasses.dataclass(frozen=True)
class Link:
    latency: float  # seconds of a collective however little it moves
    bytes_per_second: float  # that a rank receives


@dataclasses.dataclass(frozen=True)
class Links:
    """Between cards. A group of ranks that does not fit a node takes the slower link for all its bytes."""

    within: Link
    across: Link
    cards_of_a_node: int = 8

    def seconds(self, collective: "Collective") -> float:
        fits = collective.ranks * collective.stride <= self.cards_of_a_node
        link = self.within if fits else self.across
        return collective.calls * link.latency + collective.received / link.bytes_per_second


# Measured, benchmarks/records/2026-11-27-h200.jsonl; a test compares each rate with its lines there. Of
# `candidates` only torch.topk was measured, and on fp32 (57 us for 64 rows of 8,192, 493 us for 4,096 rows):
# it is taken to need twice that time for int64, and the sort and 15 small kernels around it 55 us. The floor
# of a matrix product is an assumption too. A graph of the whole layer was not timed on this card.
H200 = Device(
    name="H200",
    memory_bytes=141e9,
    project=Rate(5e-6, 4.28e12, 791e12),
    index=Rate(8e-6, 4.15e12, 670e12),
    topk=TopK(15e-6, 6e-6, 300e9, 1.15e9),
    attend=Rate(17.5e-6, 4.6e12, 566e12),
    merge=Rate(7.5e-6, 4.28e12),
    candidates=Rate(112e-6, 0.3e12),
)
# Assumptions: nothing was measured between cards. NVLink, of whose 450 GB/s per direction a collective is
# taken to reach 350, and InfiniBand of 400 Gb/s per card.
NVLINK = Link(12e-6, 350e9)
INFINIBAND = Link(30e-6, 45e9)
NODES_OF_8 = Links(NVLINK, INFINIBAND)


class Format(NamedTuple):
    """Bytes that a cache holds for each token and layer."""

    kv: int
    index: int


BF16, FP8 = Format(1152, 256), Format(656, 132)


class Step(NamedTuple):
    sequences: int
    tokens: int  # new ones of each
    context: int  # of each, the new ones included

    @property
    def queries(self) -> int:
        return self.sequences * self.tokens


class Split(NamedTuple):
    """Of cards; those along "cp" are neighbours, as in a mesh with the dimensions (tp, cp)."""

    tp: int
    cp: int

    @property
    def size(self) -> int:
        return self.tp * self.cp

    def __str__(self) -> str:
        parts = [f"{name} {n}" for name, n in zip(self._fields, self, strict=True) if n > 1]
        return " x ".join(parts) or "one"


def splits(cards: int) -> list[Split]:
    return [Split(tp, cards // tp) for tp in range(1, cards + 1) if cards % tp == 0]


class Collective(NamedTuple):
    part: str
    ranks: int
    stride: int  # between neighbours of the group
    received: int
    calls: int = 1


@dataclasses.dataclass(frozen=True)
class Division:
    """How the ranks share a step: the choices of sparse_attn/distributed/division.py, and their bytes."""

    config: DSAConfig
    step: Step
    split: Split
    stored: Format = BF16
    element_bytes: int = 2  # of hidden states, queries and outputs

    def __post_init__(self) -> None:
        if self.step.context <= self.config.index_topk:
            raise ValueError(
                f"context: expected more than the {self.config.index_topk} tokens that are selected, got "
                f"{self.step.context}"
            )
        if self.config.num_attention_heads % self.split.size:
            raise ValueError(
                f"split: expected cards that divide {self.config.num_attention_heads} heads, "
                f"got {self.split.size}"
            )

    @property
    def heads(self) -> int:
        """Of one card."""
        return self.config.num_attention_heads // self.split.size

    @property
    def rows(self) -> int:
        """Of each sequence on one card."""
        return -(-self.step.context // self.split.cp)

    @property
    def own(self) -> int:
        """Queries for which the ranks along "cp" select."""
        return traffic.share(self.step.queries, self.split.tp)

    @property
    def d_qk(self) -> int:
        return self.config.kv_lora_rank + self.config.qk_rope_head_dim

    def _keys(self, row_bytes: int) -> int:
        return traffic.keys(self.step.sequences * self.rows, row_bytes, self.split.cp)

    def _candidates(self) -> tuple[int, int]:
        """Bytes of a selection, if keys travel and if candidates do."""
        topk, cp = self.config.index_topk, self.split.cp
        columns = min(topk, self.rows)
        keys = self._keys(self.stored.index) + traffic.selected(self.own, topk, cp)
        return keys, traffic.candidates(self.own, columns, topk, cp)

    @property
    def index_keys_travel(self) -> bool:
        keys, candidates = self._candidates()
        return keys < candidates

    def _partial_outputs(self) -> int:
        sizes = self.heads, self.d_qk, self.config.kv_lora_rank, self.element_bytes, self.split.cp
        return traffic.partial_outputs(self.step.queries, *sizes)

    @property
    def keys_travel(self) -> bool:
        return self._keys(self.stored.kv) < self._partial_outputs()

    def parts_of_keys(self, row_bytes: int) -> int:
        """In how many parts keys are gathered, so that they fit the workspace."""
        row = 2 * self.split.cp * self.step.sequences * row_bytes
        return -(-self.rows // max(1, DEFAULT_WORKSPACE_BYTES // row))

    @property
    def parts_of_queries(self) -> int:
        """In how many parts queries go to the keys."""
        query = self.split.cp * self.heads * (self.d_qk + 2 * self.config.kv_lora_rank) * self.element_bytes
        return -(-self.step.queries // max(1, DEFAULT_WORKSPACE_BYTES // query))

    def collectives(self) -> list[Collective]:
        (tp, cp), queries = self.split, self.step.queries
        made = []
        if cp > 1:
            keys, candidates = self._candidates()
            calls = 1 if self.own < 2 else 2
            if self.index_keys_travel:
                calls = self.parts_of_keys(self.stored.index) + (self.own > 1)
            made.append(Collective("selection", cp, 1, min(keys, candidates), calls))
        if tp > 1 and queries > 1:
            selected = traffic.selected(queries, self.config.index_topk, tp)
            made.append(Collective("selection", tp, cp, selected))
        if cp > 1:
            keys, outputs = self._keys(self.stored.kv), self._partial_outputs()
            calls = self.parts_of_keys(self.stored.kv) if self.keys_travel else 2 * self.parts_of_queries
            made.append(Collective("attention", cp, 1, min(keys, outputs), calls))
        out = queries * self.config.hidden_size * self.element_bytes
        # traffic.py has no formula of a sum, as nothing is chosen by it: a ring sends a tensor twice.
        groups = [(n, stride) for n, stride in ((cp, 1), (tp, cp)) if n > 1]
        return made + [Collective("output", n, stride, 2 * out * (n - 1) // n) for n, stride in groups]

    def received(self) -> dict[str, int]:
        """Bytes per card and part of the layer."""
        bytes_of = dict.fromkeys(("selection", "attention", "output"), 0)
        for collective in self.collectives():
            bytes_of[collective.part] += collective.received
        return bytes_of

    def keys_bytes(self) -> int:
        """Of the cache of one layer, on one card."""
        return self.step.sequences * self.rows * sum(self.stored)

    def weights(self) -> tuple[int, int]:
        """Weights of the projections that one card holds: of those that all have, and its share of others."""
        c = self.config
        wide = c.hidden_size * (c.q_lora_rank + self.d_qk + c.index_head_dim + c.index_n_heads)
        every = wide + c.q_lora_rank * c.index_n_heads * c.index_head_dim
        nope, rope, v = c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim
        of_a_head = c.q_lora_rank * (nope + rope) + c.kv_lora_rank * (nope + v) + v * c.hidden_size
        return every, self.heads * of_a_head

    def seconds(self, device: Device, links: Links) -> dict[str, float]:
        """Of each part of the step, on every card."""
        return {
            "projections": self._projections(device),
            **self._selection(device),
            "merge": self._merge(device),
            "attention": self._attention(device),
            "collectives": sum(map(links.seconds, self.collectives())),
        }

    def projection_work(self) -> Work:
        weights = sum(self.weights())
        return Work(2 * weights * self.step.queries, weights * self.element_bytes)

    def _projections(self, device: Device) -> float:
        return device.project.seconds(self.projection_work(), launches=9)

    def _selecting(self) -> tuple[int, int, int]:
        """Queries for which one card scores keys, how many keys at a time, and how many times."""
        if not self.index_keys_travel:
            return self.own, self.rows, 1
        parts = self.parts_of_keys(self.stored.index)
        return traffic.share(self.own, self.split.cp), -(-self.step.context // parts), parts

    def index_work(self) -> Work:
        queries, keys, parts = self._selecting()
        sequences = -(-self.step.sequences * queries // self.step.queries)  # whose keys it reads
        sizes = self.config.index_n_heads, self.config.index_head_dim, self.element_bytes
        return index_work(queries / sequences, keys, *sizes) * (sequences * parts)

    def _selection(self, device: Device) -> dict[str, float]:
        queries, keys, parts = self._selecting()
        passes = -(-4 * queries * keys // DEFAULT_WORKSPACE_BYTES)  # whose logits fit the workspace
        return {
            "indexer": device.index.seconds(self.index_work(), parts * passes),
            "top-k": parts * passes * device.topk.seconds(queries / passes, keys),
        }

    def _merge(self, device: Device) -> float:
        """Of candidates and of partial outputs; the outputs of other ranks are copied before and after."""
        if self.split.cp == 1:
            return 0.0
        topk, cp, seconds = self.config.index_topk, self.split.cp, 0.0
        if self.index_keys_travel:
            parts, merged = self.parts_of_keys(self.stored.index), self._selecting()[0] * 2 * topk
            parts = parts if parts > 1 else 0  # one part is the selection
        else:
            parts, merged = 1, traffic.share(self.own, cp) * cp * min(topk, self.rows)
        seconds += parts * device.candidates.seconds(Work(bytes=8 * merged))
        out = self.step.queries * self.heads * (self.config.kv_lora_rank * self.element_bytes + traffic.LSE)
        if self.keys_travel:
            parts = self.parts_of_keys(self.stored.kv)
            copied = 2 * self.step.sequences * self.step.context * self.stored.kv  # put in order
            return seconds + device.merge.seconds(Work(bytes=copied + 3 * out * (parts - 1)), parts)
        # Joined with their lse before they travel, separated after, and merged.
        return seconds + device.merge.seconds(Work(bytes=5 * cp * out), 2 * self.parts_of_queries)

    def _attending(self) -> tuple[int, int, int]:
        """Rows that a query reads on one card, for how many heads, and in how many calls."""
        if self.keys_travel:
            return self.config.index_topk, self.heads, self.parts_of_keys(self.stored.kv)
        calls = self.parts_of_queries if self.split.cp > 1 else 1
        return -(-self.config.index_topk // self.split.cp), self.heads * self.split.cp, calls

    def attention_work(self) -> Work:
        rows, heads, _ = self._attending()
        sizes = heads, self.d_qk, self.config.kv_lora_rank, self.stored.kv, self.element_bytes
        return attention_work(self.step.queries, rows, *sizes)

    def _attention(self, device: Device) -> float:
        return device.attend.seconds(self.attention_work(), self._attending()[2])


def best(
    config: DSAConfig, step: Step, cards: int, device: Device, links: Links
) -> tuple[Division, dict[str, float]] | None:
    """The fastest division whose keys fit beside nothing else, with the seconds of its parts."""
    made = [Division(config, step, split) for split in splits(cards)]
    fit = [division for division in made if LAYERS * division.keys_bytes() <= device.memory_bytes]
    timed = [(division, division.seconds(device, links)) for division in fit]
    return min(timed, key=lambda pair: sum(pair[1].values()), default=None)
