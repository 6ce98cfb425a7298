"""Ranks of torch.distributed on this machine, and the bytes and seconds of their collectives."""

import contextlib
import datetime
import os
import pickle
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

SECONDS = 100  # for a collective


def on_ranks(world: int, function: Callable[[], Any]) -> list[Any]:
    """What ``function`` returns on each of ``world`` ranks: forks of this process, over gloo.

    They have one thread each, share what this process has in memory, and need not import torch again.
    """
    torch.set_num_threads(1)  # before the first parallel region: OpenMP's threads do not survive a fork
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(world):
            pid = os.fork()
            if pid == 0:
                _be_a_rank(rank, world, Path(folder), function)
            ranks.append(pid)
        statuses = [os.waitpid(pid, 0)[1] for pid in ranks]
        if any(statuses):
            raise SystemExit(f"{sum(map(bool, statuses))} of {world} ranks failed; what they said is above")
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(world)]


def _be_a_rank(rank: int, world: int, folder: Path, function: Callable[[], Any]) -> None:
    failed = 1
    try:
        limit = datetime.timedelta(seconds=SECONDS)
        options = {"init_method": f"file://{folder}/store", "rank": rank, "world_size": world}
        dist.init_process_group("gloo", timeout=limit, **options)
        with torch.no_grad():
            result = function()
        (folder / str(rank)).write_bytes(pickle.dumps(result))
        dist.barrier()
        failed = 0
    except BaseException:
        sys.stderr.write(f"rank {rank} of {world}:\n{traceback.format_exc()}")
        sys.stderr.flush()
    os._exit(failed)  # torch's gloo sometimes aborts while it ends


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
