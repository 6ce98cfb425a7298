"""Wrong arguments are refused before anything runs, and the message names argument, expected and got."""

import pytest
import torch

import sparse_attn
from sparse_attn import DSACache, DSAConfig, SparseGQA, SparseMLA
from sparse_attn.testing import gqa_inputs, index_inputs, mla_inputs


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


INDEX = index_inputs(3, 20, heads=2, d=16)
FP8 = {
    **INDEX,
    "q": INDEX["q"].to(torch.float8_e4m3fn),
    "k": torch.zeros(20, 16, dtype=torch.float8_e4m3fn),
    "k_scale": torch.ones(20),
}
E2M1 = {
    **INDEX,
    "q": torch.zeros(3, 2, 64, dtype=torch.uint8),
    "q_scale": torch.zeros(3, 2, dtype=torch.int32),
    "k": torch.zeros(20, 64, dtype=torch.uint8),
    "k_scale": torch.zeros(20, dtype=torch.int32),
}
MLA = {**mla_inputs(3, 20), "d_v": 32}
GQA = gqa_inputs(3, 20)
TABLE = torch.zeros(3, 2, dtype=torch.int32)
SLOTS = {"indices": TABLE, "block_table": TABLE, "page_size": 4}
SMALL = {
    **{"hidden_size": 32, "num_attention_heads": 4},
    **{"index_n_heads": 2, "index_head_dim": 16, "index_topk": 4, "indexer_rope": "half"},
}
SMALL_MLA = {
    **SMALL,
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8},
}
SMALL_GQA = {**SMALL, "num_key_value_heads": 2, "head_dim": 8}


def cases(name, good, *changes):
    """Calls with ``good`` arguments but for one change: (what is changed, error, words of the message)."""
    return [(name, good, *change) for change in changes]


