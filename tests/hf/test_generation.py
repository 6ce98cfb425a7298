"""Models of every family after enable() against the same models with transformers' own eager attention."""

import copy

import pytest
import torch
from tiny import (
    KINDS,
    TOPK,
    VOCABULARY,
    assert_same,
    empty_cache,
    generate,
    layers,
    logits,
    make_pair,
    models,
    padded,
    sa,
)

from sparse_attn import index_logits

STATIC = [(kind, static) for kind in KINDS for static in (False, True) if (kind, static) != ("v4", True)]
CHUNKS = {"decode": [60] + [1] * 10, "chunks": [33, 27, 10], "short-first": [20, 1, 1, 48]}
# Static caches take the ways in turn.
FED = [
    (kind, static, name)
    for n, kind in enumerate(KINDS)
    for static, name in [*((False, name) for name in CHUNKS), (True, [*CHUNKS][n % 3])]
    if (kind, static) in STATIC
]
PADS_DIFFER = {"v4", "m3", "m3-vl"}  # padding is part of what the model computes


@pytest.fixture(params=KINDS)
def pair(request):
    return models(request.param)


@pytest.fixture
def ids():
    torch.manual_seed(1)
    return torch.randint(3, VOCABULARY, (2, 70))


@pytest.mark.parametrize(("kind", "static", "fed"), FED)
def test_logits_of_prefill_chunks_and_decode(ids, kind, static, fed):
    dense, sparse = (logits(m, ids, CHUNKS[fed], empty_cache(m, static)) for m in models(kind))
    assert_same(sparse, dense)
    assert_same(models(kind)[1](ids, use_cache=False).logits, dense)


def test_greedy_tokens_of_manual_decode(pair, ids):
    tokens = []
    for model in pair:
        cache, new = empty_cache(model), [ids[:, :40]]
        for _ in range(16):
            new.append(model(new[-1], past_key_values=cache).logits[:, -1:].argmax(-1))
        tokens.append(torch.cat(new, 1))
    assert torch.equal(*tokens)


STATEFUL = {"v4", "glm5", "glm5-shared", "qwen4"}  # transformers has no assisted generation for them
GENERATION = {
    "greedy": {},
    "static": {"cache_implementation": "static"},
    "chunked": {"prefill_chunk_size": 16},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 0.7},
    "beams": {"num_beams": 3},
    "sampled-beams": {"num_beams": 2, "do_sample": True, "num_return_sequences": 2},
    "lookup": {"prompt_lookup_num_tokens": 3},
}
SAMPLED = ("sampling", "sampled-beams")  # to a model as greedy and beams are: each kind takes one of them
LEFT_PADDED = [
    (kind, name, (70, 31))
    for n, kind in enumerate(KINDS)
    for name in GENERATION
    if name not in ("lookup", SAMPLED[n % 2]) and (kind, name) != ("v4", "static")
]
OTHERS = [(kind, "greedy", (70, 70)) for kind in KINDS]
OTHERS += [(kind, "lookup", (90,)) for kind in KINDS if kind not in STATEFUL]


@pytest.mark.parametrize(("kind", "name", "lengths"), LEFT_PADDED + OTHERS)
def test_generate(ids, kind, name, lengths):
    ids, mask = padded(ids.repeat(1, 2), lengths, "left")
    tokens = []
    for model in models(kind):
        torch.manual_seed(5)
        tokens.append(generate(model, ids, attention_mask=mask, **GENERATION[name]))
    assert torch.equal(*tokens)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in PADS_DIFFER])
def test_left_padding_changes_nothing(ids, kind):
    """Each sequence of a padded batch gives the tokens that it gives alone."""
    model = models(kind)[1]
    batch, mask = padded(ids, (29, 61), "left")
    together = generate(model, batch, attention_mask=mask)
    for b, n in enumerate((29, 61)):
        assert torch.equal(together[b : b + 1], generate(model, ids[b : b + 1, :n]))


@pytest.mark.parametrize(("kind", "static"), STATIC)
def test_padding_on_the_right_and_in_between(ids, kind, static):
    """A batch padded on its right goes on with new tokens: then the padding lies between real tokens."""
    batch, mask = padded(ids, (60, 37), "right")
    batch = torch.cat([batch, ids[:, -8:]], 1)
    mask = torch.cat([mask, torch.ones(2, 8).long()], 1)
    chunks = [60, 5, 1, 1, 1]
    dense, sparse = (logits(m, batch, chunks, empty_cache(m, static), mask) for m in models(kind))
    assert_same(sparse[mask.bool()], dense[mask.bool()])


@pytest.mark.parametrize("to_sparse", [True, False])
def test_either_side_goes_on_from_the_others_cache(pair, ids, to_sparse):
    first, then = pair if to_sparse else reversed(pair)
    cache = empty_cache(first)
    first(ids[:, :50], past_key_values=cache)
    assert_same(logits(then, ids[:, 50:], 4, cache), pair[0](ids).logits[:, 50:])


def test_queries_in_chunks_are_the_same(pair, ids, monkeypatch):
    whole = pair[1](ids).logits
    monkeypatch.setattr(sa.inputs, "QUERY_BYTES", 2 * 7 * 4 * (40 + 16) * 4)  # seven tokens of two sequences
    assert_same(pair[1](ids).logits, whole)


