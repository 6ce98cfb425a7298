"""SGLang's own methods on CPU tensors, with the hooks under them, against plain torch.

Nothing is served here: that needs a GPU. FlashMLA's wheel does not load without one, so a module stands for
it whose functions must not be called.
"""

import logging
import sys
from importlib import metadata
from types import ModuleType, SimpleNamespace

import pytest
import torch

pytest.importorskip("sglang", reason="make test-sglang runs these in an environment with SGLang")

from sglang.srt import plugins, runtime_context
from sglang.srt.plugins.hook_registry import HookRegistry

from sparse_attn.integrations import sglang as integration

PAGE, TOPK, HEADS, INDEX_HEADS, PAGES = 64, 64, 16, 8, 48
E4M3 = torch.float8_e4m3fn
SCALE = 0.07


class Wheel(ModuleType):
    """FlashMLA's wheel, none of whose functions may be called."""

    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def fail(*arguments, **options):
            raise AssertionError(f"flash_mla.{name} was called")

        return fail


@pytest.fixture(scope="module")
def wheel():
    """Two stand-ins, as SGLang imports a class from the second. Its modules load before a GPU is feigned."""
    names = "flash_mla", "flash_mla.flash_mla_interface"
    sys.modules.update({name: Wheel(name) for name in names})
    sys.modules[names[1]].FlashMLASchedMeta = type("FlashMLASchedMeta", (), {})
    assert integration.unreachable() is None
    yield
    for name in names:
        del sys.modules[name]


@pytest.fixture(scope="module")
def sgl(wheel):
    """SGLang's modules after its own loader has found and applied the hooks, and what that changed."""
    from sglang.kernels.ops.attention import flash_mla_interface
    from sglang.kernels.ops.attention.dsa import dequant_k_cache, indexer_q
    from sglang.kernels.ops.quantization import act_quant_triton, dsa_quant_k_cache
    from sglang.srt.layers.attention import dsa_backend
    from sglang.srt.layers.attention.dsa import dsa_indexer, dsa_indexer_metadata, dsa_topk_backend, utils
    from sglang.srt.mem_cache import memory_pool

    before = snapshot()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGLANG_PLUGINS", "sparse_attn")
        patch.setattr(plugins, "_plugins_loaded", False)
        plugins.load_plugins()
    after = snapshot()
    dsa_indexer.fused_q_indexer_rope_first_quant = (
        indexer_q.fused_q_indexer_rope_first_quant
    )  # imported on CUDA
    return SimpleNamespace(
        interface=flash_mla_interface,
        dequant=dequant_k_cache,
        quant=dsa_quant_k_cache,
        act_quant=act_quant_triton,
        backend=dsa_backend,
        indexer=dsa_indexer,
        metadata=dsa_indexer_metadata,
        topk=dsa_topk_backend,
        utils=utils,
        pool=memory_pool,
        before=before,
        after=after,
    )


def snapshot():
    """Every function that SGLang's loaded modules and their classes have, by owner and name."""
    found = {}
    for name, module in list(sys.modules.items()):
        if not name.startswith("sglang.") or not isinstance(module, ModuleType):
            continue
        for attribute, value in list(vars(module).items()):
            if isinstance(value, type) and value.__module__ == name:
                found |= {(f"{name}.{attribute}", k): v for k, v in vars(value).items() if callable(v)}
            elif callable(value):
                found[name, attribute] = value
    return found


@pytest.fixture(autouse=True)
def not_deterministic(monkeypatch):
    serve(monkeypatch, deterministic=False)


def serve(monkeypatch, deterministic):
    bag = SimpleNamespace(deterministic=SimpleNamespace(enable_deterministic_inference=deterministic))
    monkeypatch.setattr(runtime_context, "get_exec", lambda: bag)


# Registration


@pytest.fixture
def registered(monkeypatch):
    """The targets that register() hands to SGLang, which does not get them here."""
    targets = []
    monkeypatch.setattr(HookRegistry, "register", lambda target, hook, kind: targets.append(target))
    integration.refusal.cache_clear()
    yield targets
    integration.refusal.cache_clear()


def gpu(monkeypatch, *capability):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9)])
def test_hooks_are_registered_on_gpus_older_than_sm_90(wheel, registered, monkeypatch, capability, caplog):
    gpu(monkeypatch, *capability)
    integration.register()
    assert sorted(registered) == sorted([*integration.replacements(), *integration.wrappers()])
    assert not caplog.records


@pytest.mark.parametrize("capability", [(9, 0), (10, 0), (12, 0)])
def test_nothing_is_registered_where_sglang_has_kernels(wheel, registered, monkeypatch, capability, caplog):
    gpu(monkeypatch, *capability)
    integration.register()
    assert not registered and not caplog.records


