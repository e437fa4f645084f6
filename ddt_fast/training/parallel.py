"""Training in several processes with torch.distributed, and in mixed precision."""

import copy
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from types import FrameType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from ddt_fast.model.fused import FusedDDT
from ddt_fast.training.model import TrainingModel


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Form a group of the processes that torchrun started, or of this one alone; an existing group stays."""
    if dist.is_initialized():
        yield
        return
    backend, own = "gloo", None
    if device.type == "cuda":
        # Checkpoints are written from the CPU while the GPUs continue: both must communicate.
        backend, own = "cpu:gloo,cuda:nccl", torch.device("cuda", device.index or 0)
        # FSDP puts its shards on the current GPU, which by default is the first one in every process.
        torch.cuda.set_device(own)
    hook = sys.excepthook  # torch installs its own, and leaves it there
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    alone: dict[str, Any] = {} if launched else {"rank": 0, "world_size": 1, "store": dist.HashStore()}
    dist.init_process_group(backend, device_id=own, **alone)
    try:
        yield
    finally:
        dist.destroy_process_group()
        sys.excepthook = hook


def patient_group() -> dist.ProcessGroup:
    """A group of all processes, over gloo, that wait for each other for up to a week: on GPUs, a collective fails if
    one process arrives 10 minutes after another."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=7))


def wait_for_all(group: dist.ProcessGroup) -> None:
    """Return when every process of the group has arrived: after work of one process, or of unequal length."""
    if dist.get_world_size(group) > 1:
        dist.barrier(group)


class MixedPrecisionReplica:
    """Master weights in float32, and a module that computes their gradients in `dtype`, alone or with other processes.

    With "ddp" and bfloat16, the module is a bfloat16 copy whose gradients are moved to the masters after every backward
    pass; in float32, it is the masters themselves. With "fsdp" (FSDP2), parameters, gradients and everything derived
    from them are sharded, and PyTorch gathers each block in `dtype` when it is needed. Gradients are summed over the
    parts of a batch and then averaged over the processes, in float32.

    Attributes:
        masters: float32 parameters, to optimise, average and save.
        compute: the module to call, within `part`.
    """

    def __init__(self, masters: TrainingModel, dtype: torch.dtype, parallel: str, compile: bool) -> None:
        device = next(masters.parameters()).device
        self.masters = masters
        masters.dtype = dtype
        copied = parallel == "ddp" and dtype != torch.float32
        if parallel == "fsdp":
            if compile and not isinstance(masters.denoiser, FusedDDT):
                raise ValueError("compile with fsdp needs the fused engine; use it or ddp, or leave compile out")
            _shard(masters, dtype, device)
        module = copy.deepcopy(masters).to(dtype) if copied else masters
        if compile:
            module.compile_parts()
        self.compute: nn.Module = module
        if parallel == "ddp" and dist.get_world_size() > 1:
            ids = [device.index] if device.type == "cuda" else None
            ddp = DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True)
            if copied:
                ddp.register_comm_hook(None, self._average_hook)
            self.compute = ddp
        # For a copy: where its gradients go, and the averages in progress.
        pairs = zip(module.parameters(), masters.parameters(), strict=True) if copied else ()
        self._master_of: dict[Tensor, Tensor] = dict(pairs)
        self._averages: list[dist.Work] = []

    @contextmanager
    def part(self, last: bool) -> Iterator[None]:
        """Surround the forward and backward pass of one part of a step's batch. Gradients add up over the parts;
        processes exchange them only in the last one, so that FSDP keeps them whole until then."""
        if isinstance(self.masters, FSDPModule):
            self.masters.set_requires_gradient_sync(last)
        quiet = isinstance(self.compute, DistributedDataParallel) and not last
        with self.compute.no_sync() if quiet else nullcontext():  # type: ignore[operator]
            yield
        self._collect()

    def _collect(self) -> None:
        """Move the gradients of a copy to the masters."""
        averages, self._averages = self._averages, []
        for average in averages:
            average.wait()
        for parameter, master in self._master_of.items():
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None and not averages:
                master.grad = gradient.float() if master.grad is None else master.grad.add_(gradient)

    def _average_hook(self, _: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Add the gradients of some parameters to those of earlier parts, and average them over the processes: in the
        masters, not in place in bfloat16."""
        masters = [self._master_of[parameter] for parameter in bucket.parameters()]
        sums = bucket.buffer().float()
        for own, master in zip(sums.split([master.numel() for master in masters]), masters, strict=True):
            if master.grad is not None:
                own.add_(master.grad.flatten())
            master.grad = own.view_as(master)
        average = dist.all_reduce(sums.div_(dist.get_world_size()), async_op=True)
        assert average is not None
        self._averages.append(average)
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    @torch.no_grad()
    def copy_master_weights(self) -> None:
        """Copy the masters' weights to the module that computes; call it after every optimiser step."""
        if self._master_of:
            torch._foreach_copy_(list(self._master_of), list(self._master_of.values()))


def _shard(model: TrainingModel, dtype: torch.dtype, device: torch.device) -> None:
    # FSDP warns that some layers return views, which must not be changed in place. Nothing here does that.
    warnings.filterwarnings("ignore", message=".*returned a view tensor", module="torch.distributed.fsdp.*")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for part in model.shardable_parts():
        fully_shard(part, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


class StopSignal:
    """Whether any process was told to stop (SIGTERM), known to all after the same step.

    Each process calls `agreed` once per step. The answer is one step old, so that no process waits for it.
    """

    def __init__(self) -> None:
        self._told = False
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._work: dist.Work | None = None

    @contextmanager
    def listening(self) -> Iterator[Self]:
        """Stop on SIGTERM instead of dying; works only in the main thread."""
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
