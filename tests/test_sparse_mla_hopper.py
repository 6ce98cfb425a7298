"""The warp-specialised kernel for sm_90: executed in an emulator, broken on purpose, compiled, refused.

No GPU is needed, and none has run it yet.
"""

import ast
import functools
import importlib.util
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sparse_attn import formats, reference
from sparse_attn.ops.attention import SparseMLAOp
from sparse_attn.testing import INT_MAX, INT_MIN, assert_close, mla_inputs

HERE = Path(__file__).parent
SOURCE = (HERE.parent / "kernels" / "sparse_mla_hopper.py").read_text()
BF16, NAN = torch.bfloat16, float("nan")

spec = importlib.util.spec_from_file_location("gluon_emulator", HERE / "gluon_emulator.py")
emulator = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = emulator
spec.loader.exec_module(emulator)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# What it computes.


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def pack(kv, page_size=None, gap=0):
    """Pages of 656 bytes per token. What no value needs, rows of NaN too, is 0xFF, NaN everywhere."""
    page_size = page_size or math.gcd(len(kv), 64)
    kv = kv.unflatten(0, (-1, page_size))
    used = ~kv.isnan().any(-1)
    packed = formats.pack_v32_kv(kv.nan_to_num(), power_of_two=False, min_scale=1e-30)
    buffer = torch.full((len(kv), page_size * 656 + gap), 0xFF, dtype=torch.uint8)
    cache = buffer[:, : page_size * 656].unflatten(1, (page_size, 656))
    cache[used] = packed[used]
    return cache


def packed(inputs):
    return {n: pack(t, gap=16) if n in ("kv", "extra_kv") else t for n, t in inputs.items()}


def values(kv):
    """What the kernel computes with: an fp32 product, rounded to bf16."""
    return formats.unpack(kv, BF16).flatten(0, 1) if kv.dtype == torch.uint8 else kv


def expected(inputs, scale=0.05):
    inputs = {n: values(t) if n in ("kv", "extra_kv") else t for n, t in inputs.items()}
    wide = {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}
    return reference.sparse_mla(**wide, d_v=512, softmax_scale=scale)


def merge_parts(outs, lses, out, lse, attn_sink, maxima, max_logits):
    """As the function of that name in kernels/merge_attention.py, which tests/interpreted tests."""
    assert outs.is_contiguous() and lses.is_contiguous() and maxima.is_contiguous()
    merged, merged_lse = reference.merge_attention(outs, lses)
    if attn_sink is not None:
        share = torch.sigmoid(merged_lse - attn_sink)
        merged = torch.where((merged_lse == float("-inf"))[..., None], 0.0, share[..., None] * merged)
    out.copy_(merged)
    lse.copy_(merged_lse)
    max_logits.copy_(maxima.amax(0))


