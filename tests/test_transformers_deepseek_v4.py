"""DeepSeek-V4's attention layers one by one: precision, memory, sizes of the real model, refusals.

tests/test_transformers.py runs whole models of this kind too.
"""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

transformers = pytest.importorskip("transformers")
try:
    import sparse_attn.integrations.transformers as sa
except ImportError as error:
    pytest.skip(str(error), allow_module_level=True)
v4 = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")

LAYER_TYPES = ("sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention")
SIZES = {
    **{"vocab_size": 64, "hidden_size": 96, "num_hidden_layers": 3, "layer_types": list(LAYER_TYPES)},
    **{"moe_intermediate_size": 16, "n_routed_experts": 2, "num_experts_per_tok": 1, "pad_token_id": 0},
    **{"num_attention_heads": 4, "q_lora_rank": 48, "head_dim": 64, "qk_rope_head_dim": 16},
    **{"index_n_heads": 32, "index_head_dim": 32, "o_groups": 2, "o_lora_rank": 24},
}
SMALL = {"sliding_window": 16, "index_topk": 6, "compress_rate_csa": 4, "compress_rate_hca": 8}
YARN = {
    **{"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 64},
    **{"beta_fast": 32, "beta_slow": 1},
}


def make(**sizes):
    """A model with transformers' attention and a copy with ours."""
    torch.manual_seed(0)
    config = transformers.DeepseekV4Config(**{**SIZES, **sizes})
    dense = v4.DeepseekV4Model._from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    for name, parameter in dense.named_parameters():
        if "attn." in name and parameter.dim() > 1:
            parameter.mul_(4)
        if name.endswith((".sinks", ".position_bias")):
            parameter.normal_()
    sparse = copy.deepcopy(dense)
    sa.enable(sparse)
    return dense, sparse


@pytest.fixture(scope="module")
def small():
    with torch.no_grad():
        return make(**SMALL)


def run(model, layer, hidden, dtype, chunks=None):
    """What one attention layer makes of hidden states ``[B, S, hidden_size]``."""
    attention = copy.deepcopy(model.layers[layer].self_attn).to(dtype)
    for name, parameter in attention.named_parameters():  # as from_pretrained leaves them
        if "norm" in name or name.endswith(("sinks", "position_bias")):
            parameter.data = parameter.data.to(torch.promote_types(dtype, torch.float32))
    hidden, window = hidden.to(dtype), model.config.sliding_window
    cache = None if chunks is None else transformers.DynamicCache(config=model.config)
    outs, past = [], 0
    for part in hidden.split(chunks or hidden.shape[1], 1):
        positions = torch.arange(past, past + part.shape[1])[None]
        rope = {name: model.rotary_emb(part, positions, layer_type=name) for name in ("main", "compress")}
        mask = None
        if type(attention) is v4.DeepseekV4Attention:
            rows = torch.arange(0 if cache is None else max(0, past - window + 1), past + part.shape[1])
            seen = (rows <= positions[0, :, None]) & (rows > positions[0, :, None] - window)
            mask = torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype).expand(len(part), 1, -1, -1)
        outs.append(attention(part, rope, positions, mask, past_key_values=cache)[0])
        past += part.shape[1]
    return torch.cat(outs, 1)


@pytest.mark.parametrize("layer", range(3), ids=LAYER_TYPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_layers_are_as_exact(small, layer, dtype):
    """One layer in 16 bits against itself in fp32: our error is not above that of transformers' eager."""
    torch.manual_seed(1)
    hidden = torch.randn(2, 70, 96).to(dtype).float()  # selections depend on them: no rounding there
    truth = run(small[1], layer, hidden, torch.float32)
    scale = truth.abs().max()
    assert (run(small[0], layer, hidden, torch.float32) - truth).abs().max() / scale < 1e-5
    theirs, ours = (
        (run(model, layer, hidden, dtype).float() - truth).pow(2).mean().sqrt() / scale for model in small
    )
    assert ours <= 1.2 * theirs


@pytest.mark.parametrize("rope", [None, YARN], ids=["default", "yarn"])
def test_the_sizes_of_the_real_model(rope):
    """A window of 128, entries of 4 and of 128 tokens; chunks that end inside an entry."""
    dense, sparse = make(index_topk=24, rope_parameters=rope)
    torch.manual_seed(1)
    hidden = torch.randn(1, 400, 96)
    for layer in range(3):
        expected = run(dense, layer, hidden, torch.float32)
        for chunks in (None, [301, 1, 1, 97]):
            out = run(sparse, layer, hidden, torch.float32, chunks)
            assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_no_mask_and_no_scores_of_all_entries(small):
    """No tensor has the new tokens and all entries, or all rows of the window, among its dimensions."""

    class Shapes(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = set()

        def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor):
                    self.seen.add(tuple(tensor.shape))
            return out

    found = []
    for model in small:
        cache = transformers.DynamicCache(config=model.config)
        model(torch.randint(64, (1, 133)), past_key_values=cache)
        with Shapes() as shapes:
            model(torch.randint(64, (1, 63)), past_key_values=cache)
        # 63 new tokens, 15 + 63 rows of the window, 49 entries of four tokens
        found.append({s for s in shapes.seen if 63 in s and (78 in s or 49 in s)})
    dense, sparse = found
    assert dense and not sparse


def test_what_cannot_be_right_is_refused(small):
    model = small[1]
    ids = torch.ones(2, 20).long()
    message = r"past_key_values: expected .*DynamicCache\(config=model.config\), whose layer 0 is a Dyn.* got"
    with pytest.raises(ValueError, match=message):
        model(ids, past_key_values=transformers.DynamicCache())
    with pytest.raises(ValueError, match=r"attention_mask: .* none, got .2, 1, 20, 20."):
        model(ids, attention_mask=torch.ones(2, 1, 20, 20))
    with pytest.raises(ValueError, match=r"attention_mask: expected shape \[2, 20\], got \[2, 30\]"):
        model(ids, attention_mask=torch.ones(2, 30).tril(20).long(), use_cache=False)
    with pytest.raises(ValueError, match=r"position_ids: .* packed in a row"):
        model(ids[:1], position_ids=torch.arange(10).repeat(2)[None], use_cache=False)
    with pytest.raises(ValueError, match="output_attentions"):
        model(ids, output_attentions=True)
    with torch.enable_grad(), pytest.raises(ValueError, match=r"gradients: .*no_grad"):
        model(ids)
    with pytest.raises(ValueError, match="training mode in SparseDeepseekV4Attention"):
        copy.deepcopy(model).train()(ids)
    layers = [transformers.cache_utils.StaticSlidingWindowLayer(32, 16) for _ in range(3)]
    with pytest.raises(ValueError, match="got Cache with StaticSlidingWindowLayer; static caches cannot"):
        model(ids, past_key_values=transformers.Cache(layers=layers))
