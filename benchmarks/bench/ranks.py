"""Ranks of torch.distributed on this machine, and the bytes and seconds of their collectives."""

import contextlib
import datetime
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sparse_attn.distributed.ranks import Ranks


def on_ranks(world: int, function: Callable[[], Any], seconds: float = 100) -> list[Any]:
    """What ``function`` returns on each of ``world`` ranks: forks of this process, over gloo.

    They have one thread each, share what this process has in memory, and need not import torch again. A
    collective may take ``seconds``. A rank that ends by itself, without an error, gives None.
    """
    torch.set_num_threads(1)  # before the first parallel region: OpenMP's threads do not survive a fork
    port, end = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory() as folder:
        results = [Path(folder) / str(rank) for rank in range(world)]
        ranks = {}
        for rank, result in enumerate(results):
            pid = os.fork()
            if pid == 0:
                os.close(end[1])
                _be_a_rank(rank, world, port, function, seconds, result)
                os.read(end[0], 1)  # until the others have a result: they may read what this one sent
                os._exit(0)  # torch's gloo sometimes aborts while it ends
            ranks[pid] = result
        while not all(result.exists() for result in ranks.values()):
            pid, status = os.waitpid(-1, os.WNOHANG)
            if status:
                for other in ranks.keys() - {pid}:
                    os.kill(other, signal.SIGKILL)
                    os.waitpid(other, 0)
                raise SystemExit(f"one of {world} ranks failed; what it said is above")
            ranks.pop(pid, None)
            time.sleep(0.005)
        os.close(end[1])
        for pid in ranks:
            os.waitpid(pid, 0)
        for descriptor in (*port, end[0]):
            os.close(descriptor)
        return [pickle.loads(result.read_bytes()) if result.exists() else None for result in results]


def _be_a_rank(
    rank: int, world: int, port: tuple[int, int], function: Callable[[], Any], seconds: float, result: Path
) -> None:
    try:
        if rank == 0:  # the store has threads, so that it must not be there before the forks
            store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            os.write(port[1], store.port.to_bytes(8, "little") * (world - 1))
        else:
            store = dist.TCPStore("127.0.0.1", int.from_bytes(os.read(port[0], 8), "little"))
        limit = datetime.timedelta(seconds=seconds)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)
        with torch.no_grad():
            made = pickle.dumps(function())
        written = result.with_suffix(".part")
        written.write_bytes(made)
        written.rename(result)
    except BaseException:
        sys.stderr.write(f"rank {rank} of {world}:\n{traceback.format_exc()}")
        sys.stderr.flush()
        os._exit(1)


class Traffic:
    """Of the collectives that a rank took part in: bytes received by part of the layer, and seconds.

    The seconds include waiting for slower ranks. A sum is counted as a ring sends it, twice the tensor's
    bytes but this rank's share of them: gloo and NCCL do not say what they received.
    """

    def __init__(self) -> None:
        self.part = "output"
        self.received: Counter[str] = Counter()
        self.seconds = 0.0

    @contextlib.contextmanager
    def of(self, part: str) -> Iterator[None]:
        before, self.part = self.part, part
        yield
        self.part = before


@contextlib.contextmanager
def counted() -> Iterator[Traffic]:
    """Count what all collectives of this process receive within the context."""
    traffic, methods = Traffic(), {name: getattr(Ranks, name) for name in RECEIVED}

    def counting(name: str):
        def collective(ranks: Ranks, x: torch.Tensor) -> torch.Tensor:
            start = time.perf_counter()
            result = methods[name](ranks, x)
            traffic.seconds += time.perf_counter() - start
            traffic.received[traffic.part] += RECEIVED[name](result.nbytes, ranks.size)
            return result

        return collective

    for name in methods:
        setattr(Ranks, name, counting(name))
    try:
        yield traffic
    finally:
        for name, method in methods.items():
            setattr(Ranks, name, method)


# Bytes received from others, of the bytes of the result on ``size`` ranks.
RECEIVED: dict[str, Callable[[int, int], int]] = {
    "gather": lambda result, size: result // size * (size - 1),
    "exchange": lambda result, size: result // size * (size - 1),
    "sum": lambda result, size: 2 * result * (size - 1) // size,
}
