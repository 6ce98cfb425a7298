"""What torchrun starts: tiny models divided by transformers' own plans, before and after enable().

    torchrun --nproc-per-node 2 tests/hf/parallel.py FOLDER [KIND ...]

Each rank compares with the whole model, which it makes itself. Rank 0 prints a line of JSON for each kind.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tiny import KINDS, VOCABULARY, assert_same, generate, layers, logits, make, sa, transformers
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from sparse_attn.checkpoint import dequantize_blocks

# The plan of glm5_next divides the output projections of linear attention, whose inputs it leaves whole.
WITHOUT_LINEAR = {kind: {"layer_types": ["indexed_attention"] * 3} for kind in ("glm5", "glm5-shared")}


def main(folder: Path, kinds: list[str]) -> None:
    dist.init_process_group("gloo")
    transformers.logging.set_verbosity_error()
    torch.manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (2, 70))
    for kind in kinds:
        whole = make(kind, **WITHOUT_LINEAR.get(kind, {}))
        if dist.get_rank() == 0:
            whole.save_pretrained(folder / kind)
        dist.barrier()
        divided = load(whole, folder / kind)
        expected = whole(ids).logits
        try:
            own = divided(ids).logits
        except Exception as error:  # whatever it is: then transformers cannot do it
            say(kind, transformers=f"{type(error).__name__}: {error}")
            continue
        assert (own - expected).abs().max() <= 1e-5
        sa.enable(divided)
        assert_same(divided(ids).logits, expected)
        cache = transformers.DynamicCache(config=divided.config)
        assert_same(logits(divided, ids, [60, 7, 1, 1, 1], cache), expected)
        assert torch.equal(generate(divided, ids), generate(whole, ids))
        say(
            kind,
            divided=sorted(n for n, p in layers(divided)[0].named_parameters() if isinstance(p, DTensor)),
        )
    block_scales(folder / "v32", ids)
    replicas(ids)
    dist.barrier()
    os._exit(0)  # torch's gloo sometimes aborts while it ends


def load(whole, folder: Path):
    options = {"dtype": torch.float32, "attn_implementation": "eager", "tp_plan": "auto"}
    return type(whole).from_pretrained(folder, **options).eval()


def say(kind: str, **what) -> None:
    if dist.get_rank() == 0:
        print(json.dumps({"kind": kind, **what}), flush=True)


def block_scales(folder: Path, ids) -> None:
    """kv_b_proj in fp8 with block scales, divided like its weight."""
    whole = make("v32")
    divided = load(whole, folder)
    for ours, exact in zip(layers(divided), layers(whole), strict=True):
        weight = exact.self_attn.kv_b_proj.weight
        torch.manual_seed(2)
        scale = torch.rand(len(weight) // 11, 5) * 1e-3 + 1e-3
        fp8 = (weight / dequantize_blocks(torch.ones_like(weight), scale, (11, 8))).to(torch.float8_e4m3fn)
        weight.copy_(dequantize_blocks(fp8, scale, (11, 8)))
        linear = ours.self_attn.kv_b_proj
        mesh, part = linear.weight.device_mesh, [Shard(0)]
        for name, tensor in (("weight", fp8), ("weight_scale_inv", scale)):
            mine = DTensor.from_local(tensor.chunk(dist.get_world_size())[dist.get_rank()], mesh, part)
            setattr(linear, name, torch.nn.Parameter(mine, requires_grad=False))
        linear.block_size = (11, 8)
    sa.enable(divided)
    assert_same(divided(ids).logits, whole(ids).logits)
    say("block scales")


def replicas(ids) -> None:
    """Data parallelism: each rank has its own sequences, and all weights or a part of them."""
    whole = make("glm-shared")
    expected = whole(ids).logits
    sa.enable(whole)
    mine = slice(dist.get_rank() % 2, dist.get_rank() % 2 + 1)
    assert_same(DistributedDataParallel(whole)(ids[mine]).logits, expected[mine])
    for layer in layers(whole):
        fully_shard(layer)
    fully_shard(whole)
    assert_same(whole(ids[mine]).logits, expected[mine])
    say("replicas")


if __name__ == "__main__":
    with torch.no_grad():
        main(Path(sys.argv[1]), sys.argv[2:] or [*KINDS])
