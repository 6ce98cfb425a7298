"""Which launch configuration a device gets.

A table has an entry per architecture (90 is sm_90). A device takes the entry of its own architecture or of
the nearest older one. Entries were chosen by compiling with Triton 3.9 for each architecture, and on sm_90 by
times. Triton 3.6 to 3.9 have a budget each (benchmarks/kernels_budget), with which
``benchmarks/kernels_report.py`` compares what these tables give. Few loops spill registers: on sm_90 those of
sparse_mla over fp8 with 32 and 64 heads (Triton 3.9), where that was the fastest, and with 64 heads (3.6 and
3.7), 12 to 36 instructions of about 1,000, as the tile that spills nothing is 6 % slower even where neither
does; on sm_100, with 3.7, that of 16 heads, 18 of 1,185, and one register in a kernel of select_topk.
"""

import functools
from typing import Any, NamedTuple, TypeVar

import torch
import triton

from .arguments import cdiv

TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
# What sm_90 gives to sparse_mla_hopper.py: "measured" is what was right and faster on an H200, bf16 caches
# and multiples of 64 heads; "all" is also what has not been timed there; or "none".
WARP_SPECIALISED = "measured"
# What attention_launches counts beside the keys of a program, as so many keys would take. An H200 attended to
# 21 to 31 keys per microsecond, so counted, in decodes of 1, 32 and 128 queries with 16, 64 and 128 heads.
PROGRAM_KEYS = 128  # start, load of q, the first gather, store
LAUNCH_KEYS = 96  # one more kernel
PART_KEYS = 160  # of 64 heads: a partial result is stored in fp32 and read again
MERGE_KEYS = 4  # of each split, as parts are merged one after the other
MOST_WAVES = 4  # of programs with partial results: bounds the memory for these
LEAST_GAIN = 0.1  # of a second launch, for whose queries sums are rounded otherwise: not in long prefills
# Of batch_invariant attention: keys of a part, and rows of partial results at a time, 128 MiB for d_v = 512.
INVARIANT_KEYS, INVARIANT_ROWS = 512, 1 << 16
T = TypeVar("T")


class AttentionConfig(NamedTuple):
    BLOCK_N: int  # keys per tile
    num_warps: int
    num_stages: int
    SKIP_EMPTY: bool = False  # these two: see online_softmax.add_tile
    KEYS_ON_M: bool = False
    blocks: int = 1  # that should share an SM


class IndexConfig(NamedTuple):
    MAX_HEADS: int  # of all queries of a program
    BLOCK_N: int  # keys per tile
    num_warps: int
    num_stages: int


# Tables of attention: architecture -> heads per program (BLOCK_H) -> the rest. Times beside entries of sm_90
# are of an H200 with Triton 3.9: 128 queries of 2048 keys each, with 16, 32 or 128 heads.