CASES = [
    *cases(
        "index_logits",
        INDEX,
        ({"q": [1.0]}, TypeError, "q: expected a tensor .* got list"),
        ({"q": torch.zeros(3, 16)}, ValueError, r"q: expected shape \[s_q, .* got \[3, 16\]"),
        ({"q": INDEX["q"].int()}, TypeError, "q: expected dtype bfloat16 or .* got int32"),
        ({"k": INDEX["k"].half()}, TypeError, "k: expected dtype float32, got float16"),
        ({"k": torch.zeros(20, 8)}, ValueError, r"k: .*index_head_dim=16\], got \[20, 8\]"),
        ({"k": INDEX["k"].to("meta")}, ValueError, "k: expected device cpu, got meta"),
        ({"weights": INDEX["weights"].half()}, TypeError, "weights: expected dtype float32"),
        ({"weights": torch.zeros(3, 5)}, ValueError, r"weights: .*index_n_heads=2\], got \[3, 5\]"),
        ({"ks": INDEX["ks"].long()}, TypeError, "ks: expected dtype int32, got int64"),
        ({"cu_seqlens_q": ints(0, 3)}, ValueError, "cu_seqlens_q: expected None without block_table"),
        ({"ke": ints(1, 2)}, ValueError, r"ke: expected shape \[s_q=3\], got \[2\]"),
        ({"block_table": TABLE}, ValueError, r"k: expected shape \[pages, page_size"),
        ({"out": torch.zeros(3, 19)}, ValueError, r"out: expected shape .*20.*, got \[3, 19\]"),
        ({"backend": "cuda"}, ValueError, "backend: expected one of 'auto', .* got 'cuda'"),
        ({"backend": "triton"}, ValueError, "backend: 'triton' needs cuda tensors, got .* cpu"),
        ({"q": FP8["q"]}, TypeError, "k: expected quantised keys .* as q is quantised, got float32"),
        ({"k_scale": torch.ones(20)}, ValueError, "k_scale: expected None, as k is not"),
        ({"k": E2M1["k"], "k_scale": E2M1["k_scale"]}, ValueError, "q: .* 64 or 128, as k is e2m1, got 16"),
    ),
    *cases(
        "index_logits",
        {**INDEX, "k": torch.zeros(5, 4, 16), "block_table": TABLE},
        ({"block_table": TABLE[:2]}, ValueError, "block_table: .* divides s_q=3, got 2; .* cu_seqlens_q"),
        ({"cu_seqlens_q": ints(0, 1, 2)}, ValueError, r"cu_seqlens_q: expected shape \[4\], got \[3\]"),
        ({"cu_seqlens_q": [0, 1, 2, 3]}, TypeError, r"cu_seqlens_q: expected a tensor \[4\], got list"),
        ({"cu_seqlens_q": ints(0, 1, 2, 3).long()}, TypeError, "cu_seqlens_q: .* int32, got int64"),
    ),
    *cases(
        "index_logits",
        FP8,
        ({"k_scale": None}, TypeError, r"k_scale: expected a tensor \[s_kv=20\], got None"),
        ({"k_scale": torch.ones(19)}, ValueError, r"k_scale: .*s_kv=20\], got \[19\]"),
        ({"k_scale": ints(*range(20))}, TypeError, "k_scale: .* float32, got int32"),
        ({"q_scale": ints(1, 2, 3)}, ValueError, "q_scale: expected None, as q is not e2m1"),
    ),
    *cases(
        "index_logits",
        E2M1,
        ({"q_scale": None}, TypeError, "q_scale: expected a tensor .*s_q=3.*, got None"),
        ({"q": E2M1["q"][..., 1:]}, ValueError, "q: .* 64 or 128, as q is e2m1, got 126"),
        ({"q": E2M1["q"][..., :32]}, ValueError, r"k: .* index_head_dim/2=32\], got \[20, 64\]"),
        ({"k_scale": ints(1)}, ValueError, r"k_scale: .*s_kv=20\], got \[1\]"),
        ({"k_scale": torch.ones(20)}, TypeError, "k_scale: .* int32, got float32"),
    ),
    *cases(
        "lightning_topk",
        {**E2M1, "topk": 4},
        ({"k": E2M1["k"][0]}, ValueError, r"k: expected shape \[s_kv, index_head_dim/2=64\]"),
    ),
    *cases(
        "lightning_topk",
        {**INDEX, "topk": 4},
        ({"topk": 0}, ValueError, "topk: expected at least 1, got 0"),
        ({"topk": 2.0}, TypeError, "topk: expected an int, got float"),
        ({"workspace_bytes": 0}, ValueError, "workspace_bytes: .* got 0"),
        ({"out": torch.zeros(3, 4)}, TypeError, "out: expected dtype int32"),
        ({"out": (TABLE, TABLE)}, TypeError, "out: expected a tensor .* got tuple"),
        ({"return_scores": True, "out": TABLE}, TypeError, r"out: .* \(indices, scores\), .* got Tensor"),
        (
            {"return_scores": True, "out": (ints(*range(12)).view(3, 4), torch.zeros(3, 5))},
            ValueError,
            r"out scores: expected shape .*topk=4\], got \[3, 5\]",
        ),
    ),
    *cases(
        "select_topk",
        {"logits": torch.zeros(2, 5), "topk": 2, "ks": ints(0, 0), "ke": ints(5, 5)},
        (
            {"logits": torch.zeros(2, 5).half()},
            TypeError,
            "logits: expected dtype float32 or float64, got float16",
        ),
    ),
    *cases(
        "physical_slots",
        SLOTS,
        ({"page_size": 0}, ValueError, "page_size: expected an int of at least 1, got 0"),
        ({"page_size": 2.0}, ValueError, "page_size: expected an int of at least 1, got 2.0"),
        ({"block_table": TABLE[:2]}, ValueError, "block_table: .* divides s_q=3, got 2"),
        ({"indices": TABLE.long()}, TypeError, "indices: expected dtype int32, got int64"),
        ({"page_stride": 3}, ValueError, "page_stride: expected an int of at least 4, got 3"),
        ({"cu_seqlens_q": ints(0, 3)}, ValueError, r"cu_seqlens_q: expected shape \[4\], got \[2\]"),
    ),
    *cases(
        "sparse_mla",
        MLA,
        ({"kv": torch.zeros(20, 39)}, ValueError, r"kv: expected shape \[s_kv, d_qk=40\]"),
        ({"kv_format": "v32"}, ValueError, "kv_format: expected None, as kv is float32 .*, got 'v32'"),
        ({"kv": torch.zeros(4, 5, 2, 40)}, ValueError, r"kv: expected shape \[pages, page_size, 1, d_qk=40"),
        ({"indices": MLA["indices"].long()}, TypeError, "indices: expected dtype int32, got int64"),
        ({"indices": MLA["indices"][:2]}, ValueError, r"indices: expected shape \[s_q=3, topk\]"),
        ({"d_v": 41}, ValueError, "d_v: expected 1 to d_qk=40, got 41"),
        ({"topk_length": ints(1)}, ValueError, r"topk_length: expected shape \[s_q=3\]"),
        ({"attn_sink": torch.zeros(3)}, ValueError, r"attn_sink: expected shape \[h_q=4\]"),
        ({"extra_kv": MLA["kv"]}, ValueError, "extra_kv and extra_indices: expected both"),
        ({"extra_topk_length": ints(1, 1, 1)}, ValueError, "extra_topk_length: expected None"),
        ({"out": torch.zeros(3, 4, 31)}, ValueError, r"out: expected shape .* got \[3, 4, 31\]"),
        ({"q": MLA["q"].clone().requires_grad_()}, ValueError, "gradients: .*no_grad"),
    ),
    *cases(
        "sparse_mla",
        {**MLA, "return_lse": True},
        (
            {"out": torch.zeros(3, 4, 32)},
            TypeError,
            r"out: expected the tuple \(out, lse\), as these are returned, got Tensor",
        ),
    ),
    *cases(
        "sparse_mla",
        {**MLA, "return_lse": True, "return_max_logits": True},
        (
            {"out": (torch.zeros(3, 4, 32), torch.zeros(3, 4))},
            TypeError,
            r"out: expected the tuple \(out, lse, max_logits\), .* got 2 of them",
        ),
    ),
    *cases(
        "sparse_gqa",
        GQA,
        ({"q": torch.zeros(3, 5, 32)}, ValueError, "q: expected h_q .* multiple .* h_kv=2, got h_q=5"),
        ({"v": torch.zeros(19, 2, 32)}, ValueError, r"v: expected shape \[s_kv=20, h_kv=2, d_v\]"),
        ({"indices": torch.zeros(3, 4, 8).int()}, ValueError, r"indices: .*h_kv=2, topk\], got \[3, 4, 8\]"),
    ),
    *cases(
        "merge_attention",
        {"outs": torch.zeros(2, 3, 4, 8), "lses": torch.zeros(2, 3, 4)},
        (
            {"lses": torch.zeros(2, 3, 5)},
            ValueError,
            r"lses: expected shape \[n=2, s_q=3, h=4\], got \[2, 3, 5\]",
        ),
        (
            {"outs": [torch.zeros(3, 4, 8), torch.zeros(3, 4, 9)]},
            ValueError,
            "outs: expected parts of one shape",
        ),
        ({"outs": []}, TypeError, "outs: expected .* non-empty"),
    ),
    *cases(
        "DSAConfig",
        SMALL_MLA,
        ({"indexer_rope": "neox"}, ValueError, "indexer_rope: expected 'half' or 'interleaved', got 'neox'"),
        ({"index_topk": 0}, ValueError, "index_topk: expected a positive size, got 0"),
        ({"hidden_size": 3.5}, TypeError, "hidden_size: expected an int, got 3.5"),
        ({"v_head_dim": None}, ValueError, "v_head_dim: expected a size for MLA"),
        ({"qk_rope_head_dim": 7}, ValueError, "qk_rope_head_dim: expected an even size, got 7"),
        (
            {"index_rope_head_dim": 18},
            ValueError,
            "index_rope_head_dim: .* at most index_head_dim=16, got 18",
        ),
        ({"index_head_dim": 24, "indexer_fp8": True}, ValueError, "index_head_dim: expected a power of two"),
        (
            {"rope_scaling": {"type": "linear"}},
            ValueError,
            "rope_scaling: expected type 'yarn' .* got 'linear'",
        ),
        ({"rope_scaling": {"type": "yarn"}}, ValueError, "factor, original_max_position_embeddings for YaRN"),
    ),
    *cases(
        "DSAConfig",
        SMALL_GQA,
        ({"head_dim": None}, ValueError, "head_dim: expected a size for GQA"),
        ({"num_key_value_heads": 3}, ValueError, "multiple of num_key_value_heads=3, got 4"),
    ),
]


