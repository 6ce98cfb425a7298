"""What a type checker makes of calls whose result depends on an argument: pyright runs over it."""

from torch import Tensor
from typing_extensions import assert_type

from sparse_attn import lightning_topk, sparse_gqa, sparse_mla


def calls(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, wanted: bool) -> None:
    assert_type(sparse_mla(q, k, indices), Tensor)
    assert_type(sparse_mla(q, k, indices, d_v=64, attn_sink=v, backend="cpu"), Tensor)
    assert_type(sparse_mla(q, k, indices, kv_format="nope", extra_kv=k, extra_kv_format="v41"), Tensor)
    assert_type(sparse_mla(q, k, indices, return_lse=True), tuple[Tensor, Tensor])
    assert_type(sparse_mla(q, k, indices, return_max_logits=True), tuple[Tensor, Tensor])
    both = sparse_mla(q, k, indices, return_lse=True, return_max_logits=True, out=(q, k, v))
    assert_type(both, tuple[Tensor, Tensor, Tensor])
    assert_type(sparse_mla(q, k, indices, return_lse=wanted), Tensor | tuple[Tensor, ...])
    assert_type(sparse_gqa(q, k, v, indices), Tensor)
    assert_type(sparse_gqa(q, k, v, indices, return_lse=True), tuple[Tensor, Tensor])
    assert_type(lightning_topk(q, k, v, 9, block_table=indices), Tensor)
    assert_type(lightning_topk(q, k, v, 9, q, k, return_scores=True, out=(q, k)), tuple[Tensor, Tensor])
    sparse_mla(q, k, indices, no_such_argument=1)  # pyright: ignore[reportCallIssue]