# For d_v = 512 and 64 RoPE columns. A key and a head take 1152 bytes of shared memory each; the fp32
# accumulator [BLOCK_H, 512] bounds BLOCK_H. No entry computes a product twice unless a comment says so.
# With 5 stages the next tile is in flight, in a buffer of its own, while one is computed. With 3 stages only
# its indices are in flight: another block on the SM has to compute meanwhile.
# SKIP_EMPTY puts the scores under an `if`, which also changes the layout that the compiler gives them. Tiles
# of 64 heads need it: without it sm_90 computes every score in both warpgroups (72 wgmma, not 36) and spills,
# and sm_100 takes 281 KiB of shared memory.
# KEYS_ON_M computes the scores transposed: mma.sync then reads the query after the barrier that the keys wait
# for. Otherwise all of the query is loaded at once, 8 registers per thread for each head, and some spill.
SPARSE_MLA = {
    # 163 KiB of shared memory
    80: {
        16: AttentionConfig(32, 4, 3, blocks=2),
        32: AttentionConfig(32, 4, 3, KEYS_ON_M=True, blocks=2),
        64: AttentionConfig(32, 8, 5, KEYS_ON_M=True),
    },
    # 99 KiB, also sm_89
    86: {16: AttentionConfig(32, 4, 5), 32: AttentionConfig(16, 4, 5, KEYS_ON_M=True)},
    # 227 KiB. For 64 heads wgmma needs tiles of 64 keys. Three of them do not fit: the kernel waits for each.
    90: {
        16: AttentionConfig(64, 4, 5),  # 77 us; with 8 warps 90
        32: AttentionConfig(64, 8, 5),  # 123 us; tiles of 32 keys 124 and more
        64: AttentionConfig(64, 8, 2, SKIP_EMPTY=True),  # 287 us; (32, 8, 5) with the gather in flight 303
    },
    # 227 KiB
    100: {
        16: AttentionConfig(64, 4, 3, blocks=2),
        32: AttentionConfig(64, 8, 5),
        64: AttentionConfig(32, 8, 5, SKIP_EMPTY=True),
    },
    # 99 KiB
    120: {16: AttentionConfig(32, 4, 5), 32: AttentionConfig(16, 4, 5, KEYS_ON_M=True)},
}
# DeepSeek-V3.2's format. Rows are gathered as bytes, and lie in shared memory a second time as [BLOCK_N, 512]
# of q's dtype. On sm_90 the best of 32 and 64 heads spill a little in the loop.
SPARSE_MLA_FP8 = {
    80: {
        16: AttentionConfig(32, 4, 3, blocks=2),
        32: AttentionConfig(16, 4, 3, KEYS_ON_M=True, blocks=2),
        64: AttentionConfig(32, 8, 5, KEYS_ON_M=True),
    },
    86: {16: AttentionConfig(32, 4, 5), 32: AttentionConfig(16, 4, 5, KEYS_ON_M=True)},
    90: {
        16: AttentionConfig(64, 8, 5),  # 131 us; with 4 warps 120, but 24 spills in the loop
        32: AttentionConfig(32, 4, 3, KEYS_ON_M=True, blocks=2),  # 150 us; 16 keys 181
        64: AttentionConfig(64, 8, 3, SKIP_EMPTY=True),  # 342 us; (32, 8, 5) 398, with KEYS_ON_M 500
    },
    100: {
        16: AttentionConfig(64, 8, 5),
        32: AttentionConfig(16, 4, 3, KEYS_ON_M=True, blocks=2),
        64: AttentionConfig(32, 8, 5, KEYS_ON_M=True),
    },
    120: {
        # Larger tiles spill. Scores of 16 heads are two tiles of mma.sync, so pairs of warps repeat them.
        16: AttentionConfig(16, 4, 3, KEYS_ON_M=True, blocks=2),
        32: AttentionConfig(16, 4, 5, KEYS_ON_M=True),
    },
}
# The other formats; DeepSeek-V4's takes the most registers to decode. Nothing of sm_90 is measured for them.
SPARSE_MLA_PACKED = SPARSE_MLA_FP8 | {90: SPARSE_MLA_FP8[100]}
# Keys of more columns than 512 + 64, up to 1024.
SPARSE_MLA_WIDE = {80: {16: AttentionConfig(16, 4, 2)}}
# Rows of twice the size, IEEE products on the FMA units.
SPARSE_MLA_FP32 = {80: {16: AttentionConfig(16, 8, 1)}}

# A stage holds BLOCK_N rows of k and of v: 64 KiB for 64 rows and d = d_v = 256. Two blocks share an SM: one
# gathers while the other computes. On sm_90 SKIP_EMPTY saves the registers that a tile of 64 heads needs.
SPARSE_GQA = {
    # 163 KiB
    80: {16: AttentionConfig(64, 4, 2, blocks=2), 32: AttentionConfig(64, 4, 2, blocks=2)},
    # 99 KiB, also sm_89
    86: {16: AttentionConfig(32, 4, 2, blocks=2), 32: AttentionConfig(32, 4, 2, blocks=2)},
    # 227 KiB
    90: {
        16: AttentionConfig(64, 4, 2, blocks=2),
        32: AttentionConfig(64, 4, 2, blocks=2),
        64: AttentionConfig(64, 4, 2, SKIP_EMPTY=True, blocks=2),
    },
    # 227 KiB
    100: {
        16: AttentionConfig(64, 4, 2, blocks=2),
        32: AttentionConfig(64, 4, 2, blocks=2),
        64: AttentionConfig(64, 8, 5, blocks=2),
    },
    # 99 KiB
    120: {16: AttentionConfig(32, 4, 2, blocks=2), 32: AttentionConfig(32, 4, 2, blocks=2)},
}
SPARSE_GQA_FP32 = {80: {16: AttentionConfig(16, 4, 2, blocks=2)}}  # as SPARSE_MLA_FP32

