"""One DeepSeek-V3.2-shaped layer inside Hugging Face transformers, before and after enable(model).

The layer has hidden size 1024, 16 heads, latents of 512 + 64, an indexer of 16 x 128 and k = 2048; it is
the only one of its model, whose MLP is 64 wide, so that a call of the model is little more than a call of the
layer with its masks, projections and cache. Timed are one new token after a context, and a whole prompt.
"""

import argparse
import copy
import dataclasses
from collections.abc import Callable

import torch
import transformers
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

import sparse_attn.integrations.transformers
from bench.command import parser, table
from bench.timing import Timing, append_json, cpu_clock, describe, peak_memory
from sparse_attn.testing import relative_error

SIZES = {
    **{"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": 512},
    **{"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128},
    **{"index_n_heads": 16, "index_head_dim": 128, "index_topk": 2048, "max_position_embeddings": 1 << 17},
    **{"num_hidden_layers": 1, "first_k_dense_replace": 1, "intermediate_size": 64, "vocab_size": 32},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Relative difference of the two results. Another order of summation can swap keys of nearly equal scores.
TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}
MODELS = ("transformers", "sparse_attn")


def main() -> None:
    command = parser(__doc__, rounds=3)
    command.add_argument("--contexts", type=int, nargs="*", default=[8192, 65536], help="of the decode steps")
    command.add_argument("--prefill", type=int, nargs="*", default=[8192], metavar="TOKENS", help="prompts")
    command.add_argument("--quick", action="store_true", help="a context of 8192, a prompt of 2048")
    command.add_argument("--dtype", choices=DTYPES, default="float32")
    command.add_argument("--cache", choices=("dynamic", "static"), default="dynamic", help="of decode steps")
    command.add_argument("--attention", choices=("sdpa", "eager"), default="sdpa", help="transformers' own")
    command.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    options = command.parse_args()
    if options.quick:
        options.contexts, options.prefill = [8192], [2048]
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    console = Console()
    with torch.inference_mode(), Progress(console=console, transient=True) as progress:
        models = make(DTYPES[options.dtype], options.attention)
        cases = [decode(models, n, options.cache, 2 + options.rounds) for n in options.contexts]
        cases += [prefill(models, n) for n in options.prefill]
        task = progress.add_task("layer", total=len(cases) * len(MODELS) * (1 + options.rounds))
        tolerance, advance = TOLERANCE[options.dtype], lambda: progress.advance(task)
        rows = [measure(*case, models, options.rounds, tolerance, advance) for case in cases]
    show(console, rows, options)
    settings = {name: getattr(options, name) for name in ("dtype", "cache", "attention")}
    append_json(options.json, "hugging_face", [{**settings, **row} for row in rows])


def make(dtype: torch.dtype, attention: str) -> dict[str, transformers.PreTrainedModel]:
    config = transformers.DeepseekV32Config(**SIZES)
    dense = transformers.DeepseekV32Model._from_config(
        config, dtype=torch.float32, attn_implementation=attention
    ).eval()
    for name, parameter in dense.named_parameters():
        if "self_attn" in name and parameter.dim() > 1:
            parameter.mul_(4)  # else every score is nearly the same
        if "indexer.weights_proj" not in name:  # loaded models have it in fp32, whatever their dtype
            parameter.data = parameter.data.to(dtype)
    sparse = copy.deepcopy(dense)
    sparse_attn.integrations.transformers.enable(sparse)
    return dict(zip(MODELS, (dense, sparse), strict=True))


Case = tuple[str, dict[str, Callable[[], Tensor]]]


def decode(models, context: int, cache: str, calls: int) -> Case:
    """One token after a context of random latents; each call appends one to its model's cache."""
    functions = {}
    dtype = next(iter(models.values())).dtype
    latent, k_rope = (torch.randn(1, 1, context, d, dtype=dtype) for d in (512, 64))
    index_k, hidden = torch.randn(1, context, 128, dtype=dtype), torch.randn(1, 1, 1024, dtype=dtype)
    for name, model in models.items():
        if cache == "static":
            held = transformers.StaticCache(model.config, context + calls)
        else:
            held = transformers.DynamicCache(config=model.config)
        held.update(latent, k_rope, 0)
        held.update_indexer(index_k, 0)
        functions[name] = lambda model=model, held=held: (
            model(inputs_embeds=hidden, past_key_values=held).last_hidden_state
        )
    return f"decode at {context:,}", functions


def prefill(models, tokens: int) -> Case:
    hidden = torch.randn(1, tokens, 1024, dtype=next(iter(models.values())).dtype)
    return f"prefill of {tokens:,}", {
        name: lambda model=model: model(inputs_embeds=hidden, use_cache=False).last_hidden_state
        for name, model in models.items()
    }


def measure(label: str, functions, models, rounds: int, tolerance: float, advance) -> dict:
    """Compare the layers' outputs and measure the memory of these first calls, then time.

    There is no other warm-up, since transformers' calls take many seconds."""
    outs, memory = {}, {}
    for name, function in functions.items():
        attention = models[name].layers[0].self_attn
        hook = attention.register_forward_hook(lambda _, args, out, name=name: outs.update({name: out[0]}))
        memory[name] = peak_memory(function)
        hook.remove()
        advance()
    error = relative_error(outs["sparse_attn"], outs["transformers"])
    if error > tolerance:
        raise SystemExit(f"{label}: the results differ by {error:.1e}, expected {tolerance:.1e} at most")
    outs.clear()
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            samples[name].append(cpu_clock(function, 1))
            advance()
    return {
        "case": label,
        "difference": error,
        **{f"{name}_seconds": dataclasses.asdict(Timing.of(samples[name])) for name in functions},
        **{f"{name}_extra_bytes": memory[name] for name in functions},
    }


def show(console: Console, rows: list[dict], options: argparse.Namespace) -> None:
    console.print(
        f"A layer inside transformers {transformers.__version__}, {options.dtype}: its own attention "
        f"({options.attention}) and sparse_attn's, {options.cache} cache, medians of {options.rounds} "
        "interleaved rounds"
    )
    cells = []
    for row in rows:
        seconds = [row[f"{name}_seconds"]["median"] for name in MODELS]
        memory = [row[f"{name}_extra_bytes"] for name in MODELS]
        cells.append([row["case"], *(f"{1e3 * s:,.1f}" for s in seconds), f"{seconds[0] / seconds[1]:.1f}"])
        cells[-1] += ["-" if m is None else f"{m / 2**20:,.0f}" for m in memory]
        cells[-1].append(f"{row['difference']:.0e}")
    headings = "", "own ms", "ours ms", "times", "own MiB", "ours MiB", "differ"
    console.print(table(headings, cells, caption=describe()))
    console.print("MiB: peak of the first call above its start; differ: the outputs' relative difference.")


if __name__ == "__main__":
    main()