def test_nothing_is_registered_on_amd(wheel, registered, monkeypatch):
    gpu(monkeypatch, 8, 0)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    integration.register()
    assert not registered


@pytest.mark.parametrize("release", ["0.5.22", "0.5.24", "0.6.0"])
def test_untested_releases_are_refused_by_name(wheel, registered, monkeypatch, release, caplog):
    gpu(monkeypatch, 8, 0)
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: release if name == "sglang" else version(name))
    with caplog.at_level(logging.WARNING):
        integration.register()
    (record,) = caplog.records
    assert not registered and f"tested with 0.5.23, got {release}" in record.message


def test_no_hook_without_all_others(registered, monkeypatch, caplog):
    """SGLang would log that one does not apply and go on with the rest."""
    gpu(monkeypatch, 8, 0)
    monkeypatch.setitem(sys.modules, integration.INTERFACE, None)  # as where FlashMLA's wheel does not load
    monkeypatch.delattr("sglang.kernels.ops.attention.flash_mla_interface", raising=False)
    with caplog.at_level(logging.WARNING):
        integration.register()
    (record,) = caplog.records
    assert not registered and "do not load here" in record.message


def test_only_the_named_functions_change(sgl):
    """A hook reaches its target and every module that imported it by name, and nothing else."""
    changed = {owner for owner, value in sgl.before.items() if sgl.after.get(owner) is not value}
    targets = {
        tuple(target.rsplit(".", 1)) for target in (*integration.replacements(), *integration.wrappers())
    }
    originals = {id(sgl.before[target]) for target in targets}
    assert targets <= changed
    assert all(id(sgl.before[owner]) in originals for owner in changed)
    assert (f"{integration.LAYERS}.dsa_backend", "resolve_num_sms") in changed
    assert ("sglang.srt.mem_cache.memory_pool", "quantize_k_cache_separate") in changed


# Attention


def attend(q, rows, indices, sink=None, topk_length=None):
    """``q [tokens, heads, 576]`` to the named ``rows [slots, 576]``, in fp64: results and log-sum-exps."""
    out = torch.zeros(*q.shape[:2], 512, dtype=torch.float64)
    lse = torch.full(q.shape[:2], float("inf"), dtype=torch.float64)
    for t, chosen in enumerate(indices):
        chosen = chosen if topk_length is None else chosen[: topk_length[t]]
        kv = rows[chosen[chosen >= 0].long()].double()
        if len(kv) == 0:
            continue
        scores = q[t].double() @ kv.T * SCALE
        lse[t] = scores.logsumexp(-1)
        weights = scores.softmax(-1)
        if sink is not None:
            weights = weights / (1 + (sink.double() - lse[t]).exp())[:, None]
        out[t] = weights @ kv[:, :512]
    return out, lse


def attention_inputs(tokens=5, heads=HEADS):
    torch.manual_seed(0)
    q, rows = torch.randn(tokens, heads, 576).bfloat16(), torch.randn(PAGES * PAGE, 576).bfloat16()
    indices = torch.stack([torch.randperm(len(rows))[:TOPK] for _ in range(tokens)]).int()
    indices[2, 40:], indices[3] = -1, -1
    return q, rows, indices


def backend(sgl, **attributes):
    """SGLang's backend with what its methods read, without a model runner."""
    made = object.__new__(sgl.backend.DeepseekSparseAttnBackend)
    usual = {
        "device_sm_major": 8,
        "_sink_pad_cache": {},
        "flashmla_kv_num_q_heads": 64,
        "physical_page_size": PAGE,
        "kv_cache_dim": 656,
        "dsa_index_topk": TOPK,
        "dsa_index_kpool": 1,
        "flashmla_kv_format": "V32",
        "use_mha": False,
        "use_fused_topk": True,
        "hisparse_coordinator": None,
        "dsa_topk_backend": sgl.topk.DSATopKBackend.SGL_KERNEL,
        "num_splits": 0,
    }
    for name, value in (usual | attributes).items():
        setattr(made, name, value)
    return made


def layer(heads=HEADS):
    sizes = {"tp_q_head_num": heads, "head_dim": 576, "v_head_dim": 512}
    return SimpleNamespace(is_cross_attention=False, layer_id=0, scaling=SCALE, logit_cap=0.0, **sizes)


def pack(rows):
    """SGLang's 656 bytes of each row, written out: e4m3, a scale per 128 values, bf16."""
    blocks = rows[:, :512].float().view(-1, 4, 128)
    scales = blocks.abs().amax(-1, keepdim=True) / 448
    values = (blocks / scales).to(E4M3).view(-1, 512).view(torch.uint8)
    packed = torch.cat([values, scales.view(-1, 4).view(torch.uint8), rows[:, 512:].view(torch.uint8)], 1)
    restored = torch.cat(
        [(values.view(E4M3).float().view(-1, 4, 128) * scales).view(-1, 512), rows[:, 512:]], 1
    )
    return packed, restored


