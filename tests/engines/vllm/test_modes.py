"""Every way that vLLM runs a DSA model: log-probabilities and greedy tokens are those of transformers.

Prompts are random tokens, from shorter than the top-k to seven times longer. Only those are compared whose
selections survive the noise of fp32 sums (teacher.py says why).
"""

import random

import pytest

pytest.importorskip("vllm", reason="make test-engines runs these in an environment with vLLM")

import torch
from checkpoints import TOPK, add_mtp_layer, make
from engine import NEW_TOKENS, run, run_apart
from mutations import IN_PROCESS
from teacher import Teacher
from torch._dynamo.utils import counters

BAR = 1e-5  # of log-probabilities in fp32
LENGTHS = 1, 7, 31, 64, 90, 100, 130, 160, 200
LONGER_THAN_TOPK = 4  # as many of the prompts that are compared, at least
PARALLEL = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}


def deviations(teacher, answers) -> torch.Tensor:
    """Of every log-probability of every answer."""
    found = []
    for answer in answers:
        got = torch.tensor(answer.log_probs, dtype=torch.float64)
        found.append((got - log_probs_of(teacher, answer)[-len(got) :]).abs())
    return torch.cat(found)


def log_probs_of(teacher, answer) -> torch.Tensor:
    """What the teacher gives to each token but the first."""
    ids = answer.prompt + answer.tokens
    return teacher.log_probs(ids)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def spread(errors: torch.Tensor) -> torch.Tensor:
    """The median, and what nine of ten stay below."""
    return errors.quantile(torch.tensor([0.5, 0.9], dtype=errors.dtype))


class Task:
    """A model, prompts that can be compared, and the comparison of an engine's answers with the teacher."""

    def __init__(self, folder, teacher):
        self.folder, self.teacher = folder, teacher
        draw = random.Random(1)
        pool = [[draw.randrange(256) for _ in range(n)] for _ in range(6) for n in LENGTHS]
        answers = run(folder, pool).answers
        self.prompts, self.tokens = [], {}
        for answer in answers:
            long = len(answer.prompt) > TOPK and self.count_long() < LONGER_THAN_TOPK + 2
            if (long or len(self.prompts) < 3) and teacher.is_robust(answer.prompt + answer.tokens):
                self.prompts.append(answer.prompt)
                self.tokens[tuple(answer.prompt)] = answer.tokens
        assert self.count_long() >= LONGER_THAN_TOPK

    def count_long(self) -> int:
        return sum(len(prompt) > TOPK for prompt in self.prompts)

    def errors(self, answers) -> tuple[float, int]:
        """The largest error of a log-probability, and how many tokens are not the teacher's."""
        others = 0
        for answer in answers:
            best = self.teacher.log_probs(answer.prompt + answer.tokens)[:-1].argmax(-1)
            others += int((best[-len(answer.tokens) :] != torch.tensor(answer.tokens)).sum())
        return deviations(self.teacher, answers).max().item(), others

    def check(self, found) -> None:
        """That these are the answers to all prompts, with the teacher's tokens and log-probabilities."""
        assert [answer.prompt for answer in found.answers] == self.prompts
        assert all(len(answer.tokens) == NEW_TOKENS for answer in found.answers)
        worst, others = self.errors(found.answers)
        assert worst <= BAR and others == 0, (worst, others)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def v32(folder):
    path = make("v32", folder)
    return Task(path, Teacher(path))


@pytest.fixture(scope="module")
def mtp(folder, v32):
    return add_mtp_layer(v32.folder, folder / "mtp")


def test_default(v32):
    v32.check(run(v32.folder, v32.prompts))


def test_glm(folder):
    path = make("glm", folder)
    task = Task(path, Teacher(path))
    task.check(run(path, task.prompts))


@pytest.mark.parametrize("tokens", [1, 48])
def test_chunked_prefill(v32, tokens):
    """48 tokens: prompts in pieces beside other prompts' last pieces and decoding ones; 1: one at a time."""
    prompts = v32.prompts if tokens > 1 else v32.prompts[:2]
    seats = {} if tokens > 1 else {"max_num_seqs": 1}
    found = run(v32.folder, prompts, max_num_batched_tokens=tokens, **seats)
    worst, others = v32.errors(found.answers)
    assert worst <= BAR and others == 0, (worst, others)


