"""The demo's model, and the indexer that was distilled for it: what README says of them holds."""

import io
import json
from types import SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip("transformers")
demo = pytest.importorskip("real_model", reason="the demo's packages are not installed")
sa = demo.sa


@pytest.fixture(scope="module")
def real():
    """The tokenizer, the model and a text; it takes most of a minute to load."""
    try:
        tokenizer, model = demo.load_model()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    text = demo.read_text(None)[1][:20000]
    yield tokenizer, model, tokenizer(text, return_tensors="pt").input_ids[0]
    demo.use_attention(model, demo.DENSE)


@pytest.fixture
def tiny(monkeypatch):
    """A Llama model with random weights, and an indexer for it."""
    sizes = {"hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": 199}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).eval()
    size = {"n_heads": 2, "head_dim": 16, "rope_dim": 8}
    indexers = sa.Indexers(96, dict.fromkeys(range(3), size))
    monkeypatch.setattr(demo, "distilled", lambda: indexers)
    return model


class Letters:
    """A tokenizer whose tokens are the letters of a text."""

    def __call__(self, text, return_tensors):
        return SimpleNamespace(input_ids=torch.tensor([[ord(c) % 199 for c in text]], device="cpu"))

    def decode(self, ids):
        return " ".join(map(str, ids.tolist()))


def test_every_tensor_of_a_run_is_made_on_its_device(tiny, monkeypatch, tmp_path):
    """Where tensors go by default there is no data, so one that is made without a device breaks the run."""
    monkeypatch.setattr(demo, "load_model", lambda: (Letters(), tiny))
    demo.distilled().to("cpu")
    console = demo.Console(file=io.StringIO(), width=100)
    with torch.device("meta"):
        results = demo.run(
            console, tmp_path, tokens=256, longest=300, topk=(16, 32), new_tokens=2, depths=(0.5,)
        )
    assert results["device"] == "cpu" and json.loads(json.dumps(results)) == results
    assert [(row["indexer"], row["topk"]) for row in results["sparse"]] == [
        (indexer, k) for indexer in demo.INDEXERS for k in (16, 32)
    ]
    assert all(row["perplexity"] > 1 and 0 < row["kept"] <= 1 for row in results["sparse"])
    times = [(row["tokens"], row["indexer"], row["topk"]) for row in results["times"]]
    each = [("dense", None), ("training-free", 32), ("distilled", 16), ("distilled", 32)]
    assert times == [(tokens, *kind) for tokens in (256, 300) for kind in each]
    assert all(row["decode_seconds"] > 0 for row in results["times"])
    assert all((tmp_path / name).stat().st_size > 10_000 for name in results["plots"])


def test_selection_density_counts_pairs():
    every = torch.arange(10).expand(10, 10)
    every = torch.where(every <= torch.arange(10)[:, None], every, -1)
    density = demo.selection_density(every, 4)
    assert density.tril().equal(torch.ones(4, 4).tril())
    assert density.isnan().equal(torch.ones(4, 4).triu(1).bool())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("indexer", "increase", "kept"), [("training-free", 1.03, 0.9), ("distilled", 1.05, 0.88)]
)
def test_quality(real, indexer, increase, kept):
    """k = 256 of 1,024 tokens, on a text that the indexer was not trained on."""
    _, model, ids = real
    demo.use_attention(model, demo.DENSE)
    dense = demo.read(model, ids[:1024], 1, sparse=False)
    demo.use_attention(model, indexer, 256)
    with sa.record(model) as selections:
        sparse = demo.read(model, ids[:1024], 1, sparse=True)
    assert sparse.second_half < increase * dense.second_half
    assert kept < sum(sparse.kept) / len(sparse.kept) < 1
    position = torch.arange(1023)
    counts = []
    for layer in selections:
        indices = selections[layer][0, :1023]
        assert (indices <= position[:, None]).all()
        counts.append((indices[-1] >= 0).sum().item())
    assert sum(counts) / len(counts) == pytest.approx(256, abs=4)


@pytest.mark.slow
def test_the_pass_key_is_found(real):
    tokenizer, model, ids = real
    (row,) = demo.retrieve(model, tokenizer, ids[:1500], 256, (0.4,), 7, lambda _: None)
    assert all(row["pass_key"] in row[name] for name in (demo.DENSE, *demo.INDEXERS)), row
