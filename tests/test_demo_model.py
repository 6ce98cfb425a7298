"""The demo's model: DSA over every token is dense attention; prefill, chunks and decode give the same."""

import io
import json
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from sparse_attn import index_logits

transformers = pytest.importorskip("transformers")
demo = pytest.importorskip("real_model", reason="the demo's packages are not installed")


@pytest.fixture(scope="module")
def real():
    """The tokenizer, the model and a text; it takes most of a minute to load."""
    try:
        tokenizer, model = demo.load_model()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    text = demo.read_text(None)[1][:8192]
    return tokenizer, model, tokenizer(text, return_tensors="pt").input_ids[0]


@pytest.fixture(scope="module")
def tiny():
    """A Llama model with random weights, and random tokens."""
    sizes = {"hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": 199}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).eval()
    return None, model, torch.randint(0, 199, (96,))


@pytest.fixture(params=["tiny", pytest.param("real", marks=pytest.mark.slow)])
def loaded(request):
    tokenizer, model, ids = request.getfixturevalue(request.param)
    yield tokenizer, model, ids
    demo.use_attention(model, None)


@pytest.fixture
def model(loaded):
    return loaded[1]


@pytest.fixture
def ids(loaded):
    return loaded[2]  # [s]


def logits(model, ids, topk, **kwargs):
    demo.use_attention(model, topk)
    return model(ids[None], **kwargs).logits[0]


def test_indexer_is_its_formula():
    torch.manual_seed(0)
    q, k = torch.randn(5, 6, 8, dtype=torch.float64), torch.randn(12, 2, 8, dtype=torch.float64)
    zeros, ke = torch.zeros(5, dtype=torch.int32), torch.arange(8, 13, dtype=torch.int32)
    got = index_logits(*demo.training_free_indexer(q, k), zeros, ke)
    for t, visible in enumerate(ke.tolist()):
        keys = k[:visible].repeat_interleave(3, 1)  # [visible, h_q, d]
        scores = torch.einsum("hd,shd->hs", q[t], keys)
        std = (q[t].square() * keys.var(0, correction=0)).sum(-1).sqrt()
        z = (scores - scores.mean(-1, keepdim=True)) / std[:, None]
        standing_out = (z - demo.THRESHOLD).relu().sum(0)
        assert_close(got[t, :visible], standing_out + demo.MEAN_WEIGHT * (z.mean(0) + demo.MEAN_OFFSET))


def test_reading_every_token_is_dense_attention(model, ids):
    ids = ids[:96]
    assert_close(logits(model, ids, len(ids)), logits(model, ids, None), atol=2e-3, rtol=1e-4)


def test_chunks_and_decode_are_one_prefill(model, ids):
    ids = ids[:96]
    cache = transformers.DynamicCache()
    pieces = [logits(model, piece, 32, past_key_values=cache) for piece in ids.split([50, 40] + [1] * 6)]
    assert_close(torch.cat(pieces), logits(model, ids, 32), atol=2e-3, rtol=1e-4)


def test_generate_with_every_token_is_dense_generation(model, ids):
    demo.use_attention(model, None)
    dense = demo.generate(model, ids[:64], 12)
    demo.use_attention(model, 128)
    assert demo.generate(model, ids[:64], 12).tolist() == dense.tolist()


class Letters:
    """A tokenizer whose tokens are the letters of a text."""

    def __call__(self, text, return_tensors):
        return SimpleNamespace(input_ids=torch.tensor([[ord(c) % 199 for c in text]], device="cpu"))

    def decode(self, ids):
        return " ".join(map(str, ids.tolist()))


def test_every_tensor_of_a_run_is_made_on_its_device(tiny, monkeypatch, tmp_path):
    """Where tensors go by default there is no data, so one that is made without a device breaks the run."""
    monkeypatch.setattr(demo, "load_model", lambda: (Letters(), tiny[1]))
    console = demo.Console(file=io.StringIO(), width=100)
    with torch.device("meta"):
        results = demo.run(console, tmp_path, tokens=256, topk=(16, 32), new_tokens=2, depths=(0.5,))
    demo.use_attention(tiny[1], None)
    assert results["device"] == "cpu" and json.loads(json.dumps(results)) == results
    assert all(row["perplexity"] > 1 and row["decode_seconds"] > 0 for row in results["sparse"])
    assert all((tmp_path / name).stat().st_size > 10_000 for name in results["plots"])


@pytest.mark.slow
@pytest.mark.parametrize("loaded", ["real"], indirect=True)
def test_quality_and_selection(model, ids):
    """k = 256 of 768 tokens: second-half perplexity within 3 % of dense, at least 90 % of the mass kept."""
    ids, topk = ids[:768], 256
    demo.use_attention(model, None)
    dense = demo.read(model, ids, 1)
    demo.use_attention(model, topk)
    observer = demo.Observer()
    sparse = demo.read(model, ids, 1, observe=observer)
    assert sparse.second_half < 1.03 * dense.second_half
    assert all(0 < mass <= 1 + 1e-5 for mass in observer.mass)
    assert sum(observer.mass) / len(observer.mass) > 0.9
    position = torch.arange(len(ids) - 1)
    for indices in observer.indices:
        assert (indices <= position[:, None]).all()
        assert ((indices >= 0).sum(-1) == (position + 1).clamp_max(topk)).all()


def test_selection_density_counts_pairs():
    every = torch.arange(10).expand(10, 10)
    every = torch.where(every <= torch.arange(10)[:, None], every, -1)
    density = demo.selection_density(every, 4)
    assert density.tril().equal(torch.ones(4, 4).tril())
    assert density.isnan().equal(torch.ones(4, 4).triu(1).bool())


def test_padding_is_refused(model, ids):
    demo.use_attention(model, 32)
    mask = torch.tensor([[0] + [1] * 15])
    with pytest.raises(ValueError, match="without padding"):
        model(ids[None, :16], attention_mask=mask)


@pytest.mark.slow
def test_run(real, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "load_model", lambda: real[:2])
    console = demo.Console(record=True, width=100)
    results = demo.run(console, tmp_path, tokens=192, topk=(64, 192), new_tokens=2, depths=(0.5,))
    assert json.loads(json.dumps(results)) == results
    assert results["sparse"][1]["perplexity"] == pytest.approx(results["dense"]["perplexity"], rel=1e-4)
    assert results["pass_keys"][0]["pass_key"] in results["pass_keys"][0]["dense"]
    assert all((tmp_path / name).stat().st_size > 10_000 for name in results["plots"])
    assert "Perplexity" in console.export_text()