def assert_near(out, expected, tolerance=1e-2):
    assert torch.isfinite(out.double()).all()
    assert (out.double() - expected).abs().max() < tolerance * expected.abs().max()


@pytest.mark.parametrize("heads", [HEADS, 64])
def test_sparse_prefill(sgl, heads):
    q, rows, indices = attention_inputs(heads=heads)
    lengths = torch.tensor([TOPK, 20, 40, 0, TOPK], dtype=torch.int32)
    method = sgl.backend.DeepseekSparseAttnBackend._forward_flashmla_sparse
    out = method(backend(sgl), q, rows[:, None], 512, indices, SCALE, lengths)
    assert_near(out, attend(q, rows, indices, topk_length=lengths)[0])
    assert out[3].eq(0).all()


def test_attention_sinks_of_padded_heads(sgl):
    q, rows, indices = attention_inputs()
    sink = torch.randn(HEADS)
    method = sgl.backend.DeepseekSparseAttnBackend._forward_flashmla_sparse
    out = method(backend(sgl), q, rows[:, None], 512, indices, SCALE, None, sink)
    assert_near(out, attend(q, rows, indices, sink)[0])


def test_statistics_are_in_base_2_for_the_legacy_kernels(sgl):
    q, rows, indices = attention_inputs()
    inputs = q, rows[:, None], indices[:, None], SCALE
    _, _, lse = sgl.interface.flash_mla_sparse_fwd(*inputs)
    _, highest, natural = sgl.interface.flash_mla_sparse_fwd(*inputs, use_legacy=False)
    expected = attend(q, rows, indices)[1]
    assert torch.allclose(natural.double(), expected, atol=1e-3)
    assert torch.allclose(lse.double(), expected / torch.tensor(2.0).log(), atol=1e-3)
    assert (highest[:3] <= natural[:3]).all()


@pytest.mark.parametrize("quantised", [True, False])
def test_decode_of_fp8_latents(sgl, quantised):
    """Through the plan that SGLang keeps in its metadata; a plain cache is quantised on the way."""
    q, rows, indices = attention_inputs()
    packed, restored = pack(rows)
    cache = packed.view(E4M3) if quantised else rows
    self = backend(sgl, dsa_kv_cache_store_fp8=quantised, kv_cache_dim=656 if quantised else 576)
    lengths = torch.full((len(q),), TOPK, dtype=torch.int32)
    plan = self._compute_flashmla_metadata(lengths, 1)
    kept = plan.slice(slice(0, len(q) + 1))
    kept.copy_(plan)
    assert kept.num_splits.shape == (len(q) + 1,)
    batch = SimpleNamespace(dsa_cache_seqlens_int32=lengths, flashmla_metadata=kept)
    out = self._forward_flashmla_kv(q, cache[:, None], 512, SCALE, layer(), batch, indices)
    assert out.shape == (len(q), 1, HEADS, 512)
    assert_near(out[:, 0], attend(q, restored, indices)[0])


@pytest.mark.parametrize("kind", ["fa3", "flashmla_sparse", "flashmla_kv"])
def test_decode_of_the_whole_backend(sgl, kind):
    """forward_decode with each implementation that SGLang chooses for an old GPU; "fa3" is its default."""
    q, rows, indices = attention_inputs()
    packed, restored = pack(rows)
    fp8 = kind == "flashmla_kv"
    self = backend(sgl, dsa_decode_impl=kind, dsa_kv_cache_store_fp8=fp8)
    cache = packed.view(E4M3) if fp8 else rows
    self.token_to_kv_pool = SimpleNamespace(get_key_buffer=lambda layer_id: cache[:, None])
    lengths = torch.full((len(q),), TOPK, dtype=torch.int32)
    starts = torch.arange(len(q) + 1, dtype=torch.int32)
    self.forward_metadata = SimpleNamespace(
        dsa_cache_seqlens_int32=lengths,
        dsa_cu_seqlens_q=starts,
        dsa_cu_seqlens_k=starts * TOPK,
        dsa_max_seqlen_q=1,
        flashmla_metadata=self._compute_flashmla_metadata(lengths, 1),
    )
    out = self.forward_decode(q, None, None, layer(), SimpleNamespace(), topk_indices=indices)
    assert_near(out.view(-1, HEADS, 512), attend(q, restored if fp8 else rows, indices)[0])