@pytest.mark.parametrize("page_size", [16, 64])
def test_prefix_caching(v32, page_size):
    found = run(v32.folder, v32.prompts, 2, enable_prefix_caching=True, block_size=page_size)
    v32.check(found)
    for answer in found.answers:
        assert answer.cached == (len(answer.prompt) - 1) // page_size * page_size


def test_pages_run_out(v32):
    """With room for one long sequence the engine preempts requests and computes them again."""
    found = run(v32.folder, v32.prompts, block_size=16, num_gpu_blocks_override=20, max_model_len=256)
    v32.check(found)
    assert found.counters["vllm:num_preemptions"] > 0


def test_fp8_latents(v32):
    """656 bytes per token: a latent near the edge of two e4m3 values may become either, the rest is equal."""
    answers = run(v32.folder, v32.prompts, kv_cache_dtype="fp8").answers
    rounded = Teacher(v32.folder, fp8_latents=True)
    assert (spread(deviations(rounded, answers)) < torch.tensor([3e-4, 3e-3])).all()
    assert (spread(deviations(v32.teacher, answers)) > torch.tensor([1e-2, 1e-1])).all()


@pytest.mark.parametrize("latents", ["auto", "fp8_ds_mla"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(v32, dtype, latents):
    """In 16 bits selections differ, in transformers too: an engine may deviate as much as that does."""
    answers = run(v32.folder, v32.prompts, dtype=dtype, kv_cache_dtype=latents).answers
    fp8 = latents == "fp8_ds_mla"
    exact, halved = Teacher(v32.folder, fp8), Teacher(v32.folder, fp8)
    halved.model.to(getattr(torch, dtype))
    allowed = [(log_probs_of(exact, answer) - log_probs_of(halved, answer)).abs() for answer in answers]
    assert (spread(deviations(exact, answers)) <= 1.5 * spread(torch.cat(allowed))).all()


def test_inductor(v32, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_CI_ENV", "0")  # with it vLLM traces the model and does not compile it
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "0")  # its default, which leaves out torch.compile
    counters.clear()
    v32.check(run(v32.folder, v32.prompts, enforce_eager=False))
    assert counters["stats"]["calls_captured"] > 100  # of the whole model, in one graph
    assert not counters["graph_break"]


def draft(tokens):
    return {"speculative_config": {"method": "mtp", "num_speculative_tokens": tokens}}


def accepted_drafts(task) -> int:
    """How many drafts the model confirms, one after each token that it makes, by the teacher."""
    accepted = 0
    for prompt in task.prompts:
        ids = prompt + task.tokens[tuple(prompt)]
        drafts = task.teacher.drafts(ids)
        newest = len(prompt)
        while newest < len(ids) - 1:
            right = drafts[newest - 1] == ids[newest + 1]
            accepted += right
            newest += 1 + right
    return accepted


def test_mtp(v32, mtp):
    found = run(mtp, v32.prompts, **draft(1))
    v32.check(found)
    assert found.counters["vllm:spec_decode_num_accepted_tokens"] == accepted_drafts(v32) > 0


def test_mtp_with_three_drafts_in_chunks(v32, mtp):
    found = run(mtp, v32.prompts, **draft(3), max_num_batched_tokens=48)
    v32.check(found)
    assert found.counters["vllm:spec_decode_num_accepted_tokens"] > 0


def test_two_workers(v32):
    v32.check(run_apart(v32.folder, v32.prompts, **PARALLEL))


@pytest.mark.parametrize("interleave", [1, 16])
def test_two_workers_share_the_keys(v32, interleave):
    sharing = {"decode_context_parallel_size": 2, "cp_kv_cache_interleave_size": interleave}
    v32.check(run_apart(v32.folder, v32.prompts, **PARALLEL, **sharing, block_size=16))


def test_a_local_selection_of_shared_keys_is_caught(v32):
    sharing = {"decode_context_parallel_size": 2, "worker_extension_cls": "local_topk.LocalTopk"}
    worst, _ = v32.errors(run_apart(v32.folder, v32.prompts, **PARALLEL, **sharing).answers)
    assert worst > 100 * BAR


@pytest.mark.parametrize("mutation", IN_PROCESS, ids=lambda mutation: mutation.__name__)
def test_mutations_are_caught(v32, mutation, monkeypatch):
    mutation(monkeypatch)
    worst, _ = v32.errors(run(v32.folder, v32.prompts).answers)
    assert worst > 100 * BAR
