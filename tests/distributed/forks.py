"""Ranks of torch.distributed as forks of one process, which has imported torch once for all of them."""

import datetime
import os
import signal
import sys
import time
import traceback

import torch
import torch.distributed as dist


def run(world: int, *functions, seconds: float = 60) -> bool:
    """Call every function on each of ``world`` ranks, over gloo; whether all returned on all of them.

    A collective may take that many seconds.
    """
    torch.set_num_threads(1)  # before the first parallel region: OpenMP's threads do not survive a fork
    port = os.pipe()  # rank 0 tells the others; a store with its threads must not be there before a fork
    ranks = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            _be_a_rank(rank, world, port, functions, seconds)
        ranks.append(pid)
    passed = True
    while ranks:
        pid, status = os.wait()
        ranks.remove(pid)
        if status != 0 and passed:
            passed = False
            for other in ranks:
                os.kill(other, signal.SIGTERM)
    return passed


def _be_a_rank(rank: int, world: int, port: tuple[int, int], functions, seconds) -> None:
    failed = 1
    try:
        if rank == 0:
            store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            os.write(port[1], store.port.to_bytes(8, "little") * (world - 1))
        else:
            store = dist.TCPStore("127.0.0.1", int.from_bytes(os.read(port[0], 8), "little"))
        limit = datetime.timedelta(seconds=seconds)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)
        with torch.no_grad():
            for function in functions:
                torch.manual_seed(0)
                function()
                _wait_for_all(store, function.__name__, world)
        failed = 0
    except BaseException:
        sys.stderr.write(f"rank {rank} of {world}:\n{traceback.format_exc()}")
        sys.stderr.flush()
    os._exit(failed)  # torch's gloo sometimes aborts while it ends


def _wait_for_all(store: dist.Store, name: str, world: int) -> None:
    """A barrier that works where collectives no longer do. Rank 0 keeps the store, so it must leave last."""
    store.add(name, 1)
    until = time.monotonic() + 30
    while store.add(name, 0) < world:
        assert time.monotonic() < until, f"{name}: a rank does not come"
        time.sleep(0.005)
    if store.add(f"{name} seen", 1) and dist.get_rank() == 0:
        while store.add(f"{name} seen", 0) < world:
            time.sleep(0.005)
