"""The search for a mesh: all meshes, ZeRO stages, schedules, microbatches and activation policies
of a number of GPUs, by memory and time.

A full plan of each would take hours. So a search plans one block for each way to split it
(block_cost.py: tp, cp, ep and activation policy). Everything else is put together from parts that
are exact by themselves: the bytes of weights and states from the declarations and rules, the bubble
and the activations in flight from the schedule's table.

Left out: kernels that are faster with more sequences in a microbatch, and the difference between
ranks of a pipeline but for the embedding and the head. So the best results deserve a plan of their
own, and the command for it is printed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Literal

from dtron.distributed.mesh_shape import MeshShape
from dtron.errors import UserError
from dtron.model.config import ModelConfig
from dtron.model.flops import flops_per_token
from dtron.planner.gpu_rates import Gpu
from dtron.planner.step_time import link_of
from dtron.runtime.config import PipelineConfig, RunConfig
from dtron.runtime.validate import check
from dtron.schedules import make
from dtron.schedules.table import Table, peaks, simulate
from dtron.tools.block_cost import BlockCost, block_cost
from dtron.tools.show import rows, total

POLICIES = ("none", "selective", "full")
SCHEDULES = (
    PipelineConfig("1f1b"),
    PipelineConfig("interleaved", 2),
    PipelineConfig("zb-v"),
)
ZEROS: tuple[Literal[0, 1, 2, 3], ...] = (0, 1, 2, 3)
LARGEST = 1 << 16  # GPUs
LONG = 16_384  # tokens of a sequence from which cp is tried
DEEPEST = 32  # pipeline ranks at most


@dataclass(frozen=True)
class Choice:
    """One way to train, with its predicted memory and speed."""

    config: RunConfig
    shape: MeshShape
    microbatches: int
    gib: float
    seconds: float
    tokens_per_second: float
    mfu: float

    @property
    def flags(self) -> str:
        """The flags of train.py, or of ``dtron plan``."""
        c = self.config
        text = f"--mesh {self.shape} --zero {c.zero} --batch {c.batch} --micro-batch"
        text += f" {c.micro_batch} --recompute {c.recompute}"
        if self.shape.pp > 1:
            text += f" --pipeline.schedule {c.pipeline.schedule}"
            text += f" --pipeline.stages-per-rank {c.pipeline.stages_per_rank}"
        return text


def meshes_of(gpus: int, model: ModelConfig, seq_len: int, host: int) -> Iterator[MeshShape]:
    """Return all meshes of a number of GPUs whose axes but dp are powers of two.

    ``host``: GPUs of a host; tp and cp stay within it."""

    def powers(most: int) -> list[int]:
        return [2**i for i in range(max(most, 1).bit_length()) if gpus % 2**i == 0]

    for pp in powers(min(model.layers, DEEPEST)):
        for cp in powers(host) if seq_len >= LONG else [1]:
            for tp in powers(host // cp):
                rest = pp * cp * tp
                if gpus % rest:
                    continue
                most = min(model.moe.experts, gpus // pp) if model.moe.experts else 1
                for ep in powers(most):
                    yield MeshShape(pp=pp, dp=gpus // rest, cp=cp, tp=tp, ep=ep)


class Search:
    """A search for one model on a number of equal GPUs.

    ``config``: the model, the sequence length and everything else that is not searched.
    ``batch``: sequences of a step, about.
    ``refused``: one reason for each mesh that cannot be."""

    def __init__(self, config: RunConfig, gpu: Gpu, gpus: int, batch: int):
        if config.lora.rank:
            raise UserError(
                f"plan search --lora.rank {config.lora.rank}: it counts every weight as trained; "
                "plan single meshes with dtron plan"
            )
        self.config, self.gpu, self.gpus, self.batch = config, gpu, gpus, batch
        self.refused: dict[str, str] = {}
        self.too_large = 0
        self._costs: dict[tuple[int, ...], BlockCost] = {}
        self._states: dict[tuple[MeshShape, int], tuple[Sequence[int], float]] = {}
        self._flops = flops_per_token(config.model, config.data.seq_len)

    def run(self) -> list[Choice]:
        """Return the choices that fit, the fastest first. Raises UserError if not even one device
        could train the model with these flags."""
        m, seq_len = self.config.model, self.config.data.seq_len
        check(m, MeshShape(), seq_len, self.config.cp_method, False)
        found: list[Choice] = []
        for shape in meshes_of(self.gpus, m, seq_len, self.gpu.gpus_of_a_host):
            try:
                zigzag = replace(self.config, mesh=str(shape)).zigzags
                check(m, shape, seq_len, self.config.cp_method, zigzag)
                if 2 * self.batch < shape.data:
                    raise UserError(f"{self.batch} sequences for {shape.data} data ranks: too few")
                found += self._choices(shape)
            except UserError as error:
                self.refused[str(shape)] = str(error)
        return sorted(found, key=lambda choice: -choice.tokens_per_second)

    def _choices(self, shape: MeshShape) -> list[Choice]:
        """Return the choices of a mesh that fit."""
        found = []
        for candidate in self._candidates(shape):
            choice = self._evaluate(candidate, shape) if self._has_room(candidate, shape) else None
            if choice is None or choice.gib > self.gpu.memory_gib:
                self.too_large += 1
            else:
                found.append(choice)
        return found

    def _candidates(self, shape: MeshShape) -> Iterator[RunConfig]:
        """Return the ways to train on a mesh. The batch is the multiple of the data ranks that is
        nearest."""
        each = max(1, round(self.batch / shape.data))
        for recompute, rows_each in product(POLICIES, (1, 2, 4)):
            for pipe in SCHEDULES if shape.pp > 1 else SCHEDULES[:1]:
                count, odd = divmod(each, rows_each)
                if odd or not _possible(pipe, shape.pp, count, self.config.model.layers):
                    continue
                for zero in ZEROS if shape.dp * shape.cp > 1 else ZEROS[:1]:
                    yield replace(
                        self.config,
                        mesh=str(shape),
                        zero=zero,
                        batch=each * shape.data,
                        micro_batch=rows_each,
                        recompute=recompute,
                        pipeline=pipe,
                    )

    def _evaluate(self, c: RunConfig, shape: MeshShape) -> Choice:
        m, cost = c.model, self._cost(shape, c.recompute)
        assert isinstance(c.micro_batch, int)
        count = c.ramp.sizes[0] // shape.data // c.micro_batch
        layers = math.ceil(m.layers / shape.pp)
        compute = c.micro_batch * (layers * (cost.forward + cost.backward) + cost.ends)
        stretch, in_flight = _pipeline(c.pipeline, shape.pp, count)
        state, gathered = self._weights(shape, c.zero)
        exposed = self._exchange(c, shape, gathered, compute, count)
        moved = sum(state) * 1.6 + _moved(c, gathered, state[1] / 4, count)
        seconds = compute * count * stretch + exposed + moved / self.gpu.memory_gbs * 1e-9
        kept = layers * cost.kept * c.micro_batch * in_flight
        nbytes = sum(state) + kept + cost.working * c.micro_batch
        if c.gathers_each(shape):
            nbytes += _in_flight(m, shape, gathered, layers)
        tokens = c.ramp.sizes[0] * c.data.seq_len
        speed = tokens / seconds / shape.size
        mfu = speed * self._flops / 1e12 / self.gpu.peak_tflops
        gib = nbytes / 2**30 + self.gpu.overhead_gib
        return Choice(c, shape, count, gib, seconds, speed, mfu)

    def _has_room(self, c: RunConfig, shape: MeshShape) -> bool:
        """Whether the weights and their states alone fit. If not, no block needs a plan."""
        state, _ = self._weights(shape, c.zero)
        return sum(state) / 2**30 + self.gpu.overhead_gib <= self.gpu.memory_gib

    def _weights(self, shape: MeshShape, zero: int) -> tuple[Sequence[int], float]:
        """Return the bytes of parameters, gradients and optimizer state of a rank, and the elements
        of its weights after an all-gather."""
        if (shape, zero) not in self._states:
            m = self.config.model
            small = replace(m, layers=math.ceil(m.layers / shape.pp))
            stage, optim = replace(shape, pp=1), self.config.optim
            gathered = total(rows(small, stage, 0))[1] / 4
            self._states[shape, zero] = total(rows(small, stage, zero, optim=optim)), gathered
        return self._states[shape, zero]

    def _exchange(
        self, c: RunConfig, shape: MeshShape, gathered: float, compute: float, count: int
    ) -> float:
        """The exposed seconds of ZeRO's messages.

        ``gathered``: elements of a rank's weights after the all-gather."""
        ranks = shape.dp * shape.cp
        if ranks * shape.dp_replicate == 1:
            return 0.0
        axis = "dp" if shape.dp > 1 else "cp"
        atom = next((a for a in shape.atoms if a.split(".")[0] == axis), axis)
        way = link_of(shape, atom, self.gpu)
        link, share = self.gpu.links[way], (ranks - 1) / ranks
        if c.zero == 3 and shape.pp == 1:
            each = link.seconds(share * gathered * (2 + 2 + 2))  # two gathers and the gradients
            copies = way == "nvlink" and c.copy_engines == "auto"
            slower = 1.0 if copies else self.gpu.beside_nccl
            lost = min(each * (1 - 1 / slower), compute * (slower - 1))
            return count * (max(0.0, each - slower * compute) + lost)
        sums = 4 * gathered * share
        return link.seconds(2 * sums if c.zero == 0 else sums + 2 * gathered * share)

    def _cost(self, shape: MeshShape, recompute: str) -> BlockCost:
        key = (shape.tp, shape.cp, shape.ep, shape.etp, POLICIES.index(recompute))
        if key not in self._costs:
            self._costs[key] = block_cost(self.config, self.gpu, shape, recompute)
        return self._costs[key]