def test_prefill_with_a_prefix_in_fp8(sgl):
    """forward_extend dequantises the rows of the batch's sequences, and indices count among those."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    q, rows, _ = attention_inputs()
    packed, restored = pack(rows)
    held = torch.randperm(len(rows))[:200]
    indices = torch.randint(200, (len(q), TOPK)).int()
    self = backend(sgl, dsa_prefill_impl="flashmla_sparse", dsa_kv_cache_store_fp8=True)
    self.token_to_kv_pool = SimpleNamespace(get_key_buffer=lambda layer_id: packed.view(E4M3)[:, None])
    self.forward_metadata = SimpleNamespace(
        page_table_1_flattened=held.int(), dsa_cache_seqlens_int32=torch.full((len(q),), TOPK).int()
    )
    batch = SimpleNamespace(forward_mode=ForwardMode.EXTEND, extend_prefix_lens_cpu=[100])
    out = self.forward_extend(q, None, None, layer(), batch, topk_indices=indices)
    assert_near(out.view(-1, HEADS, 512), attend(q, restored[held], indices)[0])


def test_deterministic_inference_is_passed_on(sgl, monkeypatch):
    from sparse_attn.compat import flash_mla
    from sparse_attn.integrations.sglang import attention, indexer

    seen = []

    def watch(module, name, argument):
        function = getattr(module, name)

        def watching(*arguments, **options):
            seen.append((name, options[argument]))
            return function(*arguments, **options)

        monkeypatch.setattr(module, name, watching)

    watch(flash_mla, "flash_mla_with_kvcache", "enable_batch_invariant")
    watch(attention, "sparse_mla", "batch_invariant")
    watch(indexer, "lightning_topk", "batch_invariant")
    for deterministic in (True, False):
        seen.clear()
        serve(monkeypatch, deterministic)
        test_decode_of_fp8_latents(sgl, True)
        test_decode_of_the_whole_backend(sgl, "fa3")
        test_decode_selects_exactly(sgl, False)
        names = "flash_mla_with_kvcache", "sparse_mla", "lightning_topk"
        assert seen == [(name, deterministic) for name in names]


def test_plans_that_the_decode_fills_itself_are_sglangs(sgl):
    """Without lengths SGLang's function makes an object through FlashMLA's wheel, as before."""
    with pytest.raises(AssertionError, match=r"flash_mla\.get_mla_metadata was called"):
        sgl.interface.get_mla_metadata()


def test_fa3_refuses_what_it_does_not_do(sgl):
    q, rows, indices = attention_inputs()
    inputs = q[..., 512:], rows[:, None], 512, q[..., :512], indices, None, None, None, 1, SCALE
    for name, arguments in (("logit_cap", (30.0, 1)), ("page_size", (0.0, 64))):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            backend(sgl)._forward_fa3(*inputs, *arguments)


# The latent cache


def test_latents_are_stored_in_sglangs_bytes(sgl):
    _, rows, _ = attention_inputs()
    packed, _ = pack(rows)
    for shape in ((-1, 512), (-1, 1, 512)):
        rope_shape = (*shape[:-1], 64)
        nope, rope = rows[:, :512].reshape(shape), rows[:, 512:].reshape(rope_shape)
        values, rotated = sgl.pool.quantize_k_cache_separate(nope, rope)
        assert values.shape == (len(rows), 1, 528) and values.is_contiguous() and rotated.is_contiguous()
        assert torch.equal(torch.cat([values, rotated], -1)[:, 0], packed)
    zeros, _ = sgl.pool.quantize_k_cache_separate(torch.zeros(3, 512).bfloat16(), rows[:3, 512:])
    assert zeros[..., :512].eq(0).all()


def test_rows_of_the_latent_cache(sgl):
    _, rows, _ = attention_inputs()
    packed, restored = pack(rows)
    at = torch.tensor([3, 3, 900], dtype=torch.int32)
    for cache in (packed.view(E4M3)[:, None], packed.view(E4M3).view(PAGES, PAGE, 1, 656)):
        out = sgl.backend.dequantize_k_cache_paged_dsa(cache, at)
        assert out.shape == (3, 1, 576) and torch.equal(out[:, 0], restored[at.long()].bfloat16())


# The indexer


class Batch:
    """Sequences over a paged cache of index keys, as SGLang's metadata describes them.

    ``lengths`` are those of the sequences, of which the last ``new`` tokens ask. Everything below that has a
    name of SGLang's is its own class.
    """

    def __init__(
        self, sgl, lengths, new, *, ragged=False, unfused=False, expanded=False, padding=0, **indexer
    ):
        torch.manual_seed(1)
        self.sgl, self.lengths, self.new = sgl, lengths, new
        keys = torch.randn(PAGES * PAGE, 128)
        scale = keys.abs().amax(-1, keepdim=True) / 448
        values = (keys / scale).to(E4M3)
        self.keys = (values.float() * scale).double()
        page_values, page_scales = (
            values.view(torch.uint8).view(PAGES, -1),
            scale.view(torch.uint8).view(PAGES, -1),
        )
        self.cache = torch.cat([page_values, page_scales], 1)
        widest = -(-max(lengths) // PAGE)
        self.table = torch.randperm(PAGES)[: len(lengths) * widest].view(len(lengths), widest).int()
        self.owner = torch.tensor([i for i, n in enumerate(new) for _ in range(n)])
        self.seen = torch.tensor(
            [s - n + j + 1 for s, n in zip(lengths, new, strict=True) for j in range(n)]
        ).int()
        tokens = len(self.seen) + padding
        self.q = torch.randn(tokens, INDEX_HEADS, 128).to(E4M3)
        self.weights = torch.randn(tokens, INDEX_HEADS, 1)
        self.pool = SimpleNamespace(
            index_page_size=PAGE, get_index_k_with_scale_buffer=lambda layer_id: self.cache
        )
        self.indexer = object.__new__(sgl.indexer.Indexer)
        torch.nn.Module.__init__(self.indexer)
        for name, value in (
            {"index_topk": TOPK, "num_init_tokens": 0, "num_local_tokens": 0} | indexer
        ).items():
            setattr(self.indexer, name, value)

        starts, bases = torch.tensor([0, *new]).cumsum(0).int(), torch.tensor([0, *lengths]).cumsum(0).int()
        fields = dict.fromkeys(sgl.backend.DSAMetadata.__dataclass_fields__)
        fields |= {
            "page_size": PAGE,
            "cache_seqlens_int32": torch.tensor(lengths).int(),
            "cu_seqlens_q": starts,
            "cu_seqlens_k": bases,
            "real_page_table": self.table[self.owner] if expanded else self.table,
            "dsa_extend_seq_lens_list": list(new),
            "dsa_seqlens_expanded": self.seen,
            "topk_indices_offset": bases[self.owner] if ragged else None,
            "token_to_batch_idx": self.owner.int(),
            "pooled_index_kpool": 1,
        }
        method = sgl.topk.TopkTransformMethod["RAGGED" if ragged else "PAGED"]
        self.metadata = sgl.metadata.DSAIndexerMetadata(
            sgl.backend.DSAMetadata(**fields), method, force_unfused_topk=unfused
        )
        self.bases, self.ragged, self.unfused = bases, ragged, unfused

    def slots(self, sequence, positions):
        return self.table[sequence, positions // PAGE] * PAGE + positions % PAGE

    def expected(self, logits_of=None):
        """One query after another, in fp64: ``[queries, index_topk]``."""
        out = torch.full((len(self.seen), TOPK), -1, dtype=torch.int32)
        for t, sequence in enumerate(self.owner.tolist()):
            positions = torch.arange(int(self.seen[t]))
            keys = self.keys[self.slots(sequence, positions).long()]
            scores = (self.weights[t].double() * (self.q[t].double() @ keys.T).relu()).sum(0)
            scores = scores if logits_of is None else logits_of(scores)
            best = scores.topk(min(TOPK, len(scores))).indices.sort().values
            placed = best if self.unfused else self.slots(sequence, best)
            out[t, : len(best)] = best + self.bases[sequence] if self.ragged and not self.unfused else placed
        return out

    def paged(self, mode="DECODE"):
        from sglang.srt.model_executor.forward_batch_info import ForwardMode

        batch = SimpleNamespace(forward_mode=ForwardMode[mode])
        with self.context():
            return self.indexer._get_topk_paged(batch, 0, self.q, self.weights, self.metadata)

    def ragged_topk(self, result=None):
        with self.context():
            return self.indexer._get_topk_ragged(False, None, 0, self.q, self.weights, self.metadata, result)

    def context(self):
        from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

        return forward_context(ForwardContext(SimpleNamespace(token_to_kv_pool=self.pool)))


@pytest.mark.parametrize("unfused", [False, True])
def test_decode_selects_exactly(sgl, unfused):
    batch = Batch(sgl, [500, 3, 130], [1, 1, 1], unfused=unfused)
    assert torch.equal(batch.paged(), batch.expected())


def test_padded_tokens_select_nothing(sgl):
    batch = Batch(sgl, [500, 3], [1, 1], padding=3)
    out = batch.paged()
    assert torch.equal(out[:2], batch.expected()) and out.shape == (5, TOPK) and out[2:].eq(-1).all()


@pytest.mark.parametrize("mode", ["TARGET_VERIFY", "DRAFT_EXTEND_V2"])
def test_drafts_select_exactly(sgl, mode):
    """The page table has a row for each draft."""
    batch = Batch(sgl, [500, 130], [3, 3], expanded=True)
    assert torch.equal(batch.paged(mode), batch.expected())


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("unfused", [False, True])
def test_prefill_selects_exactly(sgl, ragged, unfused):
    batch = Batch(sgl, [500, 7, 130], [4, 7, 100], ragged=ragged, unfused=unfused, padding=2)
    out = batch.ragged_topk()
    assert torch.equal(out[:111], batch.expected()) and out[111:].eq(-1).all()


def test_prefill_fills_the_buffer_of_a_graph(sgl):
    batch = Batch(sgl, [500, 7], [4, 7])
    buffer = torch.full((20, TOPK), -1, dtype=torch.int32)
    assert batch.ragged_topk(buffer) is buffer
    assert torch.equal(buffer[:11], batch.expected()) and buffer[11:].eq(-1).all()


def test_equal_scores_go_to_the_lower_position(sgl):
    """SGLang's fast top-k may drop any of them."""
    batch = Batch(sgl, [2000], [1])
    batch.q = torch.zeros_like(batch.q.float()).to(E4M3)
    assert torch.equal(batch.paged(), batch.slots(0, torch.arange(TOPK))[None])


