"""How vLLM finds the plug-in, on which devices, and what it answers to what it does not serve."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

pytest.importorskip("vllm", reason="make test-engines runs these in an environment with vLLM")

import torch
from checkpoints import make
from engine import run
from vllm import platforms
from vllm.config import CompilationConfig
from vllm.model_executor.custom_op import op_registry_oot
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig

from sparse_attn.integrations import vllm as plugin
from sparse_attn.integrations.vllm import backend, cuda, layers
from sparse_attn.integrations.vllm.cpu import SparseCpuPlatform, correct_attn_out, slot_mapping


@pytest.fixture(autouse=True)
def _fresh():
    plugin.refusal.cache_clear()
    yield
    plugin.refusal.cache_clear()


def selector(**changes):
    given = {"head_size": 576, "dtype": torch.bfloat16, "kv_cache_dtype": "auto", "block_size": 64}
    given |= {"use_mla": True, "use_sparse": True, "has_sink": False, "use_mm_prefix": False}
    given |= {"use_per_head_quant_scales": False, "attn_type": "decoder"}
    return AttentionSelectorConfig(**given | changes)


def test_vllm_takes_our_platform_and_knows_the_backend():
    assert type(platforms.current_platform) is SparseCpuPlatform
    plugin.register()
    plugin.register()
    assert AttentionBackendEnum[plugin.BACKEND].get_class() is backend.SparseAttnBackend


def test_finding_the_plugin_imports_no_layer():
    """vLLM decides later, from its arguments, in which form its layers are imported."""
    code = """
import sys
from vllm import ModelRegistry
from vllm.plugins import load_general_plugins
load_general_plugins()
assert {"sparse_attn.integrations.vllm.cpu"} <= {*sys.modules}
ours = "backend", "layers", "models"
late = {f"sparse_attn.integrations.vllm.{name}" for name in ours}
print(late & {*sys.modules}, "vllm.model_executor.layers.attention.mla_attention" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "set() False"


def test_importing_the_models_makes_the_layers_ours():
    importlib.import_module(f"{plugin.__name__}.models")
    assert op_registry_oot["SparseAttnIndexer"] is layers.SparseIndexerOp
    assert CompilationConfig._attention_ops.count(f"vllm::{layers.OP}") == 1


@pytest.mark.parametrize("release", ["0.31.2", "0.40.0", None])
def test_another_release_is_left_alone_and_a_warning_names_those_that_were_tested(release, caplog):
    with mock.patch.object(plugin, "installed_vllm", return_value=release):
        assert plugin.platform() is None
        with mock.patch("vllm.ModelRegistry.register_model") as register:
            plugin.register()
    assert not register.called
    (said,) = (record.getMessage() for record in caplog.records)
    assert "0.32.x" in said and str(release) in said and plugin.BACKEND in said


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_gpus_before_sm_90_get_our_platform_and_the_generic_models(capability):
    old = capability < 90
    builtin = {"cpu": lambda: None, "cuda": lambda: "vllm.platforms.cuda.CudaPlatform"}
    has = mock.patch("vllm.platforms.cuda.CudaPlatform.has_device_capability", return_value=not old)
    with mock.patch.object(platforms, "builtin_platform_plugins", builtin), has:
        expected = f"{plugin.__name__}.cuda.SparseCudaPlatform" if old else None
        assert plugin.platform() == expected
    gpu = cuda.SparseCudaPlatform if old else cuda.CudaPlatform
    models = mock.patch("vllm.ModelRegistry.register_model")
    with mock.patch.object(platforms, "_current_platform", gpu), models as register:
        plugin.register()
    registered = {call.args[0]: call.args[1] for call in register.call_args_list}
    assert registered == (plugin.MODELS if old else {})


def test_a_gpu_before_sm_90_attends_through_sparse_attn():
    """vLLM's own choice for the same GPU is an error."""
    ampere = mock.patch.object(
        cuda.CudaPlatform, "get_device_capability", return_value=DeviceCapability(8, 0)
    )
    with ampere:
        chosen = cuda.SparseCudaPlatform.get_attn_backend_cls(None, selector())
        with pytest.raises(ValueError, match="No valid attention backend"):
            cuda.CudaPlatform.get_attn_backend_cls(None, selector())
    assert chosen == plugin.CLASS


def test_settings_of_a_gpu_before_sm_90():
    cache = SimpleNamespace(cache_dtype="fp8")
    model = SimpleNamespace(hf_text_config=SimpleNamespace(model_type="deepseek_v32"))
    with mock.patch.object(cuda.CudaPlatform, "check_and_update_config"):
        cuda.SparseCudaPlatform.check_and_update_config(
            SimpleNamespace(cache_config=cache, model_config=model)
        )
    assert cache.cache_dtype == "fp8_ds_mla"


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"kv_cache_dtype": "fp8_e5m2"}, "kv_cache_dtype not supported"),
        ({"head_size": 320}, "head_size not supported"),
        ({"has_sink": True}, "attention sinks not supported"),
        ({"use_pcp": True}, "PCP not supported"),
    ],
)
def test_what_the_backend_does_not_do_is_refused_by_name(changes, reason):
    with pytest.raises(ValueError, match=f"{plugin.BACKEND}: .*{reason}"):
        SparseCpuPlatform.get_attn_backend_cls(None, selector(**changes))


