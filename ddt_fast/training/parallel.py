"""Several processes, and the precision they compute in, through torch.distributed."""

from __future__ import annotations

import copy
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from ddt_fast.model.fused import FusedDDT
from ddt_fast.training.trained import TrainedDDT


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """The processes that torchrun started, or this one alone; a group that exists already is left as it is."""
    if dist.is_initialized():
        yield
        return
    backend, own = "gloo", None
    if device.type == "cuda":
        # Checkpoints are written from the CPU while the GPUs go on: both need a way to talk.
        backend, own = "cpu:gloo,cuda:nccl", torch.device("cuda", device.index or 0)
        # FSDP puts its shards on the current GPU, which is the first one in every process until it is told otherwise.
        torch.cuda.set_device(own)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, device_id=own)
    else:
        dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore(), device_id=own)
    try:
        yield
    finally:
        dist.destroy_process_group()


def patient_group() -> dist.ProcessGroup:
    """All processes, over gloo, waiting for each other however long one takes: a collective of GPUs ends the run when
    one process comes 10 minutes after another."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=7))


class Replica:
    """Master weights in float32, and a module that computes their gradients in `dtype`, alone or with other processes.

    With "ddp" and bfloat16 the module is a bfloat16 copy whose gradients are averaged in float32 and moved to the
    masters after every backward pass; in float32 it is the masters themselves. With "fsdp" (FSDP2) parameters,
    gradients and whatever is derived from them are sharded, and PyTorch gathers each block in `dtype` as it comes.

    Attributes:
        masters: float32 parameters, to be optimised, averaged and saved.
        compute: what to call; its backward pass must be followed by `collect`.
    """

    def __init__(self, masters: TrainedDDT, dtype: torch.dtype, parallel: str, compile: bool) -> None:
        device = next(masters.parameters()).device
        self.masters = masters
        masters.dtype = dtype
        world_size = dist.get_world_size()
        self._copied = parallel == "ddp" and dtype != torch.float32
        if parallel == "fsdp":
            if compile and not isinstance(masters.denoiser, FusedDDT):
                raise ValueError("compile with fsdp works with engine fused only; take ddp, or leave compile out")
            _shard(masters, dtype, device)
        module = copy.deepcopy(masters).to(dtype) if self._copied else masters
        if compile:
            module.compile_parts()
        self.compute: nn.Module = module
        self._module = module
        if parallel == "ddp" and world_size > 1:
            ids = [device.index] if device.type == "cuda" else None
            ddp = DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True)
            if self._copied:
                ddp.register_comm_hook(None, _average_in_float32)
            self.compute = ddp

    def collect(self) -> None:
        """Add the gradients of the last backward pass to the masters'."""
        if not self._copied:
            return
        for master, parameter in zip(self.masters.parameters(), self._module.parameters(), strict=True):
            if parameter.grad is not None:
                gradient, parameter.grad = parameter.grad, None
                master.grad = gradient.float() if master.grad is None else master.grad.add_(gradient)

    @torch.no_grad()
    def publish(self) -> None:
        """Hand the masters' weights, after an optimiser step, to the module that computes."""
        if self._copied:
            torch._foreach_copy_(list(self._module.parameters()), list(self.masters.parameters()))


def _shard(model: TrainedDDT, dtype: torch.dtype, device: torch.device) -> None:
    # FSDP warns that the outputs of some layers are views, which must not be changed in place; none is.
    warnings.filterwarnings("ignore", message=".*returned a view tensor", module="torch.distributed.fsdp.*")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for part in model.shardable_parts():
        fully_shard(part, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def _average_in_float32(_: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    buffer = bucket.buffer()
    summands = buffer.float().div_(dist.get_world_size())
    work = dist.all_reduce(summands, async_op=True)
    assert work is not None
    return work.get_future().then(lambda future: buffer.copy_(future.value()[0]))


# DDP wants the types themselves, which `from __future__ import annotations` turns into strings.
_average_in_float32.__annotations__ |= {"bucket": dist.GradBucket, "return": torch.futures.Future[Tensor]}


class StopSignal:
    """Whether any process has been told to stop (SIGTERM), known to all after the same step.

    Each process asks `agreed` once a step. The answer is one step old, so that no process waits for it.
    """

    def __init__(self) -> None:
        self._told = False
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._work: dist.Work | None = None

    @contextmanager
    def listening(self) -> Iterator[StopSignal]:
        """Take SIGTERM as a wish to stop instead of dying of it; only a main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        earlier = signal.signal(signal.SIGTERM, self._tell)
        try:
            yield self
        finally:
            signal.signal(signal.SIGTERM, earlier)

    def _tell(self, _: int, __: FrameType | None) -> None:
        self._told = True

    def agreed(self) -> bool:
        """True in every process once one of them was told, after the same number of calls."""
        if dist.get_world_size() == 1:
            return self._told
        stop = False
        if self._work is not None:
            self._work.wait()
            stop = bool(self._flag)
        self._flag.fill_(self._told)
        self._work = dist.all_reduce(self._flag, dist.ReduceOp.MAX, async_op=True)
        return stop