def test_first_and_last_tokens_that_a_model_always_selects(sgl):
    """SGLang puts infinities into logits, which come from the facade of DeepGEMM; then the top-k is exact."""
    batch = Batch(sgl, [500, 130], [1, 1], num_init_tokens=4, num_local_tokens=8)
    batch.indexer.sm_count = sgl.indexer.resolve_num_sms()
    batch.indexer.paged_mqa_logits_backend = sgl.indexer.DSAPagedMQALogitsBackend.DEEPGEMM
    lengths = torch.tensor(batch.lengths).int()[:, None]
    plan = sgl.indexer.resolve_paged_mqa_logits_metadata_fn()(lengths, PAGE, batch.indexer.sm_count)
    object.__setattr__(batch.metadata, "paged_mqa_schedule_metadata", plan)

    def forced(scores):
        scores = scores.clone()
        scores[:4] = scores[-8:] = float("inf")
        return scores

    expected = batch.expected(forced)
    assert torch.equal(batch.paged(), expected) and not torch.equal(expected, batch.expected())


def test_logits_of_prefill_come_from_the_facade(sgl):
    batch = Batch(sgl, [300], [3])
    keys = batch.keys[batch.slots(0, torch.arange(300)).long()].float()
    scale = keys.abs().amax(-1) / 448
    ks, ke = torch.zeros(3).int(), batch.seen
    values = (keys / scale[:, None]).to(E4M3)
    logits = sgl.indexer.resolve_fp8_mqa_logits_fn()(batch.q, (values, scale), batch.weights[..., 0], ks, ke)
    expected = (
        batch.weights.double() * (batch.q.double() @ (values.double() * scale[:, None]).T).relu()
    ).sum(1)
    assert torch.allclose(logits[2].double(), expected[2], rtol=1e-4, atol=1e-3)
    assert logits[0, 298:].isneginf().all()


