"""What the kernels become on each architecture: compiled ahead of time with the launchers' own
configurations, and read back as machine code. No GPU is needed, and nothing runs."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted, not compiled", allow_module_level=True)

import host_cost  # noqa: E402
from aot import bounds, cases, report, sass  # noqa: E402
from aot.cases import CASES, Product  # noqa: E402
from aot.launch import compile_launches  # noqa: E402
from sparse_attn import ops  # noqa: E402
from sparse_attn.kernels import configs  # noqa: E402

BUDGETS = Path(__file__).parents[1] / "benchmarks" / "kernels_budget"


def compiled():
    """Each (case, architecture) of the tests; all but one of each operation are slow."""
    seen = set()
    for case in CASES:
        for arch in case.quick:
            fast = case.op not in seen and arch == min(90, case.quick[-1])
            seen |= {case.op} if fast else set()
            yield pytest.param(case, arch, marks=[] if fast else pytest.mark.slow)


@pytest.fixture(scope="module")
def rows(request):
    """Of what the selected tests compile, in a few processes: the kernels of each (case, architecture)."""
    params = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    wanted = {(p["case"].op, p["case"].label, p["arch"]) for p in params if "case" in p}
    found = {}
    for row in report.rows(lambda case, arch: (case.op, case.label, arch) in wanted):
        found.setdefault((row.op, row.case, row.arch), []).append(row)
    return found


def expected_opcodes(row):
    """Tensor cores for what is no fp32; for products of 64 rows and more those of the architecture alone."""
    if "fp32" in row.case:
        return {*bounds.FP32}
    wide = {90: {"HGMMA", "QGMMA"}, 100: {"UTCHMMA", "UTCQMMA"}}.get(row.arch, {"HMMA", "QMMA"})
    products = cases.PRODUCTS[row.kernel](row.constants)
    return set().union(*(wide if product.m >= 64 else {"HMMA", "QMMA"} for product in products))


@pytest.mark.parametrize(
    "case, arch",
    list(compiled()),
    ids=lambda value: f"{value.op}-{value.label}" if isinstance(value, cases.Case) else f"sm_{value}",
)
def test_a_kernel_fits_and_its_loop_does_what_it_should(rows, case, arch):
    for row in rows[case.op, case.label, arch]:
        assert row.impossible() == []
        assert min(row.blocks.values()) > 0
        assert bool(row.instructions) == bool(row.loads)  # neither, if it has no loop
        assert row.instructions or row.work is None
        worth_it = row.kernel != "_sparse_mla_kernel" or "656 bytes" in row.case
        assert row.loop_spills <= worth_it * SPILLED.get((row.kernel, arch), 0)
        if row.work is not None:
            assert {opcode.partition(".")[0] for opcode in row.matrix} <= expected_opcodes(row)
            # No product twice, as when warpgroups all compute the same scores.
            assert 1 <= row.work < REPEATED.get((row.case, arch), 1.05)
            assert {"LDGSTS 16", "LDG 16"} & row.loads.keys()  # rows are gathered 16 bytes at a time
        if row.kernel in GATHERING and not waits(row):
            assert row.ahead > 0 or min(row.blocks.values()) > 1  # something computes while rows are gathered


SLOW_HISTOGRAM = cases.TRITON < (3, 8)
# Spills in loops, where measurements say that they are worth it: larger tiles of packed rows are up to 1.5
# times faster on sm_90; the warp-specialised kernel gathers with 48 registers, as with more the rest spills.
SPILLED = {("_sparse_mla_hopper_kernel", 90): 1, ("_sparse_mla_kernel", 90): 36}
GATHERING = "_sparse_mla_kernel", "_sparse_gqa_kernel"
# Where larger tiles spill: the scores of 16 keys and 16 heads are two tiles of mma.sync, for four warps.
REPEATED = {("16 heads, 656 bytes", 120): 1.6, ("40 heads, d_qk 1024", 90): 1.7}


def waits(row):
    """fp32, which is no matter of speed; and two tiles for wgmma, which leave no room for one in flight."""
    wgmma = row.kernel == "_sparse_mla_kernel" and "HGMMA.64x32x16" in row.matrix
    return "fp32" in row.case or wgmma


@pytest.fixture
def budget():
    path = report.budget_file(BUDGETS)
    if not path.exists():
        pytest.skip(f"there is no budget for Triton {report.version()}")
    return report.read_budget(path)


def test_no_kernel_is_worse_than_its_budget(rows, budget):
    every_row = [row for part in rows.values() for row in part]
    lines = [f"{row.key}: {line}" for row in every_row for line in report.worse(row, budget)]
    assert not lines, "make kernels-report ARGS=--update-budget if this is meant\n" + "\n".join(lines)


def test_the_budget_holds_every_case(budget):
    held = {key.rpartition(" | ")[0] for key in budget}
    assert held == {f"{case.op} | {case.label} | sm_{arch}" for case in CASES for arch in case.archs}


def test_relu_passes_nan_on():
    (launch,) = compile_launches("index_logits", 90, cases.index(64))
    assert "max.NaN.f32" in launch.kernel.asm["ptx"]  # the interpreter cannot tell


@pytest.mark.skipif(SLOW_HISTOGRAM, reason="before Triton 3.8 equal digits are added one by one")
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_the_histogram_counts_equal_digits_at_full_speed(arch):
    (launch,) = compile_launches("select_topk", arch, cases.select(512, 1 << 17))
    text = sass.disassemble(launch.kernel.asm["cubin"])
    atomics = [line for line in text.splitlines() if " ATOMS" in line]
    assert atomics and all("ATOMS.POPC.INC" in line for line in atomics)


def different_sizes():
    sizes = [{}, {"s_q": 1}, {"s_q": 33, "s_kv": 100_003}, {"s_kv": 1}]
    topks = [{"topk": 1}, {"topk": 33}]
    yield "sparse_mla", [cases.mla(16, **size) for size in sizes + topks]
    yield "sparse_mla", [cases.mla(16, packed=656, **size) for size in sizes + topks]
    yield "sparse_mla", [cases.mla(16, 512, packed=584, extra=True, **size) for size in sizes + topks]
    yield "sparse_gqa", [cases.gqa(24, 2, 128, per_head=True, **size) for size in sizes + topks]
    yield "index_logits", [cases.index(64, **size) for size in sizes]
    pages = [{"s_kv": 64}, {"s_kv": 6400}, {"s_q": 3, "s_kv": 64 * 333}]
    yield "index_logits", [cases.index(64, **size, paged_rows=n) for n, size in enumerate(pages, 1)]
    many = (512, 1 << 17), (65, 3200), (200, 160, 1)
    few = [(s_q, 1 << n) for s_q in (1, 8) for n in range(10, 21)]
    yield "select_topk", [cases.select(*size) for size in (*many, *few)]
    yield "merge_attention", [cases.merge(n, s_q) for n, s_q in ((1, 64), (4, 1), (7, 33))]


@pytest.mark.parametrize(
    "op, launches", list(different_sizes()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_sizes_compile_two_variants_at_most(op, launches):
    """One for few queries (whose tiles are split, or that share no keys), and one for many."""
    variants = {}
    for arguments in launches:
        for launch in compile_launches(op, 80, arguments):
            variants.setdefault(launch.name, set()).add(id(launch.kernel))
    assert max(map(len, variants.values())) <= 2, {name: len(found) for name, found in variants.items()}


LAUNCHES = {
    "sparse_mla": ["_sparse_mla_hopper_kernel", "_merge_attention_kernel"],
    "sparse_mla, 656 bytes": ["_sparse_mla_kernel", "_merge_attention_kernel"],
    "lightning_topk": [
        *("_index_logits_kernel", "_count_segment_kernel", "_list_segment_kernel", "_select_topk_kernel"),
    ],
    "physical_slots": ["_physical_slots_kernel"],
    "write_kv": ["_write_kv_kernel"],
    "write_index_k": ["_write_index_k_kernel"],
}
LAUNCHES["lightning_topk, 132 bytes"] = LAUNCHES["lightning_topk"]


def test_a_decode_step_launches_its_kernels_and_nothing_else():
    with host_cost.idle_gpu(90):
        calls = host_cost.calls()
        assert set(calls) == set(LAUNCHES)
        for name, call in calls.items():
            expected = LAUNCHES[name]
            if configs.TRITON < (3, 9):
                expected = [kernel.replace("_hopper", "") for kernel in expected]
            assert host_cost.launches(call) == expected
        assert host_cost.launches(lambda: torch.zeros(3) + 1) == ["zeros", "add"]  # it can see torch's
        (line,) = host_cost.measure({"slots": calls["physical_slots"]}, rounds=1)
        assert line["low"] > 0 and line["launches"] == LAUNCHES["physical_slots"]


class LooksAtData(TorchDispatchMode):
    """Writes down what a CUDA graph cannot capture: sizes that depend on data, and copies to the CPU."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
        if tags.intersection(function.tags) or function.name() == "aten::_to_copy":
            self.found.add(function.name())
        return function(*args, **(kwargs or {}))