# Keys are the rows of the product (M), so that the sum over heads stays within few threads. A stage holds
# BLOCK_N keys, 16 KiB for 64 in bf16, beside q, 64 KiB for 256 heads; the [BLOCK_N, MAX_HEADS] fp32 scores
# stay in registers. On sm_90 four queries share tiles of 64 keys, which lie in one page each as pages usually
# have 64. Two blocks share an SM: the tensor cores work for one while the other sums over heads. Times are of
# an H200 with Triton 3.9: 1 and 32 sequences of 128k tokens in pages, and a prefill of 4096 of 32k.
INDEX_LOGITS = {
    80: IndexConfig(128, 128, 8, 3),  # 163 KiB of shared memory
    86: IndexConfig(128, 128, 8, 2),  # 99 KiB, also sm_89
    90: IndexConfig(256, 64, 4, 3),  # 227 KiB; 17, 272 and 3,332 us; half the heads 19, 276 and 3,726
    100: IndexConfig(128, 128, 8, 3),  # 227 KiB
    120: IndexConfig(128, 128, 8, 2),  # 99 KiB
}
# Products of e4m3.
INDEX_LOGITS_FP8 = {
    89: IndexConfig(128, 128, 8, 3),
    90: IndexConfig(256, 64, 4, 3),  # 13, 165 and 2,540 us; 4 stages 13, 177 and 2,538
    100: IndexConfig(128, 128, 8, 3),
}
# Keys decoded before the product. Without instructions for e4m3 this takes registers: half of the keys, in
# two programs per SM.
INDEX_LOGITS_QUANTISED = {
    80: IndexConfig(128, 64, 4, 3),
    89: IndexConfig(128, 128, 8, 3),
    90: IndexConfig(128, 64, 4, 4),
    100: IndexConfig(128, 128, 8, 3),
}
INDEX_LOGITS_FP32 = {80: IndexConfig(64, 32, 8, 2)}  # IEEE products on the FMA units
# Decoded keys stay in registers: a short tile.
INDEX_LOGITS_FP32_QUANTISED = {80: IndexConfig(64, 16, 8, 1)}

TABLES: dict[str, dict[str, dict[int, Any]]] = {  # op -> its tables; other ops have none
    "sparse_mla": {
        "CONFIGS": SPARSE_MLA,
        "CONFIGS_FP8": SPARSE_MLA_FP8,
        "CONFIGS_PACKED": SPARSE_MLA_PACKED,
        "CONFIGS_WIDE": SPARSE_MLA_WIDE,
        "CONFIGS_FP32": SPARSE_MLA_FP32,
    },
    "sparse_gqa": {"CONFIGS": SPARSE_GQA, "CONFIGS_FP32": SPARSE_GQA_FP32},
    "index_logits": {
        "CONFIGS": INDEX_LOGITS,
        "CONFIGS_FP8": INDEX_LOGITS_FP8,
        "CONFIGS_QUANTISED": INDEX_LOGITS_QUANTISED,
        "CONFIGS_FP32": INDEX_LOGITS_FP32,
        "CONFIGS_FP32_QUANTISED": INDEX_LOGITS_FP32_QUANTISED,
    },
}