@pytest.mark.parametrize("ragged", [False, True])
def test_short_sequences_select_all_they_have(sgl, ragged):
    """SGLang then makes logits of zeros and asks for the top-k of those."""
    batch = Batch(sgl, [50, 7], [4, 7], ragged=ragged)
    out = batch.metadata.topk_transform(torch.zeros(11, TOPK), TOPK)
    assert torch.equal(out, batch.expected())


def test_top_k_of_a_part_of_the_rows(sgl):
    """As SGLang divides logits that are too large: rows begin at their sequence, and each has its pages."""
    batch = Batch(sgl, [90, 70], [4, 7])
    starts = batch.bases[batch.owner]
    logits = torch.full((11, 160), 9e9)
    for t, sequence in enumerate(batch.owner.tolist()):
        keys = batch.keys[batch.slots(sequence, torch.arange(int(batch.seen[t]))).long()]
        scores = (batch.weights[t].double() * (batch.q[t].double() @ keys.T).relu()).sum(0)
        logits[t, starts[t] : starts[t] + batch.seen[t]] = scores.float()
    part = slice(2, 9)
    options = {"ks": starts[part], "cu_seqlens_q": torch.ones(7).int(), "ke_offset": batch.seen[part]}
    owner = batch.metadata.get_token_to_batch_idx()[part]
    out = batch.metadata.topk_transform(logits[part], TOPK, batch_idx_list=owner, **options)
    assert torch.equal(out, batch.expected()[part])


def test_pooled_keys_are_left_to_sglang(sgl):
    batch = Batch(sgl, [50], [4])
    object.__setattr__(batch.metadata.attn_metadata, "pooled_index_kpool", 4)
    with pytest.raises(AssertionError) as error:  # SGLang wants the page table that it reads
        batch.metadata.topk_transform(torch.zeros(4, TOPK), TOPK)
    assert error.traceback[-1].path.name == "dsa_topk_backend.py"


def test_no_plan_for_sglangs_own_top_k(sgl):
    assert backend(sgl)._build_topk_v2_plan(torch.ones(3).int()) is None