@pytest.fixture
def launched(monkeypatch):
    """What was launched in place of a kernel: its name, its grid, its options and sizes."""
    found = []

    def write_down(function, *args, grid, warmup, **options):
        tensors = [(arg.shape, arg.stride(), arg.dtype) for arg in args if isinstance(arg, torch.Tensor)]
        sizes = [arg for arg in args if not isinstance(arg, torch.Tensor)]
        found.append((function.__name__, grid, tensors, sizes, options))
        metadata = SimpleNamespace(name=function.__name__)
        return SimpleNamespace(src=SimpleNamespace(constants={}), metadata=metadata)

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", write_down)
    return found


def few_and_many():
    """Every case, and attention of few queries: their tiles are split, and parts merged."""
    few = (1, 3)
    yield from ((case.op, case.record) for case in CASES if case.archs)
    yield from (("sparse_mla", cases.mla(h, 512, s_q=n, packed=584)) for h in (8, 128) for n in few)
    yield from (("sparse_gqa", cases.gqa(24, 2, 128, s_q=n)) for n in few)


def test_launches_know_nothing_of_data(launched):
    """Meta tensors hold none: asking them for a value fails."""
    for op, arguments in few_and_many():
        with LooksAtData() as looks:
            compile_launches(op, 90, arguments)
            once = launched.copy()
            launched.clear()
            compile_launches(op, 90, arguments)
        assert once == launched and once, op
        assert not looks.found, op
        launched.clear()