def test_enough_topk_is_dense_attention(ids):
    """With index_topk above the context every visible token is read, and the indexer does not run."""
    dense, sparse = make_pair("v32", index_topk=128)
    batch, mask = padded(ids, (70, 41), "left")
    for changes in ({}, {"attention_mask": mask}, {"attention_mask": mask.flip(1)}):
        keep = changes.get("attention_mask", torch.ones_like(mask)).bool()
        assert_same(sparse(batch, **changes).logits[keep], dense(batch, **changes).logits[keep])


PACKED = ["v32", "glm-shared", "mistral", "dots"]


@pytest.mark.parametrize("kind", [kind for kind in PACKED if kind in KINDS])
def test_sequences_packed_in_a_row_do_not_see_each_other(ids, kind):
    """Positions that restart, without a cache, as for log-probabilities of many texts at once."""
    dense, sparse = models(kind)
    positions = torch.cat([torch.arange(31), torch.arange(39)])[None]
    out = sparse(ids, position_ids=positions.expand(2, -1), use_cache=False).logits
    assert_same(out, dense(ids, position_ids=positions.expand(2, -1), use_cache=False).logits)
    for part in (slice(31), slice(31, None)):
        assert_same(out[:, part], sparse(ids[:, part], use_cache=False).logits)


@pytest.mark.parametrize("kind", ["v32", "glm-shared"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_layers_are_as_exact(kind, dtype):
    """One layer in 16 bits against itself in fp64: our error is not above that of transformers' eager."""
    dense, sparse = (layers(m)[0].self_attn for m in models(kind))
    hidden = torch.randn(2, 70, 96)
    rotary = models(kind)[0].model.rotary_emb

    def run(layer, dtype):
        layer = copy.deepcopy(layer).to(dtype)
        layer.indexer.weights_proj.float()  # as from_pretrained does
        x = hidden.to(dtype)
        if type(layer) in sa.SPARSE:
            mask = torch.full((70, 70), torch.finfo(dtype).min, dtype=dtype).triu(1).expand(2, 1, -1, -1)
        else:
            mask = sa.inputs.visible_rows(2, 70, 70)
        return layer(x, rotary(x, torch.arange(70)[None]), mask)[0].double()

    truth = run(sparse, torch.float64)
    scale = truth.abs().max()
    ours, theirs = ((run(layer, dtype) - truth).abs().max() / scale for layer in (sparse, dense))
    assert (run(dense, torch.float64) - truth).abs().max() / scale < 1e-6  # its softmax is fp32
    assert ours <= 1.5 * theirs


def test_the_decode_step_compiles_in_one_graph(ids):
    torch._dynamo.reset()
    dense, sparse = make_pair("glm-shared", num_hidden_layers=2, indexer_types=["full", "shared"])
    batch, mask = padded(ids, (60, 25), "left")
    compiled = torch.compile(sparse.forward, fullgraph=True, backend="aot_eager")
    results = []
    for model, step in ((dense, dense.forward), (sparse, compiled)):
        model.set_experts_implementation("batched_mm")  # the loop over experts does not compile
        cache, outs = empty_cache(model, static=True), []
        model(batch, past_key_values=cache, attention_mask=mask)
        for t in range(4):
            now = torch.cat([mask, torch.ones(2, t + 1).long()], 1)
            full = torch.nn.functional.pad(now, (0, 80 - now.shape[1]))  # one shape for all steps
            outs.append(step(ids[:, 60 + t : 61 + t], past_key_values=cache, attention_mask=full).logits)
        results.append(torch.cat(outs, 1))
    assert_same(results[1], results[0])


@pytest.mark.parametrize("heads", [32, 2])
@pytest.mark.parametrize("kind", ["v32", "glm"])
def test_selections_by_score(ids, kind, heads, monkeypatch):
    """Both sides' indices in the first layer, compared by the scores that they select.

    With two heads many scores are exactly zero: transformers takes any of them, we take the first."""
    dense, sparse = make_pair(kind, index_n_heads=heads)
    theirs, ours = [], []
    layers(dense)[0].self_attn.indexer.register_forward_hook(lambda module, args, out: theirs.append(out))
    lightning_topk = sa.tokens.lightning_topk

    def recording(q, k, weights, topk, ks, ke, **options):
        selected = lightning_topk(q, k, weights, topk, ks, ke, **options)
        ours.append((selected, index_logits(q, k, weights, ks, ke, **options)))
        return selected

    monkeypatch.setattr(sa.tokens, "lightning_topk", recording)
    dense(ids), sparse(ids)
    selected, scores = ours[0]
    visible = torch.arange(1, 71).repeat(2)
    assert ((selected >= 0).sum(1) == visible.clamp_max(TOPK)).all()
    assert (selected < visible[:, None]).all()
    enough = visible >= TOPK
    got, expected = (
        scores[enough].gather(1, i.flatten(0, -2)[enough].long()).sort(1).values
        for i in (selected, theirs[0])
    )
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert (heads == 2) == bool((scores == 0).sum(1).gt(1).any())
