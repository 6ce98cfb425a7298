"""Models of families without an indexer, with one attached, against the same models with dense attention."""

import functools
import re

import pytest
import torch
from tiny import VOCABULARY, assert_same, empty_cache, generate, logits, padded, sa, transformers

from sparse_attn.integrations.transformers.attach import full_layers

COMMON = {
    **{"vocab_size": VOCABULARY, "hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 3},
    **{"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 2048},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
WINDOWS = {
    "sliding_window": 16,
    "layer_types": [f"{kind}_attention" for kind in ("sliding", "full", "sliding")],
}
FAMILIES = {
    "Llama": {},
    "Mistral": {"sliding_window": None},
    "Qwen2": {},
    "Qwen3": {"head_dim": 24},
    "SmolLM3": {},
    "Phi3": {},
    "Gemma3Text": {"head_dim": 24, **WINDOWS},
}
HYBRID = {"num_hidden_layers": 4, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2}
FEW, MANY = 12, 96


@pytest.fixture
def ids():
    torch.manual_seed(1)
    return torch.randint(3, VOCABULARY, (2, 70))


def make(family, **changes):
    sizes = {**COMMON, **FAMILIES.get(family, {}), **changes}
    config = getattr(transformers, f"{family}Config")(**sizes)
    torch.manual_seed(0)
    auto = transformers.AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if "attn." in name and parameter.dim() > 1:
            parameter.mul_(4)
    return model


dense_model = functools.cache(make)


def random_indexers(model):
    torch.manual_seed(2)
    full = full_layers(model)
    size = {"n_heads": 4, "head_dim": 16, "rope_dim": 4}
    return sa.Indexers(model.config.hidden_size, dict.fromkeys(full, size))


@pytest.fixture(params=FAMILIES)
def model(request):
    model = dense_model(request.param)
    yield model
    sa.disable(model)


@pytest.fixture
def llama():
    model = dense_model("Llama")
    yield model
    sa.disable(model)


@pytest.fixture(params=["training-free", "learned"])
def attach(request):
    def call(model, topk):
        sa.attach(
            model, topk=topk, indexer=None if request.param == "training-free" else random_indexers(model)
        )

    return call


def test_selecting_every_token_is_dense(model, attach, ids):
    dense, tokens = model(ids).logits, generate(model, ids)
    attach(model, MANY)
    assert_same(model(ids).logits, dense)
    assert torch.equal(generate(model, ids), tokens)
    sa.disable(model)
    assert torch.equal(model(ids).logits, dense)


@pytest.mark.parametrize("static", [False, True])
def test_chunks_and_decode_are_one_prefill(model, attach, ids, static):
    attach(model, FEW)
    whole = model(ids, use_cache=False).logits
    assert_same(logits(model, ids, [33, 27, 1, 1, 1, 7], empty_cache(model, static)), whole)
    assert_same(logits(model, ids, [20, 50], transformers.DynamicCache(config=model.config)), whole)


def test_beside_linear_attention(ids):
    model, ids = make("Qwen3Next", **HYBRID), ids[:, :40]
    dense = model(ids).logits
    sa.attach(model, topk=MANY, indexer=random_indexers(model))
    assert_same(logits(model, ids, [30, 1, 9], empty_cache(model)), dense)


def test_few_tokens_are_not_dense(llama, attach, ids):
    dense = llama(ids).logits
    attach(llama, FEW)
    assert (llama(ids).logits[:, FEW:] - dense[:, FEW:]).abs().max() > 1e-3
    assert_same(llama(ids).logits[:, :FEW], dense[:, :FEW])


GENERATION = {
    "static": {"cache_implementation": "static"},
    "chunked": {"prefill_chunk_size": 16},
    "beams": {"num_beams": 3},
    "lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("name", GENERATION)
def test_generate(llama, attach, ids, name):
    ids = ids.repeat(1, 2)[:1] if name == "lookup" else ids
    attach(llama, FEW)
    plain = {} if name != "beams" else {"num_beams": 3, "use_cache": False}
    assert torch.equal(generate(llama, ids, **GENERATION[name]), generate(llama, ids, **plain))


def test_left_padding_changes_nothing(model, attach, ids):
    attach(model, FEW)
    batch, mask = padded(ids, (29, 61), "left")
    together = generate(model, batch, attention_mask=mask)
    for b, n in enumerate((29, 61)):
        assert torch.equal(together[b : b + 1], generate(model, ids[b : b + 1, :n]))


def test_padding_on_the_right_and_in_between(llama, attach, ids):
    batch, mask = padded(ids, (60, 37), "right")
    batch, mask = torch.cat([batch, ids[:, -8:]], 1), torch.cat([mask, torch.ones(2, 8).long()], 1)
    dense = logits(llama, batch, [60, 8], empty_cache(llama), mask)
    attach(llama, MANY)
    assert_same(logits(llama, batch, [60, 8], empty_cache(llama), mask)[mask.bool()], dense[mask.bool()])
    attach(llama, FEW)
    alone = llama(torch.cat([ids[1:, :37], ids[1:, -8:]], 1), use_cache=False).logits
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    beside = llama(batch, attention_mask=mask, position_ids=positions, use_cache=False).logits
    assert_same(beside[1:, -8:], alone[:, -8:])


def test_training_free_selects_what_gets_most_attention(llama, ids):
    llama.set_attn_implementation("eager")
    weights = llama(ids[:1], output_attentions=True).attentions[1][0].sum(0)  # [s_q, s_kv]
    sa.attach(llama, topk=[MANY, FEW, MANY])
    with sa.record(llama) as selections:
        llama(ids[:1])
    for t in (20, 50, 69):
        assert sorted(selections[1][0, t].tolist()) == sorted(weights[t].topk(FEW).indices.tolist())


def test_learned_selects_first_own_and_highest_scores(llama, ids):
    indexers = random_indexers(llama)
    sa.attach(llama, topk=FEW, indexer=indexers)
    held = []
    hook = llama.model.layers[0].self_attn.register_forward_pre_hook(
        lambda _, args, kwargs: held.append(kwargs), with_kwargs=True
    )
    with sa.record(llama) as selections:
        llama(ids[:1])
    hook.remove()
    angles = [x[0] for x in held[0]["position_embeddings"]]
    t = torch.tensor([20, 69])
    scores = indexers[0].scores(held[0]["hidden_states"][0], angles, t)
    for row, position in zip(scores, t.tolist(), strict=True):
        best = row[1:position].topk(FEW - 2).indices + 1
        assert sorted(selections[0][0, position].tolist()) == sorted([0, position, *best.tolist()])


def test_indexers_are_saved_and_loaded(llama, tmp_path, ids):
    indexers = random_indexers(llama)
    indexers.layers["1"].wk.weight.data[2] = 0.0
    indexers.counts, indexers.lost = [8, 32], {0: [4.0, 1.0], 1: [1.0, 0.9], 2: [2.0, 0.5]}
    sa.save_indexer(indexers, tmp_path / "indexer.safetensors")
    loaded = sa.load_indexer(tmp_path / "indexer.safetensors")
    assert (loaded.sizes, loaded.lost, loaded.counts) == (indexers.sizes, indexers.lost, indexers.counts)
    for name, weight in indexers.state_dict().items():
        if weight.dim() == 2:  # rounded to one of 255 values in each row
            half = weight.abs().amax(1, keepdim=True) / 254
            assert ((loaded.state_dict()[name] - weight).abs() <= 1.001 * half).all(), name
        else:
            assert torch.equal(loaded.state_dict()[name], weight), name
    sa.attach(llama, topk=FEW, indexer=loaded)
    expected = llama(ids).logits
    sa.save_indexer(loaded, tmp_path / "again.safetensors")  # what is rounded stays as it is
    sa.attach(llama, topk=FEW, indexer=sa.load_indexer(tmp_path / "again.safetensors"))
    assert torch.equal(llama(ids).logits, expected)


def test_allocation_follows_what_layers_lose():
    size = {"n_heads": 1, "head_dim": 4, "rope_dim": 4}
    lost = {0: [8.0, 4.0, 1.0], 1: [0.2, 0.1, 0.0], 2: [4.0, 1.0, 0.25]}
    indexers = sa.Indexers(8, dict.fromkeys(lost, size), lost, [16, 64, 256])
    ks = indexers.allocate(64)
    assert 128 >= ks[0] > ks[2] > ks[1] >= 32 and 60 <= sum(ks) / 3 <= 64
    assert sa.Indexers(8, dict.fromkeys(lost, size)).allocate(64) == [64] * 3


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("Gemma2", "Gemma2Attention has soft-capped scores"),
        ("GPT2", "GPT2Attention is not grouped-query attention"),
        ("DeepseekV32", re.escape("has an indexer of its own; call enable(model)")),
        ("Mamba", "got mamba without attention"),
    ],
)
def test_other_models_are_refused(family, message):
    sizes = {"first_k_dense_replace": 3} if family == "DeepseekV32" else {}
    with pytest.raises(TypeError, match=message):
        sa.attach(make(family, **sizes), topk=FEW)


def test_windows_alone_are_refused():
    model = make("Gemma3Text", layer_types=["sliding_attention"] * 3)
    with pytest.raises(TypeError, match="whose layers read all tokens"):
        sa.attach(model, topk=FEW)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"topk": 2}, ValueError, "topk: expected an integer above 2, or one for each of the 3 layers"),
        ({"topk": [16, 16]}, ValueError, "topk: .* got \\[16, 16\\]"),
        ({"topk": 16, "indexer": "a"}, TypeError, "indexer: expected Indexers"),
        ({"topk": 16, "indexer": sa.Indexers(8, {})}, ValueError, "indexer: expected hidden_size=96"),
    ],
)
def test_wrong_arguments(llama, options, error, message):
    with pytest.raises(error, match=message):
        sa.attach(llama, **options)
    assert not hasattr(llama.model.layers[0].self_attn, "indexer")