@pytest.mark.parametrize("wrong", [lambda x: int(x.max()), lambda x: x.cpu(), lambda x: x.nonzero()])
def test_a_launcher_that_looks_at_data_is_noticed(launched, monkeypatch, wrong):
    right = ops.implementation("sparse_mla", "triton")

    def looks(a):
        wrong(a.topk_length)
        right(a)

    monkeypatch.setattr(ops, "implementation", lambda op, backend: looks)
    monkeypatch.setattr(sys.modules[__name__], "CASES", [case for case in CASES if case.op == "sparse_mla"])
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
        test_launches_know_nothing_of_data(launched)


# The report itself.


def test_every_kernel_of_a_launcher_is_caught(monkeypatch):
    right = ops.implementation("merge_attention", "triton")

    def twice(a):
        for _ in range(2):
            right(a)

    monkeypatch.setattr(ops, "implementation", lambda op, backend: twice)
    launches = compile_launches("twice", 80, cases.merge(2))
    assert [launch.name for launch in launches] == ["_merge_attention_kernel"] * 2
    assert launches[0].constants["BLOCK_V"] == 512 and launches[0].warps == 4


def sass_of(*lines):
    """Numbered as nvdisasm does, labels aside."""
    code = (line if line[-1] == ":" else f"        /*{16 * n:04x}*/ {line} ;" for n, line in enumerate(lines))
    return sass.parse("\n".join(code))


NESTED = (
    *("MOV R1, R2", ".L_x_0:", "LDG.E R3, [R4.64]", ".L_x_1:", "LDGSTS.E.BYPASS.128 [R5], [R6.64]"),
    *("@!P1 BRA `(.L_x_3)", ".L_x_2:", "STL [R1], R7", "@P0 BRA `(.L_x_1)", "LDL R8, [R1]"),
    *("BRA P2, `(.L_x_0)", "EXIT", ".L_x_3:", "YIELD", "@!P3 BRA `(.L_x_3)", "BRA `(.L_x_2)"),
)


def test_loops_are_found_with_what_was_moved_out_of_line():
    code = sass_of(*NESTED)
    found = [[code.instructions[place].name for place in loop] for loop in sass.loops(code)]
    waiting = ["YIELD", "BRA", "BRA"]
    inner = ["LDGSTS", "BRA", "STL", "BRA", *waiting]
    assert found == [["LDG", *inner[:4], "LDL", "BRA", *waiting], inner, ["YIELD", "BRA"]]
    assert sass.loops(sass_of("BRA `(.L_x_1)", ".L_x_0:", "EXIT", ".L_x_1:", "BRA `(.L_x_0)")) == []


