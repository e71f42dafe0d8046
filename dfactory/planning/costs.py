"""The arithmetic behind benchmarks/scale.py: operations, memory traffic and network traffic of one training step.

Everything here is a model on paper. Rates are assumptions (`Machine`); operations are held to torch's own count on a tiny
model, positions and visible pairs to what the data layer builds, and memory comes from dfactory/planning/memory.py.

A step is `accumulation` micro-batches and one update. On the device, matrix products take their operations or the reading
of their weights, whichever is longer, and elementwise kernels come on top; launching kernels is a floor below both. ZeRO's
traffic overlaps with the device's work, up to the share `overlap`; all-to-all, update and host do not.
"""

import dataclasses
from dataclasses import field
from typing import NamedTuple

from transformers import PreTrainedConfig

from dfactory.planning.memory import ParameterCounts, Setup, layer_activations

WEIGHT_BYTES = 2  # bfloat16, also of gradients on the network
ADAM_BYTES = 30  # a parameter: fp32 weight and moments 12 and gradient 4 read, 12 and the bf16 weight 2 written


def _assumed(value: float, unit: str, source: str) -> float:
    """A field with where its value comes from."""
    return field(default=value, metadata={"unit": unit, "source": source})


@dataclasses.dataclass(frozen=True)
class Machine:
    """An H100 SXM in a machine of eight. Peaks are data sheet facts; shares of them are guesses."""

    peak: float = _assumed(989e12, "FLOP/s", "H100 SXM data sheet, bfloat16 without sparsity")
    matmul_share: float = _assumed(0.55, "of peak", "guess: attention projections, shared and dense layers, head")
    expert_share: float = _assumed(0.40, "of peak", "guess: grouped matrix products of small experts")
    attention_share: float = _assumed(0.35, "of peak", "guess: flex_attention, counted by visible pairs, not tiles")
    hbm: float = _assumed(3.35e12, "B/s", "H100 SXM data sheet")
    hbm_share: float = _assumed(0.80, "of hbm", "guess")
    nvlink: float = _assumed(450e9, "B/s", "one direction, a GPU: half of the data sheet's 900 GB/s")
    nvlink_share: float = _assumed(0.75, "of nvlink", "guess")
    infiniband: float = _assumed(50e9, "B/s", "one direction, a GPU: one 400 Gb/s adapter each")
    infiniband_share: float = _assumed(0.80, "of infiniband", "guess")
    hop: float = _assumed(10e-6, "s", "guess: latency a machine of the ring, in each layer's collective")
    overlap: float = _assumed(0.80, "of ZeRO's traffic", "guess: what prefetching can hide behind the device's work")
    imbalance: float = _assumed(1.2, "times the mean", "guess: tokens of the busiest rank with expert parallelism")
    launch: float = _assumed(1e-3, "s", "guess: host time of a layer's kernels in one pass; a floor")
    pcie: float = _assumed(64e9, "B/s", "PCIe 5 x16, one direction, a GPU")
    pcie_share: float = _assumed(0.80, "of pcie", "guess")
    host_rate: float = _assumed(614e9, "B/s", "a machine: two sockets of eight DDR5-4800 channels")
    host_share: float = _assumed(0.50, "of host_rate", "guess: AdamW on the host")
    host_memory: float = _assumed(2e12, "B", "a machine (DGX H100 data sheet); a tenth is left free")
    gpus: int = _assumed(8, "GPUs", "a machine")


