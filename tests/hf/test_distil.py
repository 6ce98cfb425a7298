"""Indexers that are trained from a model's dense attention, on a tiny model with random weights."""

import itertools

import pytest
import torch
from tiny import sa, transformers

from sparse_attn.integrations.transformers import distil

SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
OPTIONS = {"index_n_heads": 4, "index_head_dim": 16, "queries": 96, "progress": False}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, **HEADS, bos_token_id=1, eos_token_id=2)
    made = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in made.model.layers:  # so that attention is far from uniform
            layer.self_attn.q_proj.weight.mul_(8)
            layer.self_attn.k_proj.weight.mul_(8)
    return made


@pytest.fixture(scope="module")
def texts():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 64, (length,), generator=generator) for length in (200, 160, 200, 180, 200)]


@pytest.fixture(autouse=True)
def as_it_was(model):
    yield
    sa.disable(model)


def kept(model, ids, topk, indexers):
    sa.attach(model, topk=topk, indexer=indexers)
    with sa.kept_attention(model) as shares:
        model(ids[None])
    sa.disable(model)
    return sum(mean for (mean,) in shares.values()) / len(shares)


def test_what_is_distilled_keeps_more_attention(model, texts):
    before = model(texts[0][None]).logits
    indexers = sa.distill(model, texts[:4], steps=80, **OPTIONS)
    assert torch.equal(model(texts[0][None]).logits, before)
    assert model.config._attn_implementation == "sdpa"
    random = sa.Indexers(64, indexers.sizes)
    best, trained, untrained = (kept(model, texts[4], 24, x) for x in (None, indexers, random))
    assert untrained < trained < best < 1
    assert trained - untrained > 0.2 * (best - untrained)
    for lost in indexers.lost.values():
        assert len(lost) == len(indexers.counts) and all(a >= b for a, b in itertools.pairwise(lost))
    assert sum(indexers.allocate(24)) <= 2 * 24


def test_what_a_layer_loses_is_how_far_predictions_are_off(model, texts):
    indexers = sa.distill(model, texts, steps=20, **OPTIONS)
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())
    ids, behind = texts[-1][None], len(texts[-1]) // 4
    dense = model(ids).logits[0, behind:].log_softmax(-1)
    for number, topk in itertools.product(indexers.lost, (32, 64)):
        sa.attach(model, topk=[topk if layer == number else 200 for layer in indexers.lost], indexer=indexers)
        sparse = model(ids).logits[0, behind:].log_softmax(-1)
        sa.disable(model)
        nats = (dense.exp() * (dense - sparse)).sum(-1).mean().item()
        assert indexers.lost[number][indexers.counts.index(topk)] == pytest.approx(nats, rel=0.4)


def test_a_run_that_was_stopped_goes_on(model, texts, tmp_path, monkeypatch):
    train, trained = distil._train, []

    def train_once(*arguments):
        if trained:
            raise KeyboardInterrupt
        trained.append(train(*arguments))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(distil, "_train", train_once)
        sa.distill(model, texts, steps=3, folder=tmp_path, **OPTIONS)
    with monkeypatch.context() as patch:
        patch.setattr(distil, "_read", None)  # the attention is there
        goes_on = sa.distill(model, texts, steps=3, folder=tmp_path, **OPTIONS)
    whole = sa.distill(model, texts, steps=3, **OPTIONS)
    assert whole.lost == goes_on.lost
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, goes_on.state_dict()[name]), name
    with pytest.raises(ValueError, match=r"folder: expected one of the same arguments, got .*layer-0"):
        sa.distill(model, texts, steps=4, folder=tmp_path, **OPTIONS)
    with pytest.raises(ValueError, match=r"folder: expected one of the same arguments, got .*text-0"):
        sa.distill(model, [*reversed(texts)], steps=3, folder=tmp_path, **OPTIONS)


@pytest.mark.parametrize("flat", [1, 9])
def test_a_layer_that_does_not_learn_starts_again(model, texts, monkeypatch, flat):
    rates = []

    def optimise(indexer, examples, steps, rate, generator):
        rates.append(rate)
        return [1.0] * 20 if len(rates) <= flat else [1.0, 0.5] * 10 + [0.1] * 20

    monkeypatch.setattr(distil, "_optimise", optimise)
    if flat == 1:
        sa.distill(model, texts, learning_rate=0.1, **OPTIONS)
        assert rates == [0.1, 0.05, 0.1]  # twice for layer 0
    else:
        with pytest.warns(UserWarning, match="layer 0 did not learn"):
            sa.distill(model, texts, learning_rate=0.1, **OPTIONS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"texts": []}, "texts: expected two at least, got 0"),
        ({"texts": [torch.zeros(9), torch.zeros(9)]}, r"texts\[0\]: expected token ids \[tokens\] int64"),
        ({"texts": [torch.zeros(64).long()] * 2}, r"texts\[0\]: expected more than 64 tokens, got 64"),
        ({"index_head_dim": 6}, "index_head_dim: expected a multiple of 4, got 6"),
        ({"steps": 0}, "steps: expected 1 at least, got 0"),
        ({"index_rope_dim": 18}, "index_rope_dim: expected an even number up to index_head_dim=16, got 18"),
    ],
)
def test_wrong_arguments(model, texts, options, message):
    with pytest.raises(ValueError, match=message):
        sa.distill(model, **{"texts": texts, **OPTIONS, **options})


def test_kept_attention_is_that_of_eager_attention(model, texts):
    ids = texts[0][None, :120]
    model.set_attn_implementation("eager")
    weights = model(ids, output_attentions=True).attentions[0][0].mean(0)  # [s_q, s_kv]
    model.set_attn_implementation("sdpa")
    sa.attach(model, topk=[20, 200])
    with sa.kept_attention(model) as kept, sa.record(model) as selections:
        model(ids)
    every = range(60, 120, 8)
    expected = [weights[t, selections[0][0, t].long()].sum().item() for t in every]
    assert kept[0] == [pytest.approx(sum(expected) / len(expected), rel=1e-5)]
    assert kept[1] == [pytest.approx(1, rel=1e-5)]


def test_kept_attention_of_another_model_is_refused(model):
    with pytest.raises(TypeError, match="model: expected one that attach"), sa.kept_attention(model):
        pass
