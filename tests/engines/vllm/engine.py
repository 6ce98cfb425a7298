"""vLLM as the tests run it: an engine in this process, or in a process of its own with workers.

python engine.py < request.json > answers.json
"""

import contextlib
import gc
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

SETTINGS = {  # read by vLLM when it is imported, or when it makes an engine
    **{"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_HOST_IP": "127.0.0.1"},
    **{"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_CPU_CI_ENV": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
}
os.environ.update(SETTINGS)

NEW_TOKENS = 24
DEFAULTS = {
    **{"dtype": "float32", "enforce_eager": True, "max_model_len": 512, "max_num_seqs": 8, "seed": 0},
    **{"kv_cache_memory_bytes": 64 << 20, "enable_prefix_caching": False, "disable_log_stats": False},
}


@dataclass
class Answer:
    prompt: list[int]
    tokens: list[int]
    log_probs: list[float]  # of each token but the first, or of the new ones alone
    cached: int  # tokens of the prompt that were not computed


@dataclass
class Run:
    answers: list[Answer]
    counters: dict[str, float]  # of all requests, by vLLM's names


def run(folder: Path, prompts: list[list[int]], repeats: int = 1, **options) -> Run:
    """Greedy answers to all prompts at once; with repeats the whole batch again, and the last answers."""
    from vllm import LLM, SamplingParams
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    options = DEFAULTS | options
    caching = options["enable_prefix_caching"]  # log-probabilities of a prompt cannot come from a cache
    sampling = SamplingParams(
        temperature=0,
        max_tokens=NEW_TOKENS,
        ignore_eos=True,
        logprobs=0,
        prompt_logprobs=None if caching else 0,
    )
    llm = LLM(str(folder), **options)
    try:
        for _ in range(repeats):
            given = [{"prompt_token_ids": prompt} for prompt in prompts]
            results = llm.generate(given, sampling, use_tqdm=False)
        metrics = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()
    return Run([_answer(result) for result in results], metrics)


def run_apart(folder: Path, prompts: list[list[int]], **options) -> Run:
    """The same in a process of its own, which starts a worker for each part of the model."""
    request = json.dumps({"folder": str(folder), "prompts": prompts, "options": options})
    threads = "|".join(str(i) for i in range(options.get("tensor_parallel_size", 1)))
    here = str(Path(__file__).parent)
    environment = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_CPU_OMP_THREADS_BIND": threads,
        "PYTHONPATH": os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")])),
    }
    command = [sys.executable, __file__]
    done = subprocess.run(
        command, input=request, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    said = json.loads(done.stdout.splitlines()[-1])
    return Run([Answer(**answer) for answer in said["answers"]], said["counters"])


def _answer(result) -> Answer:
    completion = result.outputs[0]
    prompt, tokens = list(result.prompt_token_ids), list(completion.token_ids)
    of_prompt = (
        [] if result.prompt_logprobs is None else zip(result.prompt_logprobs[1:], prompt[1:], strict=True)
    )
    of_tokens = zip(completion.logprobs, tokens, strict=True)
    log_probs = [found[token].logprob for found, token in (*of_prompt, *of_tokens)]
    return Answer(prompt, tokens, log_probs, result.num_cached_tokens or 0)


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    with contextlib.redirect_stdout(sys.stderr):
        found = run(Path(asked["folder"]), asked["prompts"], **asked["options"])
    print(json.dumps(asdict(found)))
