"""What the kernels become on each architecture: compiled ahead of time with the launchers' own
configurations, and read back as machine code. No GPU is needed, and nothing runs."""

import importlib
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted, not compiled", allow_module_level=True)

from sparse_attn.kernels import configs  # noqa: E402

SHARED_MEMORY_KIB = {80: 163, 86: 99, 90: 227, 100: 227, 120: 99}
ARCHITECTURES = list(SHARED_MEMORY_KIB)
TENSOR_MEMORY_COLUMNS = 512
BF16, FP32 = torch.bfloat16, torch.float32


class Target:
    """A Triton driver for a GPU that is not there; its architecture is its device number."""

    def __init__(self, arch):
        self.arch = arch

    def get_current_target(self):
        return triton.backends.compiler.GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        return self.arch

    def get_current_stream(self, device):
        return 0


@pytest.fixture
def compiled(monkeypatch):
    """A function (arch, op, arguments) -> the kernel that the op's launcher would launch."""

    def compile_for(arch, op, arguments):
        module = importlib.import_module(f"sparse_attn.kernels.{op}")
        kernel = getattr(module, f"_{op}_kernel")
        result = []

        class Launch:
            def __getitem__(self, grid):
                return lambda *args, **options: result.append(kernel.warmup(*args, grid=grid, **options))

        with monkeypatch.context() as patch:
            patch.setattr(module, kernel.__name__, Launch())
            patch.setattr(configs, "architecture", lambda device: arch)
            patch.setattr(triton.runtime.driver, "_active", Target(arch))
            getattr(module, op)(*arguments)
        return result[0]

    return compile_for


def disassemble(kernel, path: Path) -> list[str]:
    path.write_bytes(kernel.asm["cubin"])
    nvdisasm = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    done = subprocess.run([nvdisasm, "-c", path], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def loops(lines: list[str]) -> list[list[str]]:
    """The instructions between each backward branch and its target, in the code before the final EXIT.

    Behind it lie waits that were moved out of line, which branch back from there but are no loops.
    """
    label_at, found = {}, []
    for i, line in enumerate(lines):
        if label := re.match(r"(\.L_\w+):", line):
            label_at[label[1]] = i
        elif (branch := re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line)) and branch[1] in label_at:
            found.append(lines[label_at[branch[1]] : i])
        elif re.search(r"\*/ +EXIT\b", line):
            break
    return found


def count(lines: list[str], *opcodes: str) -> int:
    return sum(bool(re.search(rf"\s(?:{'|'.join(opcodes)})[.\s]", line)) for line in lines)


def check(kernel, arch, path, tensor_cores=None) -> list[str]:
    """Within the limits of the architecture; returns the main loop, which has no spills."""
    shared_kib, columns = kernel.metadata.shared / 1024, getattr(kernel.metadata, "tmem_size", None) or 0
    assert shared_kib <= SHARED_MEMORY_KIB[arch]
    assert columns <= TENSOR_MEMORY_COLUMNS
    opcode = tensor_cores or "FFMA"
    main = max(loops(disassemble(kernel, path / "kernel.cubin")), key=lambda loop: count(loop, opcode))
    instructions, spills = count(main, opcode), count(main, "LDL", "STL")
    assert instructions > 0, f"no {opcode} in any loop"
    assert spills == 0, "the main loop spills registers"
    return main


def empty(*shape, dtype=BF16):
    return torch.empty(shape, dtype=dtype, device="meta")


def int32(*shape):
    return empty(*shape, dtype=torch.int32)


def mla_arguments(h_q, d_qk=576, dtype=BF16, s_q=64, s_kv=100_000, topk=2048, extra=False):
    return (
        *(empty(s_q, h_q, d_qk, dtype=dtype), empty(s_kv, d_qk, dtype=dtype), int32(s_q, topk), 512, 0.1),
        *(int32(s_q), empty(h_q, dtype=FP32)),
        *((empty(999, d_qk, dtype=dtype), int32(s_q, 128), int32(s_q)) if extra else (None, None, None)),
        *(empty(s_q, h_q, 512, dtype=dtype), empty(s_q, h_q, dtype=FP32)),
    )


def gqa_arguments(h_q, h_kv, d, dtype=BF16, s_q=64, s_kv=100_000, topk=2048, per_head=False):
    return (
        *(empty(s_q, h_q, d, dtype=dtype), *(empty(s_kv, h_kv, d, dtype=dtype) for _ in "kv")),
        *(int32(s_q, h_kv, topk) if per_head else int32(s_q, topk), 0.1, int32(s_q), empty(h_q, dtype=FP32)),
        *(empty(s_q, h_q, d, dtype=dtype), empty(s_q, h_q, dtype=FP32)),
    )


