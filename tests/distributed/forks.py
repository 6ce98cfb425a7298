"""Ranks of torch.distributed as forks of one process, which has imported torch once for all of them."""

import datetime
import os
import signal
import sys
import traceback

import torch
import torch.distributed as dist

SECONDS = 60  # for a collective


def run(world: int, *functions) -> bool:
    """Call every function on each of ``world`` ranks, over gloo; whether all of them returned on all ranks."""
    torch.set_num_threads(1)  # before the first parallel region: OpenMP's threads do not survive a fork
    port = os.pipe()  # rank 0 tells the others; a store with its threads must not be there before a fork
    ranks = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            _be_a_rank(rank, world, port, functions)
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


def _be_a_rank(rank: int, world: int, port: tuple[int, int], functions) -> None:
    failed = 1
    try:
        if rank == 0:
            store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            os.write(port[1], store.port.to_bytes(8, "little") * (world - 1))
        else:
            store = dist.TCPStore("127.0.0.1", int.from_bytes(os.read(port[0], 8), "little"))
        limit = datetime.timedelta(seconds=SECONDS)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)
        with torch.no_grad():
            for function in functions:
                torch.manual_seed(0)
                function()
                dist.barrier()
        failed = 0
    except BaseException:
        sys.stderr.write(f"rank {rank} of {world}:\n{traceback.format_exc()}")
        sys.stderr.flush()
    os._exit(failed)  # torch's gloo sometimes aborts while it ends