@functools.lru_cache(maxsize=4)  # to compile it takes as long as to run it
def load(source=SOURCE, splits=1, merge=merge_parts):
    """The kernel's module in the emulator; its launcher takes that number of splits."""
    return emulator.load_module(
        source,
        configs=SimpleNamespace(attention_launches=lambda *_: [splits], multiprocessors=lambda device: 132),
        in_launches=lambda a, launches: ((a, splits) for splits in launches),
        cdiv=lambda a, b: -(-a // b),
        merge_parts=merge,
    )


def launch(inputs, seed=0, scale=0.05, module=None, results=None):
    """Launch in the emulator, into outputs of NaN, and compare with the fp64 reference."""
    module = module or load()
    rows = inputs["q"].shape[:2]
    out, lse, max_logits = torch.full((*rows, 512), NAN, dtype=BF16), *torch.full((2, *rows), NAN)
    outputs = {"out": out, "lse": lse, "max_logits": max_logits}
    with emulator.seed(seed):
        module["sparse_mla_hopper"](SparseMLAOp(**inputs, d_v=512, softmax_scale=scale, **outputs))
    expected_out, *expected_logits = results or expected(inputs, scale)
    assert_close(out, expected_out, factor=2.5)  # probabilities are rounded to bf16 too
    for actual, right in zip((lse, max_logits), expected_logits, strict=True):
        torch.testing.assert_close(actual.double(), right, rtol=1e-3, atol=1e-3)


@pytest.fixture(params=["rows", "packed"])
def run(request):
    """Launch over a cache of bf16, or over one of bytes; results may be ``like`` those of other inputs."""
    prepared = packed if request.param == "packed" else lambda inputs: inputs

    def run(inputs, *args, like=None, **options):
        if like is not None:
            options["results"] = expected(prepared(like))
        launch(prepared(inputs), *args, **options)

    return run


def inputs_of(topk, s_q=2, h_q=64, s_kv=500, seed=0, **more):
    return {**mla_inputs(s_q, s_kv, h_q, topk, d_qk=576, dtype=BF16, seed=seed), **more}


def extra_segment(topk, s_q=2):
    extra = mla_inputs(s_q, 90, 64, topk, d_qk=576, dtype=BF16, seed=1)
    return {"extra_kv": extra["kv"], "extra_indices": extra["indices"]}


@pytest.mark.parametrize("seed", range(8))
def test_interleavings(run, seed):
    run(inputs_of(topk=420, seed=seed), seed)


@pytest.mark.parametrize("topk", [0, 1, 63, 64, 65, 128, 129, 257])
def test_partial_tiles(run, topk):
    run(inputs_of(topk), seed=topk)


@pytest.mark.parametrize("h_q", [128, 100, 20])
def test_blocks_of_heads(run, h_q):
    run(inputs_of(200, h_q=h_q, attn_sink=torch.randn(h_q)))


def test_topk_length(run):
    lengths = int32(0, 1, 128, 150, INT_MAX, INT_MIN)
    run(inputs_of(200, s_q=6, topk_length=lengths, attn_sink=torch.randn(64)))


@pytest.mark.parametrize("extra_length", [None, int32(130, 0), int32(-5, 7)])
def test_second_segment(run, extra_length):
    inputs = inputs_of(70, topk_length=int32(0, 65), attn_sink=torch.randn(64), **extra_segment(140))
    if extra_length is not None:
        inputs["extra_topk_length"] = extra_length
    run(inputs)


def test_sinks_at_the_limits(run):
    sink = torch.randn(64)
    sink[:3] = torch.tensor([float("inf"), float("-inf"), 1e4])
    run(inputs_of(100, attn_sink=sink))


def test_a_tile_without_a_valid_index(run):
    inputs = inputs_of(400)
    inputs["indices"][0, :128] = -1
    inputs["indices"][0, 192:320] = 500
    run(inputs)


def test_scores_that_grow_and_shrink(run):
    """The maximum moves in every tile, in both directions."""
    inputs = inputs_of(512, s_kv=512)
    inputs["indices"][0] = torch.arange(512)
    inputs["kv"] = torch.randn(512, 576).mul(torch.linspace(0.1, 20, 512)[:, None]).to(BF16)
    run(inputs)
    inputs["indices"][0] = torch.arange(511, -1, -1)
    run(inputs)


def test_scores_of_minus_infinity_are_not_an_empty_row(run):
    inputs = inputs_of(100, s_q=1)
    inputs["q"] = torch.full((1, 64, 576), 1e25, dtype=BF16)
    inputs["kv"] = torch.full((500, 576), -1e25, dtype=BF16)
    inputs["indices"][:] = torch.arange(100)
    nothing = torch.full((1, 64), float("-inf")).double()
    run(inputs, results=(torch.full((1, 64, 512), NAN), nothing, nothing))


def strided(tensor, last):
    shape = [*(2 * n for n in tensor.shape[:-1]), tensor.shape[-1] * last]
    buffer = torch.full(shape, 7, dtype=tensor.dtype)
    return buffer[(slice(1, None, 2),) * (tensor.dim() - 1)][..., ::last].copy_(tensor)


def test_strides(run):
    inputs = inputs_of(150, s_q=3, topk_length=int32(150, 3, 129), attn_sink=torch.randn(64))
    run({n: strided(t, 1 if n in ("q", "kv") else 3) for n, t in inputs.items()})


def packed_inputs(*args, page_size=None, gap=0, **options):
    inputs = inputs_of(*args, **options)
    return {**inputs, "kv": pack(inputs["kv"], page_size, gap)}


@pytest.mark.parametrize("page_size, gap", [(1, 0), (1, 16), (25, 0), (20, 624)])
def test_pages(page_size, gap):
    launch(packed_inputs(200, page_size=page_size, gap=gap))


def test_packed_rows():
    """Not in pages."""
    inputs = packed_inputs(200, page_size=1)
    launch({**inputs, "kv": inputs["kv"][:, 0]}, results=expected(inputs))


def test_a_packed_segment_of_other_pages():
    inputs = {**packed_inputs(140, page_size=50), **extra_segment(200)}
    launch({**inputs, "extra_kv": pack(inputs["extra_kv"], page_size=1)})


def test_every_code_and_scales_of_every_size():
    """One key at a time, so that a value is the result: bit for bit what unpacking gives."""
    kv = torch.zeros(254, 1, 656, dtype=torch.uint8)
    code, scale, rope = formats.v32_kv_views(kv)
    codes = torch.tensor([n for n in range(256) if n % 128 != 127], dtype=torch.uint8)
    code.view(torch.uint8)[:, 0] = codes[(torch.arange(254)[:, None] + torch.arange(512)) % 254]
    scale[:, 0] = torch.exp2(torch.empty(254, 4).uniform_(-100, 100))
    rope[:] = 0
    indices = torch.randperm(254)[:4, None].int()
    q = torch.zeros(4, 64, 576, dtype=BF16)
    out, lse, max_logits = torch.full((4, 64, 512), NAN, dtype=BF16), *torch.full((2, 4, 64), NAN)
    load()["sparse_mla_hopper"](SparseMLAOp(q, kv, indices, 512, 0.05, out, lse, max_logits))
    assert torch.equal(out, values(kv)[indices[:, 0].long(), None, :512].expand(4, 64, 512))


APART = 2**31 + 4096  # bytes between pages


class FarMemory(emulator.Memory):
    """Only the pages exist, and lie close together."""

    def places(self, offset, mask):
        size = self.flat.element_size()
        page, byte = np.divmod(np.asarray(offset, np.int64) * size, APART)
        if (byte[np.broadcast_to(True if mask is None else mask, byte.shape)] >= 25 * 656).any():
            raise emulator.KernelError("an address lies between two pages")
        return super().places((page * 25 * 656 + byte) // size, mask)


class FarCache(emulator.Pointer):
    """What the launcher asks a tensor."""

    dtype, shape = torch.uint8, torch.Size([20, 25, 656])

    def stride(self, dim):
        return (APART, 656, 1)[dim]

    def dim(self):
        return 3


def test_a_cache_beyond_32_bits():
    """43 GB: rows, counted in 16 bytes, reach the highest of 32 bits."""
    inputs = inputs_of(300, s_kv=500)
    inputs["kv"] = pack(torch.randn(500, 576).to(BF16), 25)
    inputs["indices"][0] = torch.arange(499, 199, -1)
    near = emulator.pointer(inputs["kv"]).memory
    memory = FarMemory(near.flat, near.exists, near.stored)
    launch({**inputs, "kv": FarCache(memory)}, results=expected(inputs))


# Several programs for each query.


@pytest.fixture(params=[2, 3, 7])
def splits(request, monkeypatch):
    """Partial results begin as NaN."""
    monkeypatch.setattr(
        *(torch.Tensor, "new_empty"), lambda self, *shape, dtype=None: self.new_full(shape, NAN, dtype=dtype)
    )
    return request.param


def test_splits_of_two_segments(run, splits):
    """Of 3 + 2 pairs: their border lies within a share, or between two; the last row is empty."""
    seed = splits % 4
    inputs = inputs_of(331, s_q=5, seed=seed, attn_sink=torch.randn(64), **extra_segment(201, s_q=5))
    inputs["topk_length"] = int32(INT_MAX, 129, 0, 257, INT_MIN)
    inputs["extra_topk_length"] = int32(INT_MAX, 1, 200, -3, 0)
    run(inputs, seed, module=load(splits=splits))


def test_splits_of_one_segment(run, splits):
    sink = torch.randn(128)
    sink[:3] = torch.tensor([float("inf"), float("-inf"), 1e4])
    run(inputs_of(421, s_q=1, h_q=128, attn_sink=sink), module=load(splits=splits))
    run(inputs_of(1025, s_q=1, s_kv=1100), module=load(splits=splits))


def test_splits_of_no_indices(run, splits):
    run(inputs_of(0, attn_sink=torch.randn(64)), module=load(splits=splits))


def test_splits_without_a_valid_index(run, splits):
    """They say so, and count for nothing. Query 1 has none at all."""
    parts = []

    def merge(*args):
        parts.extend((args[0], args[1], args[5]))
        merge_parts(*args)

    inputs = inputs_of(splits * 128 - 63, s_kv=500)
    invalid = torch.tensor([-1, 500, INT_MAX, INT_MIN]).repeat(32)
    inputs["indices"][0, 128:256] = invalid[: splits * 128 - 63 - 128]
    inputs["indices"][1] = -7
    run(inputs, module=load(splits=splits, merge=merge))
    out, lse, max_logits = parts
    assert out.shape == (splits, 2, 64, 512) and out.dtype == torch.float32
    empty = torch.zeros(splits, 2, dtype=torch.bool)
    empty[1, 0] = empty[:, 1] = True
    assert (out[empty] == 0).all() and (lse[empty] == float("-inf")).all()
    assert (max_logits[empty] == float("-inf")).all()
    assert all(part[~empty].isfinite().all() for part in parts)


def test_splits_whose_scores_are_minus_infinity(run, splits):
    """As in sparse_mla, they count for nothing in the merge, which cannot tell them from empty ones."""
    inputs = inputs_of(splits * 128, s_q=1, s_kv=splits * 128)
    inputs["q"] = torch.full((1, 64, 576), 1e25, dtype=BF16)
    inputs["kv"] = torch.full((splits * 128, 576), -1e25, dtype=BF16)
    inputs["indices"][:] = torch.arange(splits * 128)
    nothing = torch.full((1, 64), float("-inf")).double()
    run(inputs, module=load(splits=splits), results=(torch.zeros(1, 64, 512), nothing, nothing))
    inputs["kv"][128:256] = torch.randn(128, 576).mul(1e-25).to(BF16)
    few = {**inputs, "indices": inputs["indices"][:, 128:256]}
    run(inputs, module=load(splits=splits), like=few)


def test_strides_in_splits(run, splits):
    inputs = inputs_of(299, s_q=2, topk_length=int32(299, 130), attn_sink=torch.randn(64))
    run({n: strided(t, 1 if n in ("q", "kv") else 3) for n, t in inputs.items()}, module=load(splits=splits))


# Broken on purpose: waits, arrivals, fences and commits removed or moved past a neighbouring access, phases
# flipped, tiles and barriers mistaken, counts off by one, masks dropped. Each must fail.

OPENING = ("mbarrier.wait", "async_copy.wait_group", "fence_async_shared", "warpgroup_mma_wait", "_acquire")
CLOSING = ("mbarrier.arrive", "async_copy.mbarrier_arrive", "async_copy.commit_group", "fence_async_shared")
ACCESS = re.compile(
    r"\b(load|store|async_load|warpgroup_mma|_scores|_exchange|_copy|_store|_acquire|_convert|_convert_part)\("
)
# What numbers and names of these functions' arguments say which part of which tile.
PARTS = ("_load_half", "_load_part", "_load_scale", "_acquire", "_convert", "_convert_part")
HARMLESS = {
    # Slower: the first copies of a pair then wait for the last releases of the pair before.
    "index ^ 2: mbarrier.wait(sm.free.index(place), phase)",
    # Slower: the consumer then knows of both halves of its tile at once.
    "index ^ 1: async_copy.mbarrier_arrive(sm.ready.index(place), increment_count=False)",
    # So it is of packed rows: the half that is stored last then says so for both.
    "index ^ 1: mbarrier.arrive(sm.ready.index(2 * TILE + HALF), count=1)",
    # Only the RoPE part is copied from there, which goes with the other half.
    "rows_1 for rows_0: _acquire(sm, segment, rows_0, valid_0, phase, 0, 0)",
    "rows_0 for rows_1: _acquire(sm, segment, rows_1, valid_1, phase, 1, 1)",
    # The last exchange has told both consumers that no tile is in use.
    *(f"index ^ {bits}: tile = sm.latent.index(2 * OWN + OWN)" for bits in (1, 2, 3)),
}


def function_name(node) -> str:
    call = node.value if isinstance(node, ast.Expr | ast.Assign) else node
    return ast.unparse(call.func) if isinstance(call, ast.Call) else ""


def edited(*edits) -> str:
    """The source with the text of some nodes replaced."""
    starts = [0]
    for line in SOURCE.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    source = SOURCE.encode()
    for node, text in sorted(edits, key=lambda edit: -edit[0].lineno):
        begin = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        source = source[:begin] + text.encode() + source[end:]
    return source.decode()


def mutants():
    """Pairs of what was changed and the changed source."""
    for function in ast.parse(SOURCE).body:
        if isinstance(function, ast.FunctionDef) and function.decorator_list:
            for node in ast.walk(function):
                if isinstance(getattr(node, "body", None), list):
                    yield from mutants_of_block(node.body)
                yield from mutants_of_expression(node)


def mutants_of_block(block):
    for i, statement in enumerate(block):
        name, text = function_name(statement), ast.unparse(statement)
        if name in (*OPENING, *CLOSING, "mbarrier.init") or text == "phase ^= 1":
            yield f"without {text}", edited((statement, "pass"))
        for names, others, earlier in ((OPENING, block[i + 1 :], False), (CLOSING, block[:i][::-1], True)):
            other = next((other for other in others if ACCESS.search(ast.unparse(other))), None)
            if name in names and other:
                pair = text, ast.get_source_segment(SOURCE, other)
                swapped = ("\n" + " " * other.col_offset).join(pair if earlier else pair[::-1])
                what = f"{text} {'before' if earlier else 'after'} {ast.unparse(other)}"
                yield what, edited((statement, "pass"), (other, swapped))


def mutants_of_expression(node):
    if not isinstance(node, ast.Call | ast.Compare | ast.Assign):
        return
    name, text = function_name(node), ast.unparse(node)
    line = SOURCE.splitlines()[node.lineno - 1].partition("#")[0].strip()
    if name in PARTS and isinstance(node, ast.Call):
        for argument in node.args:
            if isinstance(argument, ast.Name) and re.search("_[01]$", argument.id):
                other = argument.id[:-1] + str(1 - int(argument.id[-1]))
                yield f"{other} for {argument.id}: {line}", edited((argument, other))
            elif isinstance(argument, ast.Constant | ast.BinOp):
                for bits in (1, 2) if name in ("_load_part", "_convert_part") else (1,):
                    number = f"({ast.unparse(argument)}) ^ {bits}"
                    yield f"{number} in {line}", edited((argument, number))
    if text in ("phase = 0", "phase = 1"):
        yield f"1 - {text}", edited((node.value, f"1 - {node.value.value}"))
    if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Lt):
        yield f"<=: {text}", edited((node, text.replace("<", "<=")))
    if name == "mbarrier.wait":
        yield f"other phase: {text}", edited((node.args[1], f"1 - {ast.unparse(node.args[1])}"))
    if name == "warpgroup_mma_wait" and isinstance(node, ast.Call):
        yield f"one more outstanding: {text}", edited((node.args[0], f"1 + {node.args[0].value}"))
    # The loop over barriers to initialise would only take them in another order.
    if name.endswith(".index") and isinstance(node, ast.Call) and "mbarrier.init" not in line:
        for bits in (1, 2, 3) if name in ("sm.latent.index", "sm.ready.index", "sm.free.index") else (1,):
            changed = f"({ast.unparse(node.args[0])}) ^ {bits}"
            yield f"index ^ {bits}: {line}", edited((node.args[0], changed))
    for keyword in getattr(node, "keywords", []):
        if keyword.arg == "count":
            for step in ("- 1", "+ 1"):
                yield f"count {step}: {text}", edited((keyword.value, f"{ast.unparse(keyword.value)} {step}"))
        if keyword.arg == "mask":
            yield f"no mask: {text}", edited((keyword.value, "None"))


def test_every_mutant_is_killed():
    inputs = inputs_of(300, seed=1, attn_sink=torch.randn(64), **extra_segment(100))
    one = {name: t[:1] if name in ("q", "indices", "extra_indices") else t for name, t in inputs.items()}
    empty = inputs_of(130, s_q=1, topk_length=int32(0))
    few_heads = inputs_of(130, s_q=1, h_q=40, attn_sink=torch.randn(40))
    cases = [(case, expected(case), 1) for case in (one, packed(one), empty, packed(empty))]
    cases += [(few_heads, expected(few_heads), splits) for splits in (1, 2)]
    found, alive = set(), set()
    for what, source in mutants():
        found.add(what)
        try:
            for seed in range(3):
                for case, results, splits in cases:
                    launch(case, seed, module=load(source, splits), results=results)
            alive.add(what)
        # Of types: arithmetic on what nobody waited for. Of names: rows of a tile before they are known.
        except (AssertionError, TypeError, NameError, IndexError) as failure:
            print(f"{what} | {failure!r:.80}")
    assert len(found) > 200
    assert alive == HARMLESS, "\n".join(alive ^ HARMLESS)


# What it becomes on sm_90.


class Hopper:
    """A Triton driver for a GPU that is not there."""

    def get_current_target(self):
        import triton

        return triton.backends.compiler.GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 90

    def get_current_stream(self, device):
        return 0


FEW, MANY = 4, 540  # queries of 128 heads: in splits; and not, as whole waves of 108 multiprocessors


@pytest.fixture(scope="module")
def compiled():
    """A function of the sizes -> the kernel that the launcher would launch."""
    pytest.importorskip("triton", minversion="3.9")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("kernels are interpreted, not compiled")
    from sparse_attn.kernels import sparse_mla_hopper as module

    kernel, result = module._sparse_mla_hopper_kernel, []

    class Launch:
        def __getitem__(self, grid):
            return lambda *args, **options: result.append(kernel.warmup(*args, grid=grid, **options))

    def meta(*shape, dtype=BF16):
        return torch.empty(shape, dtype=dtype, device="meta")

    def cache(slots, page_size):
        if page_size is None:
            return meta(slots, 576)
        return meta(-(-slots // page_size), page_size, 656, dtype=torch.uint8)

    def launch(s_q=MANY, h_q=128, s_kv=100_000, topk=2048, every_option=False, page_size=None):
        options = []
        if every_option:
            extra = cache(999, page_size), meta(s_q, topk // 2, dtype=torch.int32)
            lengths = [meta(s_q, dtype=torch.int32) for _ in range(2)]
            options = [lengths[0], meta(h_q, dtype=torch.float32), *extra, lengths[1]]
        inputs = meta(s_q, h_q, 576), cache(s_kv, page_size), meta(s_q, topk, dtype=torch.int32)
        outputs = meta(s_q, h_q, 512), *(meta(s_q, h_q, dtype=torch.float32) for _ in range(2))
        module.sparse_mla_hopper(SparseMLAOp(*inputs, 512, 0.1, *outputs, *options))
        return result[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, kernel.__name__, Launch())
        patch.setattr(module, "merge_parts", lambda *args: None)
        patch.setattr("triton.runtime.driver._active", Hopper())
        yield launch


def count(lines, *opcodes):
    return sum(bool(re.search(rf"\s(?:{'|'.join(opcodes)})[.\s]", line)) for line in lines)


def main_loops(kernel, path):
    """The instructions of the innermost loops with wgmma or asynchronous copies in them."""
    path.write_bytes(kernel.asm["cubin"])
    tool = Path(sys.modules["triton"].__file__).parent / "backends/nvidia/bin/nvdisasm"
    lines = subprocess.run([tool, "-c", path], capture_output=True, text=True, check=True).stdout.splitlines()
    label_at, ranges = {}, []
    for i, line in enumerate(lines):
        if label := re.match(r"(\.L_\w+):", line):
            label_at[label[1]] = i
        # With a predicate: slow paths of waits, behind the code, branch back without.
        elif (branch := re.search(r"@!?U?P\d BRA\b.*`\((\.L_\w+)\)", line)) and branch[1] in label_at:
            ranges.append(range(label_at[branch[1]], i + 1))
    seen, loops = set(), []
    for body in sorted(ranges, key=len):
        code = [lines[i] for i in body if re.match(r"\s+/\*[0-9a-f]{4,}\*/", lines[i])]
        if count(code, "HGMMA", "LDGSTS") and seen.isdisjoint(body):
            seen.update(body)
            loops.append(code)
    return loops


def loops_by_partition(kernel, every_option, path):
    """Those of the two consumers, and those that gather, one for each segment."""
    assert kernel.metadata.shared <= 227 * 1024
    loops = main_loops(kernel, path)
    consumers = [loop for loop in loops if count(loop, "HGMMA")]
    gathers = [loop for loop in loops if not count(loop, "HGMMA")]
    assert len(consumers) == 2 and len(gathers) == 1 + every_option
    return consumers, gathers


@pytest.mark.parametrize("s_q", [FEW, MANY])
@pytest.mark.parametrize("every_option", [False, True])
def test_machine_code(compiled, every_option, s_q, tmp_path):
    kernel = compiled(s_q, every_option=every_option)
    consumers, gathers = loops_by_partition(kernel, every_option, tmp_path / "kernel.cubin")
    for loop in consumers:
        # Of a pair of tiles: one tile's 576 columns of scores, and p of both times 256 columns of the value.
        assert (count(loop, "HGMMA.64x64x16"), count(loop, "HGMMA.64x256x16")) == (36, 4 + 4)
        assert count(loop, "LDL", "STL") == 0
    for loop in gathers:
        assert count(loop, r"LDGSTS\.E\.BYPASS\.128") == 2 * 64 * 576 * 2 // (128 * 16)
        assert count(loop, "LDL", "STL") <= 1
    issued_a_tile = (sum(len(loop) for loop in consumers) + max(len(loop) for loop in gathers)) / 2
    assert issued_a_tile <= 780


@pytest.mark.parametrize("s_q", [FEW, MANY])
@pytest.mark.parametrize("every_option", [False, True])
def test_machine_code_of_packed_rows(compiled, every_option, s_q, tmp_path):
    kernel = compiled(s_q, every_option=every_option, page_size=64)
    consumers, gathers = loops_by_partition(kernel, every_option, tmp_path / "kernel.cubin")
    for loop in consumers:
        assert (count(loop, "HGMMA.64x64x16"), count(loop, "HGMMA.64x256x16")) == (36, 4 + 4)
        # They have fewer registers than over bf16: some constants are fetched anew, nothing is put away.
        assert count(loop, "STL") == 0 and count(loop, "LDL") <= 30
    for loop in gathers:
        values = 2 * 64 * 512 // 128  # of a pair, for each thread
        assert count(loop, r"LDG\.E\.128") == values // 16
        assert count(loop, r"LDGSTS\.E\.BYPASS\.128") == 2 * 64 * 64 * 2 // (128 * 16)
        assert count(loop, r"STS\.128") == values // 8 and count(loop, "STS") == values // 8 + 4
        # Two values at a time to fp16 and to bf16; one at a time to fp32, and times the scale.
        assert count(loop, r"F2FP\.F16\.E4M3\.UNPACK_B", r"F2FP\.BF16\.F32\.PACK_AB") == values
        assert count(loop, r"HADD2\.F32") == count(loop, "FMUL") == values
        assert count(loop, "STL") == 0 and count(loop, "LDL") <= 1
        assert len(loop) <= 1950


@pytest.mark.parametrize("s_q", [FEW, MANY])
def test_packed_rows_are_fenced_before_they_arrive(compiled, s_q):
    """Each thread makes what it stored visible to wgmma; then the threads meet, and one of them arrives."""
    code = compiled(s_q, page_size=64).asm["ptx"]
    before = code.split("mbarrier.arrive.shared")[:-1]
    assert len(before) == 15  # 4 in either loop of a consumer, 1 behind it; 4 in the gathering loop, 1 behind
    gathering = [part for part in before if "cvt.rn.f16x2.e4m3x2" in part]
    assert len(gathering) == 4
    for part in gathering:
        stores, _, fence = part.rpartition("fence.proxy.async")
        assert "st.shared" in stores and "bar.sync" in fence and "st.shared" not in fence


@pytest.mark.parametrize("s_q", [FEW, MANY])
def test_threads_of_a_partition_meet_before_they_arrive(compiled, s_q):
    """What the emulator takes for granted: one thread arrives, when all have done their part."""
    code = compiled(s_q).asm["ptx"]
    before = code.split("mbarrier.arrive.shared")[:-1]
    assert len(before) == 13  # 4 in either loop, 1 behind it; 2 in the gathering loop, 1 behind it
    work = re.compile(r"(ld|st)\.shared|stmatrix|wgmma\.|cp\.async|try_wait")
    for part in before:
        assert "bar.sync" in part and not work.search(part.rpartition("bar.sync")[2])
    # p takes the place of the RoPE part that every warp's wgmma has read.
    for part in code.split("wgmma.wait_group")[1:]:
        if "stmatrix" in part:
            assert "bar.sync" in part.partition("stmatrix")[0]


@pytest.mark.parametrize("s_q", [FEW, MANY])
def test_missing_heads_are_masked_in_every_store(compiled, s_q):
    """Seen in the compiler's own code, as the emulator runs Python: to it, None and False are alike."""
    stores = [line for line in compiled(s_q, h_q=100).asm["ttgir"].splitlines() if "tt.store" in line]
    assert len(stores) == 4 and all(line.partition(" : ")[0].count("%") == 3 for line in stores)
    plain = [line for line in compiled(s_q).asm["ttgir"].splitlines() if "tt.store" in line]
    assert len(plain) == 4 and all(line.partition(" : ")[0].count("%") == 2 for line in plain)


def test_bools_do_not_enter_a_partition():
    with pytest.raises(TypeError, match="a bool within an argument of a partition"):
        emulator.refuse_bools((1, (None, True)))


def test_sizes_do_not_recompile(compiled):
    many = [{}, {"s_q": 810, "s_kv": 100_003}, {"h_q": 64}, {"s_kv": 1}, {"topk": 1}, {"topk": 33}]
    assert len({id(compiled(**size)) for size in [*many, {"s_q": 1, "topk": 33}]}) == 1
    few = [{}, {"s_q": 1}, {"s_q": 3, "h_q": 64}, {"s_kv": 1}, {"s_kv": 100_003}, {"topk": 1025}]
    assert len({id(compiled(**{"s_q": FEW, **size})) for size in few}) == 1
    assert compiled(FEW) is not compiled(MANY)


# What it takes.


@pytest.fixture
def taken(monkeypatch):
    """Whether the launcher gives a call on a pretended GPU to this kernel."""
    pytest.importorskip("triton", minversion="3.9")
    from sparse_attn.kernels import configs, sparse_mla

    def ask(arch=90, which="all", **inputs):
        monkeypatch.setattr(configs, "WARP_SPECIALISED", which)
        monkeypatch.setattr(configs, "architecture", lambda device: arch)
        q = inputs["q"]
        out = torch.empty(*q.shape[:2], inputs.get("d_v", 512), dtype=q.dtype, device="meta")
        logits = torch.empty(q.shape[:2], device="meta")
        sizes = {"d_v": 512, "softmax_scale": 0.1, "out": out, "lse": logits, "max_logits": logits}
        for name in ("kv", "extra_kv"):
            if name in inputs and inputs[name].dtype == torch.uint8:
                sizes[f"{name}_format"] = {656: "v32", 584: "v4"}[inputs[name].shape[-1]]
        return sparse_mla.warp_specialised(SparseMLAOp(**{**sizes, **inputs}))

    return ask


def sizes(s_q=3, h_q=64, s_kv=500, topk=100, d_qk=576, dtype=BF16):
    q, kv = (torch.empty(*shape, d_qk, dtype=dtype, device="meta") for shape in ((s_q, h_q), (s_kv,)))
    return {"q": q, "kv": kv, "indices": torch.empty(s_q, topk, dtype=torch.int32, device="meta")}


def cache(pages=8, page_size=64, size=656):
    return torch.empty(pages, page_size, size, dtype=torch.uint8, device="meta")


def test_it_takes_what_it_can_compute(taken):
    inputs = sizes()
    extra = {"extra_indices": inputs["indices"]}
    assert taken(**inputs) and taken(**sizes(s_q=1)) and taken(**sizes(h_q=40))
    assert taken(**inputs, **extra, extra_kv=inputs["kv"])
    assert taken(**{**inputs, "kv": cache()}) and taken(**{**inputs, "kv": cache(500, 1)[:, 0]})
    assert taken(**{**inputs, "kv": cache()}, **extra, extra_kv=cache(500, 1))
    one = inputs["q"][:1].as_strided((1, 64, 576), (7, 576, 1))  # of one query the stride says nothing
    assert taken(**{**inputs, "q": one, "indices": inputs["indices"][:1]})


def test_it_is_given_what_was_measured(taken):
    for which, answers in (("all", (1, 1, 1)), ("measured", (1, 0, 0)), ("none", (0, 0, 0))):
        calls = sizes(), sizes(h_q=40), {**sizes(), "kv": cache()}
        assert tuple(int(taken(which=which, **inputs)) for inputs in calls) == answers


@pytest.mark.parametrize(
    "change",
    [
        *({"arch": 80}, {"arch": 100}, {"dtype": torch.float16}, {"dtype": torch.float32}),
        *({"d_qk": 512}, {"d_v": 256}, {"softmax_scale": -1.0}, {"softmax_scale": NAN}, {"s_kv": 2**27}),
    ],
    ids=str,
)
def test_it_leaves_the_rest(taken, change):
    made = sizes(**{name: change[name] for name in ("dtype", "h_q", "d_qk", "s_kv") if name in change})
    assert not taken(
        **made, **{name: change[name] for name in ("arch", "d_v", "softmax_scale") if name in change}
    )


@pytest.mark.parametrize("name", ["q", "kv", "extra_kv", "out"])
def test_rows_must_be_aligned(taken, name):
    inputs = sizes()
    inputs["out"] = torch.empty(3, 64, 512, dtype=BF16, device="meta")
    inputs["extra_kv"], inputs["extra_indices"] = inputs["kv"], inputs["indices"]
    assert taken(**inputs)
    *strides, last = inputs[name].stride()
    for stride in ([*(n + 8 for n in strides), last], [*(2 * n for n in strides), 2]):
        other = torch.empty_strided(inputs[name].shape, stride, dtype=BF16, device="meta")
        assert not taken(**{**inputs, name: other})


def test_packed_tokens_must_be_aligned(taken):
    inputs = sizes()
    for shape, strides, offset in (
        ((8, 64, 656), (65 * 656 + 8, 656, 1), 0),
        ((8, 64, 656), (64 * 664, 664, 1), 0),
        ((8, 64, 656), (64 * 656, 656, 1), 8),
        ((2**16 + 2, 64, 656), (2**20, 656, 1), 0),  # 64 GiB
    ):
        size = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + 16
        kv = torch.empty(size, dtype=torch.uint8, device="meta").as_strided(shape, strides, offset)
        assert not taken(**{**inputs, "kv": kv})
    assert not taken(**{**sizes(d_qk=512), "kv": cache(size=584)})
    apart = torch.empty(8, 128, 576, dtype=BF16, device="meta")[:, :64]
    for kv, extra_kv in ((inputs["kv"], cache()), (cache(), inputs["kv"]), (apart, apart), (apart, cache())):
        assert not taken(**{**inputs, "kv": kv, "extra_kv": extra_kv, "extra_indices": inputs["indices"]})