@dataclasses.dataclass(frozen=True)
class Row:
    """What one row of a batch holds: as many equal documents as fit, with views of their responses."""

    length: int = 12_288  # positions
    document: int = 1024  # tokens, in whole blocks
    prompt: int = 512
    views: int = 2  # a complementary pair: each response token is a target in one of them
    block: int = 32

    @property
    def document_positions(self) -> int:
        """Clean positions: no token sees the last clean block, so it is left out."""
        return self.document - self.block + self.views * (self.document - self.prompt)

    @property
    def documents(self) -> int:
        return self.length // self.document_positions

    @property
    def positions(self) -> int:
        return self.documents * self.document_positions

    @property
    def targets(self) -> int:
        return self.documents * (self.document - self.prompt)

    @property
    def pairs(self) -> int:
        return self.documents * self.document_pairs

    @property
    def document_pairs(self) -> int:
        """Queries times the keys that they see: a token of block b sees b + 1 blocks, in either kind of stream."""
        clean = sum(b + 1 for b in range(self.document // self.block - 1))
        return self.block**2 * clean + self.views * self.view_pairs

    @property
    def view_pairs(self) -> int:
        return self.block**2 * sum(b + 1 for b in range(self.prompt // self.block, self.document // self.block))

    @property
    def work(self) -> "Work":
        return Work(self.positions, self.pairs, self.targets, self.documents * self.view_pairs)


class Work(NamedTuple):
    """How many of what a forward pass computes."""

    positions: int
    pairs: int  # of a query and a key that it sees
    targets: int
    target_pairs: int  # whose query is a target

    def times(self, rows: int) -> "Work":
        return Work(*(rows * number for number in self))


def forward_flops(config: PreTrainedConfig, work: Work) -> dict[str, int]:
    """Of one forward pass, by part; two for a multiplication and an addition. LLaDA2's layers, of which the last one
    computes keys and values everywhere and all else at the targets."""
    hidden, dense, before = config.hidden_size, config.first_k_dense_replace, config.num_hidden_layers - 1
    queries, keys = (config.head_dim * n for n in (config.num_attention_heads, config.num_key_value_heads))
    expert = 6 * hidden * config.moe_intermediate_size
    positions, pairs = before * work.positions + work.targets, before * work.pairs + work.target_pairs
    in_moe = positions - dense * work.positions
    return {
        "projections": 4 * hidden * (queries * positions + keys * (before + 1) * work.positions),
        "attention": pairs * 4 * queries,
        "experts": in_moe * config.num_experts_per_tok * expert,
        "shared, dense, router": dense * work.positions * 6 * hidden * config.intermediate_size
        + in_moe * (expert * config.n_shared_experts + 2 * hidden * config.num_local_experts),
        "head": work.targets * 2 * hidden * config.vocab_size,
    }


def step_flops(forward: dict[str, int], checkpointing: bool, attention_backward: float = 2.5) -> dict[str, float]:
    """Forward and backward of a micro-batch. A backward is two forwards; attention's makes its scores once more, five
    products for two, and so does the head's with its logits, three for one. Checkpointing repeats the layers' forward."""
    passes = dict.fromkeys(forward, 3.0) | {"attention": 1 + attention_backward, "head": 4.0}
    return {part: work * (passes[part] + (checkpointing and part != "head")) for part, work in forward.items()}


class Step(NamedTuple):
    """Seconds of a step; they add up to it."""

    compute: float  # matrix products
    hbm: float  # elementwise kernels, and the update where it is on the GPU
    launch: float  # by which launching takes longer than both
    zero: float  # all-gather and reduce-scatter, as far as nothing hides them
    all_to_all: float
    host: float  # the update in host memory, with its transfers

    @property
    def seconds(self) -> float:
        return sum(self)

    @property
    def bottleneck(self) -> str:
        names = ("compute", "HBM", "kernel launches", "ZeRO traffic", "all-to-all", "host")
        return names[max(range(len(self)), key=self.__getitem__)]


@dataclasses.dataclass(frozen=True)
class Costs:
    """A step of a model under a setup, on `setup.world_size` GPUs."""

    config: PreTrainedConfig
    counts: ParameterCounts
    setup: Setup
    row: Row
    accumulation: int = 1
    machine: Machine = Machine()

    @property
    def positions(self) -> int:
        return self.setup.rows * self.row.positions

    @property
    def passes(self) -> int:
        """Through a layer: forward, backward, and with checkpointing the forward again."""
        return 3 if self.setup.gradient_checkpointing else 2

    def flops(self) -> dict[str, float]:
        forward = forward_flops(self.config, self.row.work.times(self.setup.rows))
        return step_flops(forward, self.setup.gradient_checkpointing)

    def matmul_seconds(self) -> float:
        """Of a micro-batch. A rank reads each weight once a pass, and writes and adds up its gradient."""
        machine, flops = self.machine, self.flops()
        busiest = machine.imbalance if self.setup.expert_parallel_size > 1 else 1.0
        shares = dict.fromkeys(flops, machine.matmul_share)
        shares |= {"experts": machine.expert_share / busiest, "attention": machine.attention_share}
        operations = sum(work / (machine.peak * shares[part]) for part, work in flops.items())
        here = self.counts.total - self.counts.experts + self.counts.experts / self.setup.expert_parallel_size
        traffic = here * WEIGHT_BYTES * (self.passes + 2)
        return max(operations, traffic / (machine.hbm * machine.hbm_share))

    def elementwise_seconds(self) -> float:
        """Of a micro-batch: what autograd keeps is written and read once a forward pass, read in the backward, and its
        gradient written and read. All layers are taken for whole ones."""
        kept, _ = layer_activations(self.config, self.setup.dtype)
        times = 2 * (self.passes - 1) + 3
        traffic = self.config.num_hidden_layers * self.positions * kept * times
        return traffic / (self.machine.hbm * self.machine.hbm_share)

    def collective_seconds(self) -> float:
        """All-gather of the weights, or reduce-scatter of as many gradients, once over the whole model.

        Each machine takes in what it has not, over all its adapters, and each GPU what it is to hold, over NVLink. With m
        ranks to a layer's experts a GPU holds 1 / m of them; a machine still needs all of them where m is at most 8.
        """
        machine, n, m = self.machine, self.setup.world_size, self.setup.expert_parallel_size
        experts = WEIGHT_BYTES * self.counts.experts
        others = WEIGHT_BYTES * self.counts.total - experts
        machines = max(1, n // machine.gpus)
        wide = max(m, machine.gpus)  # ranks after which the same experts come again on another machine
        entering = others * (1 - 1 / machines) + experts * machine.gpus / wide * (1 - min(1, wide / n))
        inside = others * (1 - 1 / n) + experts / m * (1 - m / n)
        between = entering / (machine.gpus * machine.infiniband * machine.infiniband_share)
        latency = self.config.num_hidden_layers * machines * machine.hop
        return max(between, inside / (machine.nvlink * machine.nvlink_share)) + latency

    def all_to_all_seconds(self) -> float:
        """Of a micro-batch: every chosen expert's copy of a token goes there and back, in each pass."""
        machine, m = self.machine, self.setup.expert_parallel_size
        if m == 1:
            return 0.0
        sent = self.positions * self.config.num_experts_per_tok * self.config.hidden_size * WEIGHT_BYTES
        sent *= machine.imbalance
        inside = sent * (1 - 1 / m) / (machine.nvlink * machine.nvlink_share)
        between = sent * max(0, 1 - machine.gpus / m) / (machine.infiniband * machine.infiniband_share)
        calls = 2 * self.passes * (self.config.num_hidden_layers - self.config.first_k_dense_replace)
        return calls * (max(inside, between) + max(1, m // machine.gpus) * machine.hop)

    def host_seconds(self) -> float:
        """Gradients to the host after each micro-batch, AdamW there, weights back."""
        if not self.setup.offload_optimizer:
            return 0.0
        machine, mine = self.machine, self.counts.total / self.setup.world_size
        moved = mine * WEIGHT_BYTES * (self.accumulation + 1)
        updated = mine * min(machine.gpus, self.setup.world_size) * ADAM_BYTES
        return moved / (machine.pcie * machine.pcie_share) + updated / (machine.host_rate * machine.host_share)

    def device_seconds(self) -> float:
        """Of a micro-batch, launches included."""
        launches = self.machine.launch * self.passes * self.config.num_hidden_layers
        return max(self.matmul_seconds() + self.elementwise_seconds(), launches)

    def zero_seconds(self) -> tuple[float, float]:
        """Of a step: what nothing hides, and all of ZeRO's traffic.

        ZeRO 3 gathers for forward and backward of each micro-batch; 1 and 2 gather once, after the update, where nothing
        hides it. 2 and 3 reduce after each micro-batch, 1 after the last.
        """
        one, stage, times = self.collective_seconds(), self.setup.zero_stage, self.accumulation
        rounds, traffic = {1: (1, one), 2: (times, one), 3: (times, 3 * one)}[stage]
        hidden = rounds * min(self.machine.overlap * traffic, self.device_seconds())
        total = rounds * traffic + (one if stage < 3 else 0.0)
        return total - hidden, total

    def step(self) -> Step:
        times, matmul, elementwise = self.accumulation, self.matmul_seconds(), self.elementwise_seconds()
        update = self.counts.total / self.setup.world_size * ADAM_BYTES / (self.machine.hbm * self.machine.hbm_share)
        return Step(
            compute=times * matmul,
            hbm=times * elementwise + (0.0 if self.setup.offload_optimizer else update),
            launch=times * max(0.0, self.device_seconds() - (matmul + elementwise)),
            zero=self.zero_seconds()[0],
            all_to_all=times * self.all_to_all_seconds(),
            host=self.host_seconds(),
        )