def test_other_models_with_sparse_attention_are_left_to_vllm():
    config = SimpleNamespace(
        model_config=SimpleNamespace(hf_text_config=SimpleNamespace(model_type="dots3_note"))
    )
    with (
        mock.patch("vllm.config.get_current_vllm_config_or_none", return_value=config),
        pytest.raises(NotImplementedError, match="Sparse Attention is not supported on CPU"),
    ):
        SparseCpuPlatform.get_attn_backend_cls(None, selector())


def test_another_backend_for_a_sparse_model_is_refused():
    with pytest.raises(ValueError, match=r"attention_backend: expected SPARSE_ATTN or none .* got CPU_MLA"):
        SparseCpuPlatform.get_attn_backend_cls(AttentionBackendEnum.CPU_MLA, selector())
    dense = selector(use_sparse=False)
    path = SparseCpuPlatform.get_attn_backend_cls(AttentionBackendEnum.CPU_MLA, dense)
    assert path.endswith("CPUMLABackend")


def test_our_backend_under_a_model_of_vllm_names_the_flag():
    sizes = {"num_heads": 8, "head_size": 576, "scale": 1.0, "num_kv_heads": 1, "kv_lora_rank": 512}
    sizes |= dict.fromkeys(("alibi_slopes", "sliding_window", "logits_soft_cap"))
    sizes |= {"kv_cache_dtype": "auto", "attn_type": "decoder", "kv_sharing_target_layer_name": None}
    with pytest.raises(ValueError, match=r"--model-class-overrides .*DeepseekV32ForCausalLM"):
        backend.SparseAttnImpl(**sizes, indexer=object())
    with pytest.raises(ValueError, match="logits_soft_cap: expected None with SPARSE_ATTN, got 30"):
        backend.SparseAttnImpl(**sizes | {"logits_soft_cap": 30.0})


def test_the_backend_by_its_name(tmp_path):
    found = run(make("v32", tmp_path), [[1, 2, 3]], attention_config={"backend": "SPARSE_ATTN"})
    assert found.answers[0].tokens


def test_visible_keys_of_padded_batches():
    """Two requests of 3 and 1 new tokens, one that is padding, and two padded tokens."""
    config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_batched_tokens=16))
    builder = backend.IndexerMetadataBuilder(None, [], config, torch.device("cpu"))
    starts = torch.tensor([0, 3, 4, 4], dtype=torch.int32)
    batch = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor([10, 5, 0], dtype=torch.int32),
        num_reqs=3,
        num_actual_tokens=6,
        max_query_len=3,
        max_seq_len=10,
        block_table_tensor=torch.zeros(3, 2, dtype=torch.int32),
        slot_mapping=torch.zeros(6, dtype=torch.int64),
    )
    built = builder.build(0, batch)
    assert built.visible.tolist() == [8, 9, 10, 5, 0, 0]
    again = builder.build(0, batch.replace(seq_lens=torch.tensor([20, 6, 0], dtype=torch.int32)))
    assert again.visible.data_ptr() == built.visible.data_ptr()  # a captured graph reads it there
    assert built.visible.tolist() == [18, 19, 20, 6, 0, 0]


@pytest.mark.parametrize("world, interleave", [(2, 1), (2, 4), (4, 16)])
def test_slots_of_shared_keys(world, interleave):
    """Each position is stored by one rank, in the page and at the offset of its turn."""
    page, lengths = 16, (7, 50)
    starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int()
    positions = torch.cat([torch.arange(n) for n in lengths])
    table = torch.arange(1, 13, dtype=torch.int32).view(2, 6)
    found = []
    for rank in range(world):
        slots = torch.full((64,), 99)
        stride = table.stride(0)
        slot_mapping(57, 64, starts, positions, table, stride, slots, page, world, rank, interleave)
        assert (slots[57:] == -1).all()
        found.append(slots[:57])
    for t, position in enumerate(positions.tolist()):
        rank = position // interleave % world
        local = position // (interleave * world) * interleave + position % interleave
        row = table[int(t >= lengths[0])]
        expected = [-1] * world
        expected[rank] = int(row[local // page]) * page + local % page
        assert [slots[t].item() for slots in found] == expected


def test_parts_of_ranks_add_up():
    torch.manual_seed(0)
    outs, lses = torch.randn(3, 5, 4, 8), torch.randn(3, 5, 4)
    lses[1, 2], lses[:, 4] = -torch.inf, -torch.inf  # a rank without a selected key; a padded query
    outs[:, 4] = 0
    parts = [correct_attn_out(outs[rank].clone(), lses, rank, None) for rank in range(3)]
    weights = lses.double().softmax(0).nan_to_num()
    expected = (outs.double() * weights[..., None]).sum(0)
    torch.testing.assert_close(sum(out for out, _ in parts).double(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(parts[0][1], lses.logsumexp(0))
    with pytest.raises(ValueError, match="is_lse_base_on_e"):
        correct_attn_out(outs[0], lses, 0, None, is_lse_base_on_e=False)


def test_the_doctor_says_that_vllm_finds_the_plugin():
    command = [Path(sys.executable).with_name("sparse-attn"), "doctor", "--json"]
    for allowed, finds in ((None, "finds"), ("sparse_attn", "finds"), ("other", "does not load")):
        environment = {**os.environ, **({} if allowed is None else {"VLLM_PLUGINS": allowed})}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert f"{plugin.installed_vllm()}, which {finds} the plug-in" in json.loads(done.stdout)["vllm"]