@pytest.mark.parametrize("name, good, change, error, words", CASES)
def test_a_wrong_argument_is_named(name, good, change, error, words):
    function = getattr(sparse_attn, name)
    function(**good)  # the arguments are right until changed
    with torch.enable_grad(), pytest.raises(error, match=words):
        function(**{**good, **change})


def test_missing_config_fields_are_all_named():
    with pytest.raises(ValueError, match=r"missing hidden_size, index_n_heads.*indexer_rope .*'llama'"):
        DSAConfig.from_dict({"model_type": "llama", "num_attention_heads": 4, "index_head_dim": 16})


def test_layers_refuse_the_other_kind_of_config():
    with pytest.raises(ValueError, match="config: SparseMLA expects a config with kv_lora_rank"):
        SparseMLA(DSAConfig(**SMALL_GQA))
    with pytest.raises(ValueError, match="config: SparseGQA expects a config without kv_lora_rank"):
        SparseGQA(DSAConfig(**SMALL_MLA))


@pytest.fixture
def layer():
    return SparseMLA(DSAConfig(**SMALL_MLA))


def test_layer_inputs(layer):
    x = torch.randn(6, 32)
    for bad, error, words in [
        (x.tolist(), TypeError, r"hidden_states: expected a tensor \[tokens, hidden_size=32\], got list"),
        (
            x[None],
            ValueError,
            r"hidden_states: expected shape \[tokens, hidden_size\], got \[1, 6, 32\].*cu_seqlens_q",
        ),
        (x.half(), TypeError, "hidden_states: expected dtype float32, got float16"),
        (x.to("meta"), ValueError, "hidden_states: expected device cpu, got meta"),
    ]:
        with pytest.raises(error, match=words):
            layer(bad)
    for cu, error, words in [
        ([0, 6], TypeError, r"cu_seqlens_q: expected a tensor \[batch_size\+1\], got list"),
        (torch.tensor([0.0, 6.0]), TypeError, "cu_seqlens_q: expected dtype int32 or int64"),
        (torch.tensor([[0, 6]]), ValueError, r"cu_seqlens_q: expected shape \[batch_size\+1\]"),
        (ints(0, 4, 2, 6), ValueError, r"ascending boundaries from 0 to 6 tokens, got \[0, 4, 2, 6\]"),
        (torch.tensor([0, 5]), ValueError, r"ascending boundaries from 0 to 6 tokens, got \[0, 5\]"),
        (torch.tensor([1, 6]), ValueError, "ascending boundaries"),
    ]:
        with pytest.raises(error, match=words):
            layer(x, cu_seqlens_q=cu)
    with torch.enable_grad(), pytest.raises(ValueError, match="gradients"):
        layer(x)


