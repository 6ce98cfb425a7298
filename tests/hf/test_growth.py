"""Memory: caches that grow in place, and nothing of the size of the whole mask or the expanded latents."""

import pytest
import torch
from tiny import VOCABULARY, assert_same, empty_cache, logits, models, sa
from torch.utils._python_dispatch import TorchDispatchMode


@pytest.fixture
def ids():
    torch.manual_seed(1)
    return torch.randint(3, VOCABULARY, (2, 70))


def test_dynamic_caches_grow_in_place_and_branch(ids, monkeypatch):
    """A new token copies no row of the cache, and two continuations of one cache do not change each other."""
    monkeypatch.setattr(sa.growth, "SPARE", 1)
    model = models("v32")[1]
    cache, branch = empty_cache(model), empty_cache(model)
    with torch.inference_mode():
        logits(model, ids[:, :40], [39, 1], cache)
    logits(model, ids[:, 40:44], 1, cache)  # what inference mode made cannot be written outside of it
    layer = cache.layers[0]
    before = [layer.keys, layer.values, layer.indexer_keys]
    copies = [rows.clone() for rows in before]
    logits(model, ids[:, 44:45], 1, cache)
    after = [layer.keys, layer.values, layer.indexer_keys]
    assert [rows.data_ptr() for rows in before] == [rows.data_ptr() for rows in after]
    for ours, theirs in zip(branch.layers, cache.layers, strict=True):
        ours.__dict__.update(theirs.__dict__)
    logits(model, ids[:, 45:50], [2, 3], cache)
    other = torch.cat([ids[:, :45], ids[:, 55:60]], 1)
    assert_same(logits(model, other[:, 45:], [2, 3], branch), model(other).logits[:, 45:])
    assert_same(logits(model, ids[:, 50:52], 1, cache), model(ids[:, :52]).logits[:, 50:])
    cache.crop(-7)
    assert_same(logits(model, other[:, 45:], [2, 3], cache), model(other).logits[:, 45:])
    assert all(torch.equal(*pair) for pair in zip(before, copies, strict=True))


class Shapes(TorchDispatchMode):
    """The shapes of all tensors that are made."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.seen.add(tuple(tensor.shape))
        return out


@pytest.mark.parametrize(
    "kind, past, new, size, others",
    [
        ("v32", 100, 31, 131, {31, 4}),  # the rows of the cache with the new tokens, or with the heads
        ("v4", 133, 63, 63, {15 + 63, 49}),  # the new tokens with the rows of the window, or with all entries
    ],
)
def test_no_mask_and_no_expanded_latent(kind, past, new, size, others):
    """No tensor has both the size and one of the others among its dimensions."""
    ids = torch.randint(3, VOCABULARY, (1, past + new))
    found = []
    for model in models(kind):
        cache = empty_cache(model)
        model(ids[:, :past], past_key_values=cache)
        with Shapes() as shapes:
            model(ids[:, past:], past_key_values=cache)
        found.append({shape for shape in shapes.seen if size in shape and others.intersection(shape)})
    dense, sparse = found
    assert dense and not sparse