@pytest.mark.parametrize("phase", ["EXTEND", "DECODE"])
@pytest.mark.parametrize(
    ("fp8", "prefill", "decode"),
    [
        (False, "flashmla_sparse", "fa3"),
        (True, "flashmla_kv", "flashmla_kv"),
        (True, "flashmla_sparse", "flashmla_kv"),
    ],
    ids=["bf16", "fp8", "fp8, dequantised"],
)
def test_a_step_with_sglangs_own_metadata(sgl, monkeypatch, fp8, prefill, decode, phase):
    """From the lengths of a batch to attention. The first two are what SGLang chooses for an old GPU."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    monkeypatch.setattr(sgl.utils, "get_parallel", lambda: SimpleNamespace(attn_cp_size=1))
    lengths, new = [500, 7, 130], ([4, 7, 100] if phase == "EXTEND" else [1, 1, 1])
    batch = Batch(sgl, lengths, new)
    no = lambda: False  # noqa: E731
    rows = torch.randn(PAGES * PAGE, 576).bfloat16()
    packed, restored = pack(rows)
    latents = packed.view(E4M3)[:, None] if fp8 else rows[:, None]
    batch.pool.get_key_buffer = lambda layer_id: latents
    batch.pool.size, batch.pool.page_size = PAGES * PAGE - PAGE, PAGE
    slots = [batch.slots(i, torch.arange(n)).int() for i, n in enumerate(lengths)]
    self = backend(
        sgl,
        dsa_prefill_impl=prefill,
        dsa_decode_impl=decode,
        dsa_kv_cache_store_fp8=fp8,
        token_to_kv_pool=batch.pool,
        req_to_token_pool=SimpleNamespace(
            req_to_token=torch.nn.utils.rnn.pad_sequence(slots, batch_first=True)
        ),
        enable_auto_select_prefill_impl=False,
        speculative_num_draft_tokens=None,
        supports_mha_one_shot=True,
        device="cpu",
        _kv_shard_pool=None,
        _arange_buf=torch.arange(64, dtype=torch.int32),
        _get_device_sm=lambda: 80,
        _is_in_breakable_cuda_graph=no,
        _is_in_tc_piecewise_cuda_graph=no,
        _is_blackwell=no,
    )
    forward = SimpleNamespace(
        batch_size=3,
        forward_mode=ForwardMode[phase],
        seq_lens=torch.tensor(lengths),
        seq_lens_cpu=torch.tensor(lengths),
        seq_lens_sum=sum(lengths),
        req_pool_indices=torch.arange(3),
        extend_seq_lens=torch.tensor(new),
        extend_seq_lens_cpu=new,
        extend_prefix_lens_cpu=[n - m for n, m in zip(lengths, new, strict=True)],
        global_num_tokens_cpu=None,
        get_max_chunk_capacity=lambda: 10**6,
    )
    self.init_forward_metadata(forward)
    batch.metadata = self.get_indexer_metadata(0, forward)
    selected = batch.ragged_topk() if phase == "EXTEND" else batch.paged()
    q = torch.randn(sum(new), HEADS, 576).bfloat16()
    step = self.forward_extend if phase == "EXTEND" else self.forward_decode
    out = step(q, None, None, layer(), forward, topk_indices=selected)
    assert_near(out.view(-1, HEADS, 512), attend(q, restored if fp8 else rows, batch.expected())[0])


# Keys and queries of the indexer


def quantised(x, power_of_two=False):
    """e4m3 of the last dimension and a scale, as SGLang's kernels have them."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-4) / 448
    scale = scale.log2().ceil().exp2() if power_of_two else scale
    return (x / scale).to(E4M3), scale


def stored(batch, slots):
    """Values and scales of some slots of the cache."""
    page, offset = slots // PAGE, slots % PAGE
    values = batch.cache[:, : PAGE * 128].view(PAGES, PAGE, 128)[page, offset].view(E4M3)
    return values, batch.cache[:, PAGE * 128 :].view(PAGES, PAGE, 4)[page, offset].view(torch.float32)


@pytest.mark.parametrize("given", [False, True])
def test_keys_are_stored_in_sglangs_bytes(sgl, given):
    batch = Batch(sgl, [500], [1])
    before, key, slots = (
        batch.cache.clone(),
        torch.randn(5, 128).bfloat16(),
        torch.tensor([0, 63, 64, 700, 3000]),
    )
    key[4] = 0
    forward = SimpleNamespace(out_cache_loc=None if given else slots)
    with batch.context():
        batch.indexer._store_index_k_cache(
            forward, 0, key, act_quant=None, out_cache_loc=slots if given else None
        )
    (values, scales), (expected, expected_scales) = stored(batch, slots), quantised(key.float())
    assert torch.equal(values.float(), expected.float()) and torch.allclose(
        scales, expected_scales, rtol=1e-6
    )
    others = torch.ones(PAGES * PAGE, dtype=torch.bool)
    others[slots] = False
    now, batch.cache = stored(batch, others.nonzero()[:, 0]), before
    assert all(map(torch.equal, map(bits, now), map(bits, stored(batch, others.nonzero()[:, 0]))))