def test_a_cache_from_before_is_refused(llama, ids):
    cache = empty_cache(llama)
    llama(ids[:, :50], past_key_values=cache)
    sa.attach(llama, topk=FEW, indexer=random_indexers(llama))
    with pytest.raises(ValueError, match="cache: expected index keys of its 50 tokens in layer 0, got 0"):
        llama(ids[:, 50:], past_key_values=cache)


def test_a_file_of_something_else_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"path: expected a file of save_indexer"):
        sa.load_indexer(tmp_path / "other.safetensors")


def test_wider_rotation_than_the_models_is_refused(llama, ids):
    size = {"n_heads": 1, "head_dim": 64, "rope_dim": 64}
    sa.attach(llama, topk=FEW, indexer=sa.Indexers(96, dict.fromkeys(range(3), size)))
    with pytest.raises(ValueError, match="rope_dim: expected at most the model's 16, got 64"):
        llama(ids)


def test_gradients_of_every_token_are_those_of_dense(llama, ids):
    parameters = dict(llama.named_parameters())

    def gradients():
        with torch.enable_grad():
            loss = llama(ids, labels=ids, use_cache=False).loss
            return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))

    dense = gradients()
    sa.attach(llama, topk=MANY, indexer=random_indexers(llama))
    with sa.adapt(llama):
        sparse = gradients()
    for name, gradient in dense.items():
        assert (sparse[name] - gradient).abs().max() <= 1e-6 * max(1.0, gradient.abs().max()), name


