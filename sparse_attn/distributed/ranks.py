"""The processes of a mesh: their collectives, and how a failure of one ends the call of all."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

LOOK = timedelta(seconds=1)  # how long to wait for the others between two looks at what they reported
PATIENCE = 10.0  # seconds; for others to report that the same call failed on them too
MESSAGE_BYTES = 2000


class EndedError(RuntimeError):
    """Another process failed or was lost, so that this one cannot go on."""


class Calls:
    """The calls that all processes of a mesh make together, in the same order.

    A process that fails reports it in the store of torch.distributed. The others find it there while they
    wait for a collective. Without a failure nothing is exchanged.
    """

    def __init__(self, processes: tuple[int, ...], store) -> None:
        self.processes = processes
        self.store = store
        self.number = 0
        self.running = False
        self.exchanged = False  # whether the present call has reached a collective
        self.ended = ""  # why no call is possible any more

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Around a call: an exception within it ends the call on all processes, with its message.

        If all of them fail before any collective, as on the same wrong argument, the next call is possible.
        Otherwise their collectives no longer match, and every later call is refused.
        """
        if self.ended:
            raise EndedError(self.ended)
        self.number += 1
        self.running, self.exchanged = True, False
        try:
            yield
        except BaseException as error:
            self._report(error)
            raise
        finally:
            self.running = False

    def reported(self) -> str:
        """What another process reported of the call that runs; empty if nothing."""
        try:
            key = self._key("message")
            return self.store.get(key).decode() if self.running and self.store.check([key]) else ""
        except RuntimeError:  # the store was lost with the process that kept it
            return ""

    def _report(self, error: BaseException) -> None:
        message = str(error)
        if not isinstance(error, EndedError):
            message = f"rank {dist.get_rank()} failed with {type(error).__name__}: {error}"[:MESSAGE_BYTES]
        with contextlib.suppress(RuntimeError):  # as above
            if not self.store.check([self._key("message")]):
                self.store.set(self._key("message"), message)
            if not self.exchanged and self._all_failed():
                return
            self.store.set(self._key("ended"), "")
        self.ended = message

    def _all_failed(self) -> bool:
        """Whether all failed at this call before any collective; waits until that is known."""
        until = time.monotonic() + PATIENCE
        self.store.add(self._key("failed"), 1)
        while time.monotonic() < until and not self.store.check([self._key("ended")]):
            if self.store.add(self._key("failed"), 0) == len(self.processes):
                return True
            time.sleep(0.01)
        return False

    def _key(self, what: str) -> str:
        return f"sparse_attn/{self.processes}/{self.number}/{what}"


_calls: dict[tuple[int, ...], Calls] = {}


def calls_of(mesh: DeviceMesh) -> Calls:
    """One for each set of processes, however many meshes and layers there are."""
    processes = tuple(sorted(mesh.mesh.flatten().tolist()))
    store = dist.distributed_c10d._get_default_store()  # torch has no public name for it
    if processes not in _calls or _calls[processes].store is not store:  # torch.distributed began anew
        _calls[processes] = Calls(processes, store)
    return _calls[processes]


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The processes that share something, and their collectives.

    Attributes:
        rank, size: of this process among them, and how many they are.
        group: theirs in torch.distributed. An engine that has collectives of its own leaves it out, and uses
            :class:`~sparse_attn.distributed.Shards` for its arithmetic.
        calls: of the mesh that they belong to.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    calls: Calls | None = None

    @classmethod
    def of(cls, mesh: DeviceMesh, dim: str | None = None) -> "Ranks":
        """Those along one dimension of a mesh, which has only one if it is not named."""
        size = mesh.size() if dim is None else mesh[dim].size()
        return cls(mesh.get_local_rank(dim), size, mesh.get_group(dim), calls_of(mesh))

    def gather(self, x: Tensor) -> Tensor:
        """``[size, ...]``: x of every rank."""
        if self.size == 1:
            return x[None]
        x = x.contiguous()
        every = x.new_empty(self.size * x.shape[0], *x.shape[1:])
        self._run(_all_gather(), _plain(every), _plain(x))
        return every.unflatten(0, (self.size, x.shape[0]))

    def exchange(self, x: Tensor) -> Tensor:
        """Rank r's ``x[s]`` becomes rank s's ``result[r]``."""
        if self.size == 1:
            return x
        x = x.contiguous()
        result = torch.empty_like(x)
        self._run(dist.all_to_all_single, _plain(result), _plain(x))
        return result

    def sum(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x, in place."""
        if self.size > 1:
            self._run(dist.all_reduce, x)
        return x

    def _run(self, collective, *tensors: Tensor) -> None:
        calls, group = self.calls, self.group
        if calls is None or group is None:
            raise RuntimeError("group: expected a process group of torch.distributed, got None")
        calls.exchanged = True
        try:
            if tensors[0].device.type != "cpu":  # nothing waits on the host
                collective(*tensors, group=group)
                return
            work = collective(*tensors, group=group, async_op=True)
            while not self._finished(work):
                if message := calls.reported():
                    raise EndedError(message)
        except EndedError:
            raise
        except RuntimeError as error:
            lost = f"a rank of {self.size} ended, or did not answer within torch.distributed's time limit"
            raise EndedError(calls.reported() or f"{lost}: {error}") from error

    @staticmethod
    def _finished(work: dist.Work) -> bool:
        """Wait for a while; raises if the collective failed."""
        try:
            return work.wait(LOOK)
        except RuntimeError:
            if work.is_completed():  # so it failed itself
                raise
            return False


def _all_gather():
    """By the name that it has in this release of torch."""
    return getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def _plain(x: Tensor) -> Tensor:
    """The same bytes in a dtype that every backend of torch.distributed moves."""
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x
