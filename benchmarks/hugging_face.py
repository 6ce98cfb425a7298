"""An attention layer of each family of Hugging Face transformers with an indexer, before and after enable().

The layer has hidden size 1024 and 16 heads, and the family's sizes else (benchmarks/bench/families.py). Timed
is its forward, with projections, indexer and cache, in calls of a model that has no other: for one new token
after a context, and for a whole prompt. Memory is that of a call of the model, which makes the mask. Both
sides are compared first.
"""

import argparse
import copy
import dataclasses
import functools
import inspect
import time
from collections.abc import Callable, Iterator

import torch
import transformers
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from bench import families
from bench.command import parser, table
from bench.timing import Timing, append_json, describe, peak_memory
from sparse_attn.testing import relative_error

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Relative difference of the two results. Another order of summation can swap keys of nearly equal scores.
TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}
MODELS = ("transformers", "sparse_attn")
CHUNK = 2048  # of the prompts that fill caches


def main() -> None:
    command = parser(__doc__, rounds=3)
    names = families.names()
    command.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(names)}; default all")
    command.add_argument("--contexts", type=int, nargs="*", default=[16384], help="of the decode steps")
    command.add_argument("--prefill", type=int, nargs="*", default=[8192], metavar="TOKENS", help="prompts")
    command.add_argument("--quick", action="store_true", help="a context of 4096, a prompt of 1024")
    command.add_argument("--dtype", choices=DTYPES, default="float32")
    command.add_argument("--cache", choices=("dynamic", "static"), default="dynamic", help="of decode steps")
    command.add_argument(
        "--attention", choices=("sdpa", "eager"), default="sdpa", help="transformers' own, where it has it"
    )
    command.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    options = command.parse_args()
    if unknown := {*options.families} - {*names}:
        command.error(f"FAMILY: expected {', '.join(names)}, got {', '.join(sorted(unknown))}")
    if options.quick:
        options.contexts, options.prefill = [4096], [1024]
    torch.set_num_threads(options.threads)
    chosen, console, rows = options.families or names, Console(), []
    settings = {name: getattr(options, name) for name in ("dtype", "cache", "attention")}
    with torch.inference_mode(), Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=len(chosen) * (len(options.contexts) + len(options.prefill)))
        for family in chosen:
            for label, functions, rounds in cases(family, options):
                progress.update(task, description=f"{family}: {label}")
                row = {"family": family, "case": label, **measure(functions, rounds, options.dtype)}
                append_json(options.json, "hugging_face", [{**settings, **row}])
                rows.append(row)
                progress.advance(task)
    show(console, rows, options)


Functions = dict[str, Callable[[], tuple[Tensor, float]]]


def cases(family: str, options: argparse.Namespace) -> Iterator[tuple[str, Functions, int]]:
    """What is measured, its label, and how often: a prompt takes seconds, so that once is enough."""
    dtype = DTYPES[options.dtype]
    models = dict(zip(MODELS, families.pair(family, dtype, options.attention), strict=True))
    for context in options.contexts:
        caches = filled(models, context, options)
        token = torch.randn(1, 1, 1024, dtype=dtype)
        yield f"decode at {context:,}", calls(models, token, caches), options.rounds
    for tokens in options.prefill:
        prompt = torch.randn(1, tokens, 1024, dtype=dtype)
        yield f"prefill of {tokens:,}", calls(models, prompt), 0


def calls(models: dict, embeddings: Tensor, caches: dict | None = None) -> Functions:
    functions = {}
    for name, model in models.items():
        options = {"use_cache": False} if caches is None else {cache_name(model): caches[name]}
        functions[name] = functools.partial(call, model, inputs_embeds=embeddings, **options)
    return functions


def call(model: transformers.PreTrainedModel, **inputs) -> tuple[Tensor, float]:
    """What a model returns, and the seconds that its attention layer took; of one thread, in CPU time."""
    now = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    layer, moments = model.layers[0].self_attn, []
    add = (layer.register_forward_pre_hook, layer.register_forward_hook)
    hooks = [add_hook(lambda *_: moments.append(now())) for add_hook in add]
    out = model(**inputs).last_hidden_state
    for hook in hooks:
        hook.remove()
    start, end = moments
    return out, end - start


def cache_name(model: transformers.PreTrainedModel) -> str:
    """The argument's name: another one from transformers 5.24 on."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def filled(models: dict, context: int, options: argparse.Namespace) -> dict:
    """A cache for each model, with the same tokens; each call of a decode step appends one to its own."""
    config = models["sparse_attn"].config
    if options.cache == "static":
        cache = transformers.StaticCache(config, context + 2 + options.rounds)
    else:
        cache = transformers.DynamicCache(config=config)
    for start in range(0, context, CHUNK):
        prompt = torch.randn(1, min(CHUNK, context - start), 1024, dtype=DTYPES[options.dtype])
        models["sparse_attn"](inputs_embeds=prompt, **{cache_name(models["sparse_attn"]): cache})
    return {"transformers": copy.deepcopy(cache), "sparse_attn": cache}


def measure(functions: Functions, rounds: int, dtype: str) -> dict:
    """Compare the outputs and measure the memory of the first calls, and time further ones, or those."""
    outs: dict[str, Tensor] = {}
    memory: dict[str, int | None] = {}
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for name, function in functions.items():

        def first(name=name, function=function) -> None:
            outs[name], seconds = function()
            samples[name].append(seconds)

        memory[name] = peak_memory(first)
    error = relative_error(outs["sparse_attn"], outs["transformers"])
    if error > TOLERANCE[dtype]:
        raise SystemExit(f"the results differ by {error:.1e}, expected {TOLERANCE[dtype]:.1e} at most")
    outs.clear()
    for number in range(rounds):
        for name, function in functions.items():
            samples[name] = samples[name] * (number > 0) + [function()[1]]
    return {
        "difference": error,
        **{f"{name}_seconds": dataclasses.asdict(Timing.of(samples[name])) for name in functions},
        **{f"{name}_extra_bytes": memory[name] for name in functions},
    }


def show(console: Console, rows: list[dict], options: argparse.Namespace) -> None:
    console.print(
        f"An attention layer inside transformers {transformers.__version__}, {options.dtype}: its own "
        f"({options.attention}, or eager where it has no other) and with sparse_attn, {options.cache} cache, "
        f"medians of {options.rounds} interleaved rounds, prompts once"
    )
    cells = []
    for row in rows:
        seconds = [row[f"{name}_seconds"]["median"] for name in MODELS]
        memory = [row[f"{name}_extra_bytes"] for name in MODELS]
        cells.append([row["family"], row["case"], *(f"{1e3 * s:,.1f}" for s in seconds)])
        cells[-1].append(f"{seconds[0] / seconds[1]:.1f}")
        cells[-1] += ["-" if m is None else f"{m / 2**20:,.0f}" for m in memory]
        cells[-1].append(f"{row['difference']:.0e}")
    headings = "", "", "own ms", "ours ms", "times", "own MiB", "ours MiB", "differ"
    console.print(table(headings, cells, words=2, caption=describe()))
    console.print("MiB: peak of the first call above its start; differ: the outputs' relative difference.")


if __name__ == "__main__":
    main()