def test_adaptation_trains_the_indexers_and_not_the_model_by_their_losses(ids):
    model = make("Llama")
    sa.attach(model, topk=FEW, indexer=random_indexers(model))
    indexers = [p for name, p in model.named_parameters() if ".indexer." in name]
    others = [p for name, p in model.named_parameters() if ".indexer." not in name]
    optimiser = torch.optim.Adam(indexers, 1e-2)
    found = []
    with sa.adapt(model.train()) as losses, torch.enable_grad():
        for _ in range(20):
            model(ids, use_cache=False)
            loss = torch.stack(losses).sum()
            found.append(loss.item())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.clear()
    assert all(parameter.grad is None for parameter in others)
    assert found[-1] < 0.97 * found[0]
    with pytest.raises(ValueError, match="expected evaluation mode"):
        model(ids)


def test_adaptation_of_no_indexers_is_refused(llama):
    sa.attach(llama, topk=FEW)
    with pytest.raises(TypeError, match="model: expected one that attach"), sa.adapt(llama):
        pass


def test_a_cache_in_adaptation_is_refused(llama, ids):
    sa.attach(llama, topk=FEW, indexer=random_indexers(llama))
    with sa.adapt(llama), pytest.raises(ValueError, match="use_cache: expected False"):
        llama(ids)
