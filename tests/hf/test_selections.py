"""Selections of a model: recorded, and replayed by another call of it."""

import pytest
import torch
from tiny import KINDS, TOPK, VOCABULARY, assert_same, empty_cache, generate, logits, make, models, padded, sa


@pytest.fixture
def ids():
    torch.manual_seed(1)
    return torch.randint(3, VOCABULARY, (2, 70))


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_generated_is_read_again_in_one_call(kind, ids):
    """As in reinforcement learning: tokens come one by one, their log-probabilities are computed at once."""
    model = models(kind)[1]
    with sa.record(model) as selections:
        recorded = logits(model, ids, [60, 7, 1, 1, 1], empty_cache(model))
    for chunks in ([70], [33, 36, 1]):
        with sa.replay(model, selections), sa.record(model) as again:
            assert_same(logits(model, ids, chunks, empty_cache(model)), recorded)
        assert len(again) == 0  # nothing was selected


@pytest.mark.parametrize("kind", ["v32", "glm-shared"])
def test_the_layers_read_what_is_replayed(kind, ids):
    """Other weights in the indexers, and still the recorded rows are read; their keys are stored as usual."""
    model = models(kind)[1]
    other = make(kind)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "indexer.wq_b" in name:
                parameter.neg_()
    sa.enable(other)
    batch, mask = padded(ids, (70, 41), "left")
    with sa.record(model) as selections:
        expected = model(batch, attention_mask=mask).logits[mask.bool()]
    assert (other(batch, attention_mask=mask).logits[mask.bool()] - expected).abs().max() > 1e-3
    cache, after = empty_cache(other), empty_cache(other)
    with sa.replay(other, selections):
        out = other(batch, attention_mask=mask, past_key_values=cache).logits[mask.bool()]
    assert_same(out, expected)
    other(batch, attention_mask=mask, past_key_values=after)
    for replayed, selected in zip(cache.layers, after.layers, strict=True):
        if replayed.indexer_keys is not None:
            assert replayed.indexer_keys.shape == selected.indexer_keys.shape
    assert torch.equal(cache.layers[0].indexer_keys, after.layers[0].indexer_keys)


def test_generate_is_recorded(ids):
    model = models("glm-shared")[1]
    with sa.record(model, device="cpu") as selections:
        tokens = generate(model, ids[:, :40])
    assert sorted(selections) == [0, 3] and selections[0].shape == (2, 49, TOPK)  # the last token is not read
    assert selections.nbytes == 2 * 2 * 49 * TOPK * 4
    assert ((selections[0] >= 0).sum(2) == torch.arange(1, 50).clamp_max(TOPK)).all()
    text = torch.cat([ids[:, :40], tokens[:, :-1]], 1)
    with sa.replay(model, sa.Selections({layer: selections[layer] for layer in selections})):
        assert torch.equal(model(text).logits[:, 39:].argmax(-1), tokens)


def test_what_does_not_fit_is_refused(ids):
    dense, sparse = models("glm-shared")
    message = r"model: expected one that enable\(\) changed, got GlmMoeDsaForCausalLM"
    with pytest.raises(ValueError, match=message), sa.record(dense):
        pass
    with sa.record(sparse) as selections:
        sparse(ids)
    with pytest.raises(TypeError, match="selections: expected Selections, got dict"), sa.replay(sparse, {}):
        pass
    partial = sa.Selections({0: selections[0]})
    with (
        pytest.raises(ValueError, match=r"selections: .* got none for layers \[3\]"),
        sa.replay(sparse, partial),
    ):
        pass
    with sa.replay(sparse, selections):
        sparse(ids[:, :60])
        with pytest.raises(
            ValueError, match=r"selections: expected \[2, 71, k\] at least for layer 0, got \[2, 70"
        ):
            sparse(ids[:, :11])
    with sa.replay(sparse, selections), pytest.raises(ValueError, match=r"expected \[1, 70, k\]"):
        sparse(ids[:1])
    sparse(ids)  # nothing is left of them
    for wrong in (selections[0].long(), selections[0][0], None):
        with pytest.raises(ValueError, match=r"layers\[0\]: expected \[B, tokens, k\] int32, got"):
            sa.Selections({0: wrong})