def bits(x):
    return x.view(torch.uint8)


def test_layers_of_other_ranks_store_nothing(sgl):
    batch = Batch(sgl, [500], [1])
    invalidated = []
    batch.pool.invalidate_index_buffer_for_layer = invalidated.append
    batch.pool._is_layer_owned = lambda layer_id: False
    before = batch.cache.clone()
    forward = SimpleNamespace(out_cache_loc=torch.tensor([5]))
    with batch.context():
        batch.indexer._store_index_k_cache(forward, 3, torch.randn(1, 128))
    assert torch.equal(batch.cache, before) and invalidated == [3]


def rotated(x, cos_sin, positions):
    """RoPE of the first 64 values in neighbouring pairs."""
    cos, sin = cos_sin[positions].chunk(2, -1)
    cos, sin = (part.view(len(x), *[1] * (x.dim() - 2), 32) for part in (cos, sin))
    even, odd = x[..., :64:2], x[..., 1:64:2]
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
    return torch.cat([turned, x[..., 64:]], -1)


def test_a_decode_step_of_the_fused_indexer(sgl):
    """GLM-5's way: SGLang projects; norm, RoPE, storage and quantisation are ours, and then the selection."""
    batch = Batch(sgl, [500, 130], [1, 1])
    hidden, latent = torch.randn(2, 32), torch.randn(2, 24)
    project, expand = torch.randn(32, 128 + INDEX_HEADS), torch.randn(24, INDEX_HEADS * 128)
    norm = SimpleNamespace(weight=torch.rand(128) + 0.5, bias=torch.randn(128), variance_epsilon=1e-6)
    cos_sin, positions = torch.randn(600, 64), torch.tensor([499, 129])
    attributes = {
        "softmax_scale": 128**-0.5,
        "n_heads": INDEX_HEADS,
        "head_dim": 128,
        "alt_stream": None,
        "wk_weights_proj": lambda x: (x @ project, None),
        "wq_b": lambda x: (x @ expand, None),
        "k_norm": norm,
        "rotary_emb": SimpleNamespace(cos_sin_cache=cos_sin),
    }
    for name, value in attributes.items():
        setattr(batch.indexer, name, value)
    slots = torch.stack(
        [batch.slots(i, torch.tensor(int(n) - 1)) for i, n in enumerate(batch.lengths)]
    ).long()
    forward = SimpleNamespace(out_cache_loc=slots)
    with batch.context():
        q, weights = batch.indexer._fused_q_prepare_and_store(hidden, latent, positions, forward, 0, None)

    key, gates = (hidden @ project).split([128, INDEX_HEADS], -1)
    key = torch.nn.functional.layer_norm(key, (128,), norm.weight, norm.bias, 1e-6)
    values, scales = quantised(rotated(key, cos_sin, positions))
    kept, kept_scales = stored(batch, slots)
    assert torch.allclose(kept_scales, scales, rtol=1e-5)
    assert (kept.float() != values.float()).float().mean() < 0.02  # where fp32 rounds another way
    expected_q, q_scale = quantised(rotated((latent @ expand).view(2, INDEX_HEADS, 128), cos_sin, positions))
    assert (q.float() != expected_q.float()).float().mean() < 0.02
    factor = 128**-0.5 * INDEX_HEADS**-0.5
    assert torch.allclose(weights, gates[..., None] * factor * q_scale, rtol=1e-4, atol=1e-6)

    batch.q, batch.weights = q, weights
    batch.keys[slots] = (kept.float() * kept_scales).double()
    assert torch.equal(batch.paged(), batch.expected())


@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
def test_queries_are_quantised_as_by_sglang(sgl, scale_fmt):
    x = torch.randn(5, INDEX_HEADS, 128).bfloat16()
    x[3, 2] = 0
    q, scale = sgl.act_quant.act_quant(x, 128, scale_fmt)
    expected, expected_scale = quantised(x.float(), scale_fmt is not None)
    assert q.dtype == E4M3 and scale.shape == (5, INDEX_HEADS, 1)
    assert torch.allclose(scale, expected_scale, rtol=1e-6) and torch.equal(q.float(), expected.float())


def test_other_blocks_are_quantised_by_sglang(sgl):
    with pytest.raises(Exception, match=r"cuda|driver|CPU|Pointer|device"):  # its kernel is Triton's
        sgl.act_quant.act_quant(torch.randn(4, 256), 128)