def index_arguments(h, dtype=BF16, s_q=64, s_kv=100_000, paged_rows=0):
    k, table, width = empty(s_kv, 128, dtype=dtype), None, s_kv
    if paged_rows:
        k, table, width = (
            empty(s_kv // 64, 64, 128, dtype=dtype),
            int32(paged_rows, s_kv // 64),
            s_kv // 64 * 64,
        )
    inputs = empty(s_q, h, 128, dtype=dtype), k, empty(s_q, h, dtype=FP32), int32(s_q), int32(s_q)
    return *inputs, table, empty(s_q, width, dtype=FP32)


def merge_arguments(n, s_q=64, h=128):
    return empty(n, s_q, h, 512), empty(n, s_q, h, dtype=FP32), empty(s_q, h, 512), empty(s_q, h, dtype=FP32)


MMA_SYNC = dict.fromkeys(ARCHITECTURES, "HMMA")
LARGE_TILES = {**MMA_SYNC, 90: "HGMMA", 100: "UTCHMMA"}  # from 64 rows on


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("options", [{"h_q": 16}, {"h_q": 128}, {"h_q": 128, "d_qk": 512, "extra": True}])
def test_sparse_mla(compiled, arch, options, tmp_path):
    kernel = compiled(arch, "sparse_mla", mla_arguments(**options))
    main = check(kernel, arch, tmp_path, (MMA_SYNC if options["h_q"] == 16 else LARGE_TILES)[arch])
    if arch == 90 and options == {"h_q": 128}:
        assert count(main, "HGMMA") == 36 + 4  # each warpgroup its half of the scores, not all of them


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("heads_and_width", [(24, 2, 256), (64, 1, 128)])
def test_sparse_gqa(compiled, arch, heads_and_width, tmp_path):
    kernel = compiled(arch, "sparse_gqa", gqa_arguments(*heads_and_width))
    check(kernel, arch, tmp_path, (MMA_SYNC if heads_and_width[0] == 24 else LARGE_TILES)[arch])


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("h, paged_rows", [(64, 0), (128, 2)])
def test_index_logits(compiled, arch, h, paged_rows, tmp_path):
    kernel = compiled(arch, "index_logits", index_arguments(h, paged_rows=paged_rows))
    check(kernel, arch, tmp_path, LARGE_TILES[arch])
    assert "max.NaN.f32" in kernel.asm["ptx"]  # relu passes NaN on; the interpreter cannot tell


@pytest.mark.parametrize("arch", [86, 90])
def test_fp32(compiled, arch, tmp_path):
    for op, arguments in (
        ("sparse_mla", mla_arguments(64, dtype=FP32)),
        ("sparse_gqa", gqa_arguments(24, 2, 256, dtype=FP32)),
        ("index_logits", index_arguments(64, dtype=FP32)),
    ):
        check(compiled(arch, op, arguments), arch, tmp_path)


@pytest.mark.parametrize("arch", [80, 90])
def test_merge_attention(compiled, arch, tmp_path):
    check(compiled(arch, "merge_attention", merge_arguments(4)), arch, tmp_path)


def different_sizes():
    sizes = [{}, {"s_q": 1}, {"s_q": 33, "s_kv": 100_003}, {"s_kv": 1}]
    topks = [{"topk": 1}, {"topk": 33}]
    yield "sparse_mla", [mla_arguments(16, **size) for size in sizes + topks]
    yield "sparse_gqa", [gqa_arguments(24, 2, 128, per_head=True, **size) for size in sizes + topks]
    yield "index_logits", [index_arguments(64, **size) for size in sizes]
    pages = [{"s_kv": 64}, {"s_kv": 6400}, {"s_q": 3, "s_kv": 64 * 333}]
    yield (
        "index_logits",
        [index_arguments(64, **size, paged_rows=n) for size, n in zip(pages, (1, 2, 3), strict=True)],
    )
    yield "merge_attention", [merge_arguments(n, s_q) for n, s_q in ((1, 64), (4, 1), (7, 33))]


@pytest.mark.parametrize(
    "op, launches", list(different_sizes()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_sizes_do_not_recompile(compiled, op, launches):
    assert len({id(compiled(80, op, arguments)) for arguments in launches}) == 1
