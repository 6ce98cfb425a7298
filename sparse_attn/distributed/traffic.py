"""Bytes that each rank receives in the collectives of a layer, from which its way of working is chosen.

``size`` ranks take part in a collective; all of them receive the same number of bytes.
"""

POSITION = 4  # bytes of a selected position
CANDIDATE = 8  # of a position with its score
LSE = 4


def share(queries: int, size: int) -> int:
    """How many queries each rank takes where they are divided; a single one is not."""
    return queries if queries < 2 else -(-queries // size)


def selected(queries: int, topk: int, size: int) -> int:
    """Each rank selected for its share of the queries, and all need all selections."""
    return 0 if queries < 2 else share(queries, size) * (size - 1) * POSITION * topk


def candidates(queries: int, columns: int, topk: int, size: int) -> int:
    """Each rank selected ``columns`` candidates for each query among its own keys.

    Each query's candidates go to one rank, which tells the others what it selected. Those of a single query
    go to all ranks.
    """
    return share(queries, size) * (size - 1) * CANDIDATE * columns + selected(queries, topk, size)


def keys(rows: int, row_bytes: int, size: int) -> int:
    """All ranks get the ``rows`` of each."""
    return (size - 1) * rows * row_bytes


def partial_outputs(queries: int, heads: int, d_qk: int, d_v: int, element_bytes: int, size: int) -> int:
    """Queries of ``heads`` heads per rank go to all ranks, and partial outputs with their lse come back."""
    return (size - 1) * queries * heads * ((d_qk + d_v) * element_bytes + LSE)