def test_a_warp_specialised_kernel_has_a_loop_in_each_partition():
    dispatch = (
        *(".L_x_0:", "@P0 BRA `(.L_x_2)"),
        *(".L_x_1:", "HGMMA.64x64x16.F32.BF16 R8, gdesc[UR4], R8", "@P1 BRA `(.L_x_1)", "STL [R1], R2"),
        *(".L_x_2:", "LDGSTS.E.BYPASS.128 [R5], [R6.64]", "@P1 BRA `(.L_x_2)", "@P2 BRA `(.L_x_0)", "EXIT"),
    )
    ttgir = '"ttg.num-warps" = 4 ttg.warp_specialize(%a) partition0(%b: i32) num_warps(8) {'
    launch = SimpleNamespace(name="k", warps=12, kernel=SimpleNamespace(asm={"ttgir": ttgir}))
    in_loops, executed = report._main_loop(sass_of(*dispatch), launch, [Product(64, 64, 16)])
    assert [(i.name, warps) for i, warps in executed] == [("HGMMA", 4), ("BRA", 4), ("LDGSTS", 8), ("BRA", 8)]
    assert sass.count(in_loops, "STL") == 0  # between the loops
    launch.kernel.asm["ttgir"] += " partition1(%c: i32) num_warps(4)"
    with pytest.raises(ValueError, match="3 partitions, but 2 loops"):
        report._main_loop(sass_of(*dispatch), launch, [Product(64, 64, 16)])


def test_widths_of_memory_instructions():
    widths = {
        **{"LDG.E": 4, "LDG.E.U8.CONSTANT": 1, "LDG.E.64": 8, "LDG.E.ENL2.256": 32, "LDS.U16": 2},
        **{"LDGSTS.E.BYPASS.128": 16, "LDSM.16.M88.4": 16, "LDSM.16.M88": 4, "STSM.16.M88.2": 8},
    }
    for opcode, width in widths.items():
        assert sass.bytes_per_lane(sass.Instruction(None, opcode, "")) == width, opcode


def test_bounds_of_a_known_loop():
    """MLA, 64 x 64, on an H100, counted by hand: scores split over two warpgroups, values halved."""
    gather = [("LDGSTS.E.BYPASS.128", "")] * 18 + [("LDGSTS.E", "")]
    scores = [("HGMMA.64x32x16.F32.BF16", "R8, gdesc[UR4], R8")] * 36
    values = [("HGMMA.64x256x16.F32.BF16", "R8, R4, gdesc[UR4].tnspB, R8")] * 4
    executed = [(sass.Instruction(None, *i), 8) for i in gather + scores + values]
    products = [Product(64, 64, 576), Product(64, 512, 64)]
    assert bounds.multiply_adds(executed, products) == 64 * 64 * (576 + 512)
    cycles = bounds.cycles(90, executed, products)
    assert cycles["tensor"] == 2176 and cycles["issue"] == 59 * 8 / 4 and round(cycles["L2"]) == 3105
    row_of_a_tile = 64 * 1152 // 128  # written once; q is read by both warpgroups, keys once, values once
    assert cycles["shared"] == row_of_a_tile * (1 + 2 + 1) + 64 * 1024 // 128 + 256 * 4 // 128
    twice = [*executed, *[(sass.Instruction(None, *i), 8) for i in scores]]
    assert bounds.multiply_adds(twice, products) == 64 * 64 * (2 * 576 + 512)


def test_multiply_adds_of_an_instruction():
    expected = {
        **{("HMMA.16816.F32.BF16", 4): 4 * 2048, ("HMMA.1688.F32.TF32", 1): 1024, ("FFMA", 1): 32},
        **{("QMMA.16832.F32", 2): 8192, ("QGMMA.64x32x32.F32.E4M3.E4M3", 4): 65536, ("FFMA2", 1): 64},
        ("UTCHMMA", 8): 64 * 512 * 64 / 8,
    }
    for (opcode, warps), macs in expected.items():
        one = [(sass.Instruction(None, opcode, ""), warps)]
        assert bounds.multiply_adds(one, [Product(64, 512, 64)]) == macs, opcode
    scores, values = Product(32, 64, 576), Product(64, 512, 32)
    opcodes = ["HMMA.16816"] * 72 + ["UTCHMMA"] * 4 + ["UTCBAR"]
    mixed = [(sass.Instruction(None, opcode, ""), 8) for opcode in opcodes]
    assert bounds.multiply_adds(mixed, [scores, values]) == 64 * 32 * (576 + 512)
    with pytest.raises(ValueError, match=r"HMMA\.99: unknown shape"):
        bounds.multiply_adds([(sass.Instruction(None, "HMMA.99", ""), 1)], [Product(16, 8, 16)])