def test_layer_caches(layer):
    x, config = torch.randn(6, 32), layer.config
    grouped, two = DSACache(DSAConfig(**SMALL_GQA), 8), DSACache(config, 8, batch_size=2)
    bf16 = DSACache(config, 8, dtype=torch.bfloat16)
    for cache, error, words in [
        ({}, TypeError, "cache: expected a DSACache, got dict"),
        (grouped, ValueError, "cache: expected a cache made with this layer's config"),
        (bf16, ValueError, "cache: expected .*float32 .* got torch.bfloat16"),
        (two, ValueError, "cu_seqlens_q: expected with a cache of batch_size=2"),
    ]:
        with pytest.raises(error, match=words):
            layer(x, cache=cache)
    with pytest.raises(ValueError, match=r"cu_seqlens_q: expected shape \[batch_size\+1=3\], got \[2\]"):
        layer(x, cache=two, cu_seqlens_q=torch.tensor([0, 6]))
    for size in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="max_tokens: expected an int of at least 1"):
            DSACache(config, size)
    with pytest.raises(ValueError, match=r"max_tokens: expected .* below 2\*\*31"):
        DSACache(config, 2**20, batch_size=2**11, device="meta")


def test_a_full_cache_says_so_and_stays_usable(layer):
    cache = DSACache(layer.config, 8)
    x = torch.randn(11, 32)
    layer(x[:6], cache=cache)
    with pytest.raises(ValueError, match="sequence 0 holds 6 of 8 tokens, no room for 3 more"):
        layer(x[6:9], cache=cache)
    assert cache.lengths == (6,)
    torch.testing.assert_close(layer(x[6:8], cache=cache), layer(x[:8])[6:])
    with pytest.raises(ValueError, match="length: expected 0 to the 8 tokens held for sequence 0, got 9"):
        cache.truncate(9)
    with pytest.raises(ValueError, match="sequence: expected 0 to 0, got 1"):
        cache.truncate(0, sequence=1)


def test_a_mismatched_checkpoint_names_keys_and_shapes(layer):
    state = SparseMLA(DSAConfig(**{**SMALL_MLA, "kv_lora_rank": 24})).state_dict()
    del state["indexer.wk.weight"]
    state["surplus"] = torch.zeros(1)
    with pytest.raises(RuntimeError) as error:
        layer.load_state_dict(state)
    for words in ("indexer.wk.weight", "surplus", "wkv_a.weight", "[32, 32]", "[24, 32]"):
        assert words in str(error.value)