@functools.cache
def architecture(device: torch.device) -> int:
    """10 * major + minor of a GPU's compute capability; Triton's interpreter, on the CPU, counts as sm_80."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def nearest(table: dict[int, T], arch: int) -> T | None:
    """The entry of this architecture, or of the nearest older one; None where all are newer."""
    return table.get(max((a for a in table if a <= arch), default=0))


def for_device(table: dict[int, T], device: torch.device) -> T:
    """The entry that the device takes."""
    arch = architecture(device)
    entry = nearest(table, arch)
    if entry is None:
        raise RuntimeError(f"the kernels need sm_{min(table)} or newer, {device} is sm_{arch}")
    return entry


def has_native_fp8(device: torch.device) -> bool:
    """Whether the device has instructions that convert e4m3."""
    return architecture(device) >= 89


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many the GPU has; Triton's interpreter counts as an A100."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 108


class Launch(NamedTuple):
    queries: slice
    splits: int  # programs that share the keys of one query


class Tiling(NamedTuple):
    block_h: int  # heads per program
    config: AttentionConfig
    launches: tuple[Launch, ...]


def attention_tiling(
    table: dict[int, dict[int, AttentionConfig]],
    queries: int,
    groups: int,
    heads: int,
    topks: list[int],
    device: torch.device,
    batch_invariant: bool,
) -> Tiling:
    """How the heads of each query, ``groups`` of ``heads`` which read the same keys, become programs.

    The smallest tile that holds all heads of a group, else the largest. ``topks``: indices of each segment.
    """
    by_heads = for_device(table, device)
    block_h = min((size for size in by_heads if size >= heads), default=max(by_heads))
    config = by_heads[block_h]
    programs, slots = groups * cdiv(heads, block_h), config.blocks * multiprocessors(device)
    tiles = sum(cdiv(topk, config.BLOCK_N) for topk in topks)
    if batch_invariant:
        launches = invariant_launches(queries, groups * heads, tiles, config.BLOCK_N)
    else:
        launches = attention_launches(queries, programs, tiles, config.BLOCK_N, block_h, slots)
    return Tiling(block_h, config, launches)


@functools.lru_cache(maxsize=4096)
def attention_launches(
    queries: int, programs: int, tiles: int, block_n: int, block_h: int, slots: int
) -> tuple[Launch, ...]:
    """Kernels that attend from ``queries`` in the least time, if all programs of a wave end together.

    A query has ``programs`` of ``block_h`` heads, each with ``tiles`` of ``block_n`` keys; ``slots`` programs
    run at once. Few queries are split over their keys: 88 programs leave a third of 132 slots idle, and 3
    splits of each fill two shorter waves. Of more queries than a wave holds, whole waves are one launch, and
    the rest, whose own wave would be part empty, another if that saves a tenth. Shapes and the device alone
    decide: captured graphs stay valid, results repeat.
    """

    def duration(queries: int, splits: int) -> int:
        keys = cdiv(tiles, splits) * block_n + PROGRAM_KEYS
        keys += PART_KEYS * block_h // 64 if splits > 1 else 0
        waves = cdiv(queries * programs * splits, slots)
        return waves * keys + (LAUNCH_KEYS + MERGE_KEYS * splits if splits > 1 else 0)

    def shortest(first: int) -> tuple[int, Launch]:
        """The best number of splits for the queries from ``first`` on: the fewest of those that end first."""
        rest = queries - first
        most = min(tiles, MOST_WAVES * slots // (rest * programs))
        time, splits = min((duration(rest, n), n) for n in range(1, max(1, most) + 1))
        return time, Launch(slice(first, queries), splits)

    time, launch = shortest(0)
    wave = slots // programs  # queries
    whole = queries // wave * wave if wave else 0
    if 0 < whole < queries:
        rest_time, rest = shortest(whole)
        if duration(whole, 1) + LAUNCH_KEYS + rest_time < (1 - LEAST_GAIN) * time:
            return Launch(slice(0, whole), 1), rest
    return (launch,)


def invariant_launches(queries: int, heads: int, tiles: int, block_n: int) -> tuple[Launch, ...]:
    """Kernels in which the keys of a query are divided alike whatever the number of queries.

    Parts of ``INVARIANT_KEYS`` keys keep a GPU busier in a small batch than one program per query does, and
    are long enough that their merge takes a small share. Not timed on a GPU yet. Partial results, which take
    fp32 rows, bound the queries of a launch.
    """
    splits = max(1, cdiv(tiles * block_n, INVARIANT_KEYS))
    most = queries if splits == 1 else max(1, INVARIANT_ROWS // (splits * heads))
    starts = range(0, queries, most)
    return tuple(Launch(slice(start, min(start + most, queries)), splits) for start in starts)


def chosen(kernel: str, architecture: int) -> dict[str, Any]:
    """What each table of a kernel gives an architecture; by heads per program where it depends on them."""
    found: dict[str, Any] = {}
    if kernel == "sparse_mla" and architecture == 90:
        takes = {"measured": "bf16 and multiples of 64 heads", "all": "all that it can", "none": "nothing"}
        found["warp-specialised"] = {
            "takes": takes[WARP_SPECIALISED] if TRITON >= (3, 9) else "nothing: it needs Triton 3.9"
        }
    for name, table in TABLES.get(kernel, {}).items():
        entry = nearest(table, architecture)
        if isinstance(entry, dict):
            found[name] = {str(heads): config._asdict() for heads, config in entry.items()}
        elif entry is not None:
            found[name] = entry._asdict()
    return found
