"""vLLM's OpenAI server in processes of its own, and the HTTP requests that the tests send to it."""

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import NamedTuple

import psutil

STARTS, STOPS, ANSWERS = 600, 30, 120  # seconds that a server and a request may take
ENVIRONMENT = {
    **{"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_HOST_IP": "127.0.0.1"},
    **{"VLLM_CPU_CI_ENV": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"},
}
LIBC = ctypes.CDLL(None)
IDLE = "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"


class Request(NamedTuple):
    prompt: list[int]
    new: int  # tokens
    closed_after: int | None = None  # events of the stream, where the client does not wait for the end


class Answer(NamedTuple):
    tokens: list[int]
    log_probs: list[float]


class Server:
    def __init__(self, model: Path, port: int, process: subprocess.Popen, log: Path):
        self.model, self.port, self.process, self.log = model, port, process, log

    def ask(self, request: Request) -> Answer | None:
        """The greedy continuation of a prompt; None where the client closes the connection before its end."""
        body = {
            **{"model": str(self.model), "prompt": request.prompt, "max_tokens": request.new},
            **{"temperature": 0, "ignore_eos": True, "logprobs": 1, "return_token_ids": True},
            "stream": request.closed_after is not None,
        }
        with closing(HTTPConnection("127.0.0.1", self.port, timeout=ANSWERS)) as connection:
            connection.request(
                "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
            )
            with connection.getresponse() as response:
                assert response.status == 200, response.read()
                if request.closed_after is not None:
                    for _ in range(2 * request.closed_after):  # an event is a line and an empty one
                        response.readline()
                    return None
                (choice,) = json.load(response)["choices"]
        answer = Answer(choice["token_ids"], choice["logprobs"]["token_logprobs"])
        assert choice["prompt_token_ids"] == request.prompt
        assert len(answer.tokens) == len(answer.log_probs) == request.new
        return answer

    def ask_all(self, requests: Sequence[Request], at_once: int, seconds: float) -> list[Answer | None]:
        """The answers in order; TimeoutError where they take longer than that."""
        pool = ThreadPoolExecutor(at_once)
        try:
            return list(pool.map(self.ask, requests, timeout=seconds))
        except TimeoutError:
            raise TimeoutError(
                f"{len(requests)} requests took more than {seconds} s; see {self.log}"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def metric(self, name: str, label: str = "") -> float:
        """The sum over all series of that name, or those with this label."""
        text = self._get("/metrics").decode()
        series = [line for line in text.splitlines() if line.startswith(name + "{") and label in line]
        assert series, f"the server has no metric {name}"
        return sum(float(line.rpartition(" ")[2]) for line in series)

    def wait_until_idle(self, seconds: float = 30) -> None:
        """Until no request runs or waits, and all pages of the cache are free."""
        deadline = time.monotonic() + seconds
        while any((left := {name: self.metric(name) for name in IDLE}).values()):
            assert time.monotonic() < deadline, f"{seconds} s after the last answer: {left}"
            time.sleep(0.2)

    def resident_bytes(self) -> int:
        """Of all processes of the server."""
        main = psutil.Process(self.process.pid)
        return sum(process.memory_info().rss for process in [main, *main.children(recursive=True)])

    def _get(self, path: str) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=ANSWERS) as response:
            return response.read()

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + STARTS
        while True:
            with suppress(OSError):
                self._get("/health")
                return
            ended = self.process.poll() is not None
            if ended or time.monotonic() > deadline:
                why = f"ended with {self.process.returncode}" if ended else f"not up after {STARTS} s"
                raise RuntimeError(f"server: {why}\n{self.log.read_text()[-4000:]}")
            time.sleep(0.5)


@contextmanager
def serve(model: Path, folder: Path, *options: str) -> Iterator[Server]:
    """A server that is up, with its log in ``folder``; at the end none of its processes is left."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager", *options]
    # vLLM divides by a rate that is zero under TQDM_DISABLE.
    environment = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    log = folder / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,  # -m puts it on the path, and in a checkout kernels/ would pass for another package
            env=environment | ENVIRONMENT,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a process group of its own
            preexec_fn=_end_with_parent,
        )
    server = Server(model, port, process, log)
    try:
        server._wait_until_up()
        yield server
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOPS)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _end_with_parent() -> None:
    """Linux ends the server where pytest itself is killed."""
    LIBC.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
