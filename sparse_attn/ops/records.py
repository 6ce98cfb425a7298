"""Records, the arguments of an op as a NamedTuple: their schema, parts of them, and the definition on one."""

import functools
from collections.abc import Iterator
from typing import Annotated, Any, get_type_hints

from torch import Tensor

from .. import reference

Output = Annotated[Tensor, "output"]  # the op fills all of it; the reference returns it
OptionalOutput = Annotated[Tensor | None, "output"]  # the same, where the caller wants it
Cache = Annotated[Tensor, "cache"]  # the op writes slots of it, and so does the reference

SCHEMA_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    int: "int",
    float: "float",
    bool: "bool",
    str | None: "str?",
}

# The fields of all records whose first dimension is that of the queries.
PER_QUERY = {"q", "weights", "ks", "ke", "q_scale", "logits", "out", "lse", "max_logits"}
PER_QUERY |= {"indices", "topk_length", "extra_indices", "extra_topk_length", "scores"}
HINTS = {"clean", "workspace_bytes", "batch_invariant"}  # how to compute, not what


def schema(record: Any) -> str:
    """The ``torch.library`` schema of a record."""
    aliases, arguments = iter("abcdefgh"), []
    for field, hint in get_type_hints(record, include_extras=True).items():
        if hint in (Output, Cache, OptionalOutput):
            kind = f"Tensor({next(aliases)}!)" + "?" * (hint == OptionalOutput)
        else:
            kind = SCHEMA_TYPES[hint]
        default = f"={record._field_defaults[field]}" if field in record._field_defaults else ""
        arguments.append(f"{kind} {field}{default}")
    return f"({', '.join(arguments)}) -> ()"


@functools.cache
def _outputs(record: Any) -> tuple[str, ...]:
    hints = get_type_hints(record, include_extras=True)
    return tuple(field for field, hint in hints.items() if hint in (Output, OptionalOutput))


def run_reference(name: str, a: Any) -> None:
    """Run the definition, by keyword: the outputs that it returns are copied, caches it writes itself."""
    if getattr(a, "batch_invariant", False) and a[0].shape[0] > 1:  # torch's products depend on their sizes
        for query in in_chunks(a, 1):
            run_reference(name, query)
        return
    outputs = _outputs(type(a))
    inputs = {f: x for f, x in a._asdict().items() if f not in outputs and f not in HINTS}
    results = getattr(reference, name)(**inputs)
    for field, result in zip(outputs, results if isinstance(results, tuple) else (results,), strict=False):
        if (output := getattr(a, field)) is not None:
            output.copy_(result)


def of_queries(a: Any, t: slice) -> Any:
    """The record of the queries from t.start to t.stop; its block table stays whole."""
    parts = {f: x[t] for f, x in a._asdict().items() if f in PER_QUERY and x is not None}
    if (cu_seqlens_q := getattr(a, "cu_seqlens_q", None)) is not None:
        parts["cu_seqlens_q"] = (cu_seqlens_q - t.start).clamp(0, t.stop - t.start)
    return a._replace(**parts)


def in_chunks(a: Any, queries: int) -> Iterator[Any]:
    """Records of at most ``queries`` queries, one at least, each with its rows of the block table.

    The first field of ``a`` has a row per query. A record has whole rows of the table, or a part of one; with
    ``cu_seqlens_q`` it keeps all of the table.
    """
    s_q, table, queries = a[0].shape[0], getattr(a, "block_table", None), max(1, queries)
    if getattr(a, "cu_seqlens_q", None) is not None:
        table = None
    if 0 < s_q <= queries:  # the usual case, at no cost
        yield a
        return
    of_row = s_q if table is None else s_q // max(1, len(table))  # queries of each row of the table
    group = max(1, queries // max(1, of_row)) * of_row
    for first in range(0, s_q, max(1, group)):
        for start in range(first, last := min(first + group, s_q), queries):
            part = of_queries(a, slice(start, stop := min(start + queries, last)))
            if table is not None:
                part = part._replace(block_table=table[start // of_row : -(-stop // of_row)])
            yield part