def test_blocks_on_an_sm():
    assert bounds.blocks_per_sm(90, 8, 137, 94976, 0) == {"regs": 1, "shared": 2, "warps": 8}
    assert bounds.blocks_per_sm(90, 8, 128, 94976, 256) == {"regs": 2, "shared": 2, "warps": 8, "TMEM": 2}
    assert bounds.blocks_per_sm(86, 1, 24, 1024, 0) == {"regs": 85, "shared": 50, "warps": 16}
    assert bounds.blocks_per_sm(120, 4, 64, 99 * 1024 + 1, 0)["shared"] == 0


ROW = report.Row(
    *("op", "case", 90, "kernel", {}, 8, 128, 99 * 1024, 0, {"regs": 2, "shared": 3}, 4, 1, 1000),
    *({"HGMMA.64x32x16": 36}, 1.0, {"LDG 4": 2, "LDGSTS 16": 18}, 1, {}),
)


def test_every_kind_of_decline_is_noticed(tmp_path):
    path = tmp_path / "new" / "budget.json"
    report.write_budget(path, [ROW], keep={})
    budget = report.read_budget(path)
    assert report.worse(ROW, budget) == []
    assert report.worse(dataclasses.replace(ROW, spills=0, loop_spills=0, instructions=900), budget) == []
    declines = {
        "loop_spills": {"loop_spills": 2},
        "spills": {"spills": 5},
        "instructions": {"instructions": 1021},
        "matrix": {"matrix": {"HMMA.16816": 36}},
        "work": {"work": 1.5},
        "narrow": {"loads": {"LDG 4": 3, "LDGSTS 16": 18}},
        "blocks": {"blocks": {"regs": 1, "shared": 3}},
        "ahead": {"ahead": 0},
    }
    assert declines.keys() == report.RULES.keys()
    for figure, change in declines.items():
        (line,) = report.worse(dataclasses.replace(ROW, **change), budget)
        assert line.startswith(f"{figure}: ")
    other = dataclasses.replace(ROW, case="another")
    assert report.worse(other, budget) == ["has no budget"]
    report.write_budget(path, [other], keep=budget)
    assert report.worse(ROW, report.read_budget(path)) == report.worse(other, report.read_budget(path)) == []


def test_what_no_gpu_could_launch_is_named():
    assert ROW.impossible() == []
    assert "sm_120 has 101376 per block" in dataclasses.replace(ROW, arch=120, shared=101377).impossible()[0]
    assert "513 columns" in dataclasses.replace(ROW, tensor_memory=513).impossible()[0]
    assert dataclasses.replace(ROW, shared=227 * 1024, tensor_memory=512).impossible() == []


SCRIPT = Path(__file__).parents[1] / "benchmarks" / "kernels_report.py"


def test_the_command_writes_a_table_json_and_the_code(tmp_path):
    pytest.importorskip("rich", reason="rich is in the demo extra")
    options = ["--only", "merge_attention, d_v 512", "--arch", "80", "--json", tmp_path / "rows.json"]
    command = [sys.executable, SCRIPT, *options, "--dump", tmp_path / "code"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "merge_attention, d_v 512: _merge_attention_kernel" in done.stdout and "not run" in done.stdout
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["arch"] == 80 and row["registers"] > 0 and row["triton"] == triton.__version__
    assert {path.suffix for path in (tmp_path / "code").iterdir()} == {".cubin", ".sass", ".ptx", ".ttgir"}


def test_the_command_fails_when_a_kernel_got_worse(tmp_path, monkeypatch):
    rich = pytest.importorskip("rich.console", reason="rich is in the demo extra")
    spec = importlib.util.spec_from_file_location("kernels_report", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "BUDGETS", tmp_path)

    def judge(row, update=False, everything=False):
        with open(tmp_path / "said", "w") as file:
            status = script.judge(rich.Console(file=file, width=200), [row], update, everything)
        return status, (tmp_path / "said").read_text()

    status, said = judge(ROW)
    assert status == 0 and "no budget for Triton" in said
    assert judge(ROW, update=True)[0] == 0
    assert judge(ROW) == (0, "")
    status, said = judge(dataclasses.replace(ROW, loop_spills=3))
    assert status == 1 and "op | case | sm_90 | kernel: loop_spills: 3, budget 1" in said
    status, said = judge(dataclasses.replace(ROW, case="new"), everything=True)
    assert status == 1 and "new | sm_90 | kernel: has no budget" in said and "no longer compiled" in said
    status, said = judge(dataclasses.replace(ROW, shared=999_999), update=True)
    assert status == 1 and "shared memory" in said  # no budget allows what cannot run