@cache
def _table(schedule: str, per_rank: int, pp: int, count: int) -> Table:
    return make(schedule, pp, count, per_rank)


def _possible(pipe: PipelineConfig, pp: int, count: int, layers: int) -> bool:
    try:
        table = _table(pipe.schedule, pipe.stages_per_rank, pp, min(count, 4 * pp))
        return table.stages <= layers and (count <= 4 * pp or count % pp == 0)
    except UserError:
        return False


@cache
def _pipeline(pipe: PipelineConfig, pp: int, count: int) -> tuple[float, float]:
    """Return how many times longer a rank takes than its work, and the stages' worth of activations
    that the rank with the most keeps. Backward takes twice as long as forward."""
    if pp == 1:
        return 1.0, 1.0
    few = min(count, 4 * pp)
    table = _table(pipe.schedule, pipe.stages_per_rank, pp, few)
    span = simulate(table).makespan
    work = 3 * few * table.per_rank
    return (span + 3 * (count - few) * table.per_rank) / (
        work + 3 * (count - few) * table.per_rank
    ), max(peaks(table)) / table.per_rank


def _moved(c: RunConfig, gathered: float, reduced: float, count: int) -> float:
    """Return the bytes that microbatches read and write beside a block's own work.

    Under ZeRO-3 each microbatch brings weights that have arrived into order, twice (2 x 4 bytes for
    an element), and sorts and sums gradients (8 bytes). The gradients of all but the first
    microbatch are added to a sum: 2 bytes are read, and 4 bytes read and written.

    ``gathered``, ``reduced``: elements of a rank's weights after the all-gather, and of its
        gradients."""
    each = 16 * gathered if c.zero == 3 and c.gathers_each(MeshShape.parse(c.mesh)) else 0.0
    return each * count + 10 * reduced * (count - 1)


def _in_flight(m: ModelConfig, shape: MeshShape, gathered: float, layers: int) -> float:
    """Return the bytes of gathered weights and of gradients on their way under ZeRO-3, when
    backward begins: two blocks and the head in bfloat16, and the gradients of both."""
    head = m.padded_vocab * m.embed / shape.tp
    block = max(0.0, gathered - (1 if m.tied else 2) * head) / layers
    return (2 * 2 + 2) * block + (2 + 2) * head


def frontier(choices: Sequence[Choice]) -> list[Choice]:
    """Return the choices that no other choice beats in both memory and speed.

    ``choices``: the fastest first."""
    found: list[Choice] = []
    for choice in choices:
        if not found or choice.gib < found[-1].gib:
            found.append(choice)
    return found
