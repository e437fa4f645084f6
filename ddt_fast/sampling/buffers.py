"""What the steps of a run share: buffers at fixed addresses, and how much memory they take."""

import os
from bisect import bisect_right

import torch
from torch import Tensor

from ddt_fast.model import DDT, FusedDDT
from ddt_fast.sampling.plan import SamplingPlan
from ddt_fast.sampling.tables import StepTables

CONDITION_BYTES = 512 * 2**20
"""The most for precomputed encoder modulations. Rows for a few steps of a batch already make a GEMM that keeps a GPU
busy; more rows only save launches."""


class Buffers:
    """The buffers for a run of `batch_size` samples.

    Attributes:
        x: (B, in_channels, height, width) float32.
        step: (1,) int64, the step counter.
        modulations: (slots, branches · B, N, W_d), the decoder modulations kept between steps; conditional ones first.
        velocities, differences: histories of `ddt_kernels.guided_step`, or None.
        noise: shaped like x if the solver is stochastic, else None.
        rotary: the model's tables.

    The encoder's modulations depend only on t and the label. They are computed ahead, for as many refreshes at a time
    as `conditions` holds and once for every distinct label: one GEMM, and one pass over its weights, instead of one per
    refresh.
    """

    def __init__(
        self,
        model: DDT | FusedDDT,
        plan: SamplingPlan,
        tables: StepTables,
        batch_size: int,
        height: int,
        width: int,
        memory_budget: int | None,
    ) -> None:
        parameter = next(model.parameters())
        device, dtype = parameter.device, parameter.dtype
        config = model.config
        self.model, self.batch_size = model, batch_size
        shape = (batch_size, config.in_channels, height, width)

        def zeros(*size: int, like: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(size, dtype=like, device=device)

        self.x = zeros(*shape)
        self.step = zeros(1, like=torch.int64)
        tokens = config.num_tokens(height, width)
        kept = plan.cached_branches * batch_size
        self.modulations = zeros(plan.state_history, kept, tokens, model.modulation_size, like=dtype)
        depths = plan.velocity_history, plan.difference_history
        self.velocities, self.differences = (zeros(depth, *shape) if depth else None for depth in depths)
        stochastic = any(step.coefficients.noise_coefficient for step in plan.steps)
        self.noise = zeros(*shape) if stochastic else None
        self.rotary = model.rotary(self.x)

        self.encoding_steps = [i for i, step in enumerate(plan.steps) if any(b.encode for b in step.branches)]
        self._encoding_steps = torch.tensor(self.encoding_steps, device=device)
        self.uses_null = any(step.uncond is not None for step in plan.steps)
        self.t_embeddings = zeros(len(plan.steps), config.hidden_size, like=dtype)
        self._times = tables.times
        most = max_labels(plan, model, batch_size)
        budget = CONDITION_BYTES
        if memory_budget is not None:
            budget = min(budget, memory_budget - batch_size * plan.cache_bytes(config, height, width, dtype))
        rows = budget // (model.condition_size * dtype.itemsize)
        rows = max(most, min(rows, most * len(self.encoding_steps)))
        self.conditions = zeros(rows, 1, model.condition_size, like=dtype)
        self.condition_start = zeros(len(plan.steps), like=torch.int64)
        self.label_rows = zeros(2 * batch_size, like=torch.int64)
        self._labels = zeros(most, like=torch.int64)
        self._chunks: dict[int, tuple[int, int]] = {}

    @property
    def kept_bytes(self) -> int:
        """Bytes of the modulations, velocities and guidance differences kept between steps."""
        kept = (self.modulations, self.conditions, self.velocities, self.differences)
        return sum(tensor.nbytes for tensor in kept if tensor is not None)

    def rewind(self) -> None:
        """Go back to step 0."""
        self.step.zero_()

    def start(self, noise: Tensor, labels: Tensor) -> None:
        """Begin a run: set x to the noise and lay out the labels' rows. The host does not wait after this."""
        self.rewind()
        self.x.copy_(noise)
        self.t_embeddings.copy_(self.model.t_embedder(self._times))
        distinct, rows = labels.cpu().unique(return_inverse=True)
        if self.uses_null:
            distinct = torch.cat([distinct, torch.tensor([self.model.config.num_classes])])
        null_rows = torch.full_like(rows, len(distinct) - 1)
        self.label_rows.copy_(torch.cat([rows, null_rows]))
        self._labels = distinct.to(self.x.device)
        per_chunk = len(self.conditions) // len(distinct)
        starts = torch.zeros(len(self.condition_start), dtype=torch.int64)
        self._chunks = {}
        for number, step in enumerate(self.encoding_steps):
            starts[step] = number % per_chunk * len(distinct)
            if number % per_chunk == 0:
                self._chunks[step] = (number, min(number + per_chunk, len(self.encoding_steps)))
        self.condition_start.copy_(starts)

    def prepare_conditions(self, step: int) -> None:
        """Compute the encoder modulations that begin at this step, if any; call it before the step."""
        if step not in self._chunks:
            return
        first, last = self._chunks[step]
        labels, count = self._labels, last - first
        t_embeddings = self.t_embeddings.index_select(0, self._encoding_steps[first:last])
        rows = t_embeddings[:, None].expand(-1, len(labels), -1).reshape(count * len(labels), 1, -1)
        self.model.condition(rows, labels.repeat(count), out=self.conditions[: len(rows)])

    def encoder_inputs(self, rows: slice) -> tuple[Tensor, Tensor]:
        """t_embedding (1, 1, C) and condition (B, 1, W_e) of the current step, for these rows of the labels."""
        t_embedding = self.t_embeddings.index_select(0, self.step)[:, None]
        start = self.condition_start.index_select(0, self.step)
        return t_embedding, self.conditions.index_select(0, start + self.label_rows[rows])


def max_labels(plan: SamplingPlan, model: DDT | FusedDDT, batch_size: int) -> int:
    """How many distinct labels a batch can have, with the null class if the plan needs it."""
    return min(batch_size, model.config.num_classes) + any(step.uncond is not None for step in plan.steps)


def needed_bytes(plan: SamplingPlan, model: DDT | FusedDDT, batch_size: int, height: int, width: int) -> int:
    """The least bytes that a batch keeps between steps: decoder modulations, and encoder modulations of one refresh."""
    dtype = next(model.parameters()).dtype
    rows = max_labels(plan, model, batch_size) * model.condition_size * dtype.itemsize
    return batch_size * plan.cache_bytes(model.config, height, width, dtype) + rows


def fitting_batch_size(
    plan: SamplingPlan,
    model: DDT | FusedDDT,
    batch_size: int,
    height: int,
    width: int,
    memory_budget: int,
    owner: str = "the memory budget is",
) -> int:
    """The largest batch, up to batch_size, that keeps at most memory_budget bytes between steps; ValueError if not even
    one sample fits. In the error, `owner` says whose bytes they are."""
    fitting = bisect_right(
        range(1, batch_size + 1), memory_budget, key=lambda count: needed_bytes(plan, model, count, height, width)
    )
    if fitting == 0:
        needed = needed_bytes(plan, model, 1, height, width)
        advice = "; a forecast of fewer states keeps less" if plan.state_history > 1 else ""
        raise ValueError(
            f"one {height}x{width} sample keeps {format_bytes(needed)} between steps, {owner} "
            f"{format_bytes(memory_budget)}{advice}"
        )
    return fitting


def check_memory(
    plan: SamplingPlan, model: DDT | FusedDDT, batch_size: int, height: int, width: int, memory_budget: int | None
) -> None:
    """ValueError if a batch keeps more than the budget (None: the device's memory) between steps."""
    device = next(model.parameters()).device
    if memory_budget is not None:
        limit, owner = memory_budget, "the memory budget is"
    elif device.type == "cuda":
        limit, owner = torch.cuda.get_device_properties(device).total_memory, "the device has"
    else:
        limit, owner = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "the device has"
    fitting = fitting_batch_size(plan, model, batch_size, height, width, limit, owner)
    if fitting < batch_size:
        needed = format_bytes(needed_bytes(plan, model, batch_size, height, width))
        raise ValueError(
            f"batches of {batch_size} keep {needed} between steps, {owner} {format_bytes(limit)}; "
            f"allowed: batches of up to {fitting}"
        )


def format_bytes(count: int) -> str:
    """1536 → "1.5 KiB"."""
    size, units = float(count), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.4g} {units[0]}"
