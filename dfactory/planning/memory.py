"""Parameter counts and a memory forecast for one rank, from config.json alone; no weights, no GPU, no process group.

Letters in the formulas: P parameters, T those that are trained, n ranks, b bytes of a weight (2 in bfloat16), g bytes of
an accumulated gradient, L layers, t row positions of a micro-batch, and the sizes of the model: H hidden, A all query
heads, C all key (or value) heads, I an expert, D a dense feed-forward, k experts a token, E experts, V vocabulary. With
expert parallelism also X parameters of routed experts, and m ranks that share those of a layer.

The forecast is the peak of what the program allocates, in two phases that do not coincide: a decoder layer's backward
and the head's. Assumed: MoE blocks are ZeRO-3 leaf modules, gathered whole; flex_attention (no score matrix is
kept). Activations count the tensors that autograd keeps for a decoder layer (tests/planning/test_memory.py measures them;
test_peak.py compares the whole forecast with a step's peak).
Not counted: the CUDA context, NCCL's own buffers, the cache of prompts that are decoded at evaluations, and what the
allocator loses to fragments; leave 10 percent for them.
With expert parallelism a rank is taken to receive as many tokens as it sends (it then keeps 3 percent more, measured);
where routing is uneven it gets more.
"""

import dataclasses
import enum
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedConfig

from dfactory.models.adapters import adapted_linears
from dfactory.models.families.base import FAMILIES
from dfactory.models.head import CHUNK_BYTES
from dfactory.models.registry import meta_model, read_config
from dfactory.recipe import Recipe

REDUCE_BUCKET = 500_000_000  # DeepSpeed's default reduce_bucket_size, in elements
MOMENTS = {  # bytes of an optimiser's state for a parameter, less the fp32 copy
    "adamw": (8, "Adam's two moments 8"),
    "adamw_8bit": (2, "Adam's two moments in 8 bits 2"),
    "adafactor": (0, "Adafactor's rows and columns, next to nothing"),
    "muon": (4, "momentum 4, vectors and embeddings twice that"),
}
PREFETCH_BUCKET = 50_000_000  # DeepSpeed's default stage3_prefetch_bucket_size, in elements


@dataclasses.dataclass(frozen=True)
class ParameterCounts:
    """How many parameters a model has. Buffers, such as the routers' expert biases, are not parameters."""

    total: int
    active: int  # that one token passes through: of the routed experts only the chosen ones
    vocabulary: int  # embedding and head; once if they are tied
    experts: int  # routed experts
    largest_block: int  # of one module that ZeRO-3 gathers whole: a MoE block, or the largest single matrix
    block_experts: int = 0  # of these, in routed experts

    @property
    def other(self) -> int:
        """Attention, norms, routers, shared experts and dense layers."""
        return self.total - self.vocabulary - self.experts


@dataclasses.dataclass(frozen=True)
class Setup:
    """The settings that determine a rank's memory, besides the model."""

    world_size: int
    zero_stage: int = 0
    expert_parallel_size: int = 1
    dtype: str = "bfloat16"
    gradient_dtype: str | None = None  # in which gradients are accumulated; None: as the weights
    offload_optimizer: bool = False
    offload_param: bool = False
    gradient_checkpointing: bool = False
    activation_bytes: int | None = None  # for layers that need no recomputing; None: all are recomputed
    rows: int = 1  # of a micro-batch
    row_length: int = 2048
    targets: int | None = None  # of a micro-batch; None: at most as many as positions
    lora_r: int | None = None  # None: all parameters are trained
    lora_target_modules: tuple[str, ...] = ()
    frozen_models: tuple[str, ...] = ()  # names of whole models besides the trained one
    logits_bytes: int = CHUNK_BYTES["cuda"]  # of the head's fp32 logits in one chunk
    one_pass_bytes: int = 0  # of those whose gradients the forward makes, on a CPU
    one_pass_tile: int = 0  # of them, that are worked on at once
    trains_entropy: bool = False  # whose gradient is a further chunk
    reduce_bucket: int = REDUCE_BUCKET  # elements
    overlap_comm: bool = False  # whether one bucket is filled while another is reduced
    prefetch_bucket: int = PREFETCH_BUCKET  # elements
    new_rows: int = 0  # of the vocabulary, beyond the checkpoint's
    optim: str = "adamw"
    averages: bool = False  # whether a moving average of the trained weights is kept


class Phase(enum.StrEnum):
    """When a line's bytes are in use. Layers and head take turns."""

    ALWAYS = "always"
    LAYER = "a layer's backward"
    HEAD = "the head"
    HOST = "host"


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a forecast: bytes of one rank, and how they came about."""

    name: str
    bytes: int
    formula: str
    phase: Phase = Phase.ALWAYS


@dataclasses.dataclass(frozen=True)
class MemoryForecast:
    lines: list[Line]

    @property
    def device_bytes(self) -> int:
        """The peak on the GPU: what is always there, and the larger of the two phases."""
        return self._sum(Phase.ALWAYS) + max(self._sum(Phase.LAYER), self._sum(Phase.HEAD))

    @property
    def host_bytes(self) -> int:
        return self._sum(Phase.HOST)

    def _sum(self, phase: Phase) -> int:
        return sum(line.bytes for line in self.lines if line.phase is phase)


def count_parameters(model_dir: Path, new_rows: int = 0) -> ParameterCounts:
    """Count the parameters of a model directory by its config.json, with so many more rows of the vocabulary. Raises
    CheckpointError or ConfigError."""
    config = read_config(Path(model_dir), new_rows)
    model = meta_model(config)
    total = sum(p.numel() for p in model.parameters())
    ends = {id(end.weight): end.weight.numel() for end in (model.get_input_embeddings(), model.get_output_embeddings())}
    experts = {name: p for name, p in model.named_parameters() if ".experts." in name}  # [E, ...] each
    routed = sum(p.numel() for p in experts.values())
    chosen = sum(p.numel() // len(p) * expert_sizes(config).chosen for p in experts.values())
    largest_block, block_experts = _largest_block(model, FAMILIES.of(config).moe_blocks)
    return ParameterCounts(
        total=total,
        active=total - routed + chosen,
        vocabulary=sum(ends.values()),
        experts=routed,
        largest_block=largest_block,
        block_experts=block_experts,
    )


def _largest_block(model: nn.Module, block_classes: tuple[str, ...]) -> tuple[int, int]:
    """Its parameters, and those of them in routed experts."""
    blocks = [m for m in model.modules() if type(m).__name__ in block_classes]
    sizes = [
        (sum(p.numel() for p in block.parameters()), sum(p.numel() for p in block.experts.parameters()))
        for block in blocks
    ]
    return max(sizes or [(p.numel(), 0) for p in model.parameters()])


def count_adapters(model_dir: Path, r: int, target_modules: tuple[str, ...]) -> int:
    """Parameters of LoRA adapters of rank r. Raises ConfigError for a target module that takes none."""
    linears = adapted_linears(meta_model(read_config(Path(model_dir))), list(target_modules))
    return sum(r * (module.in_features + module.out_features) for module in linears.values())


def setup_of(recipe: Recipe, deepspeed: dict[str, Any], world_size: int, new_rows: int = 0) -> Setup:
    """The setup of a recipe on `world_size` ranks; `deepspeed` is its DeepSpeed configuration."""
    zero = deepspeed.get("zero_optimization", {})
    gradient_dtype = deepspeed.get("data_types", {}).get("grad_accum_dtype")
    return Setup(
        world_size=world_size,
        zero_stage=zero.get("stage", 0),
        expert_parallel_size=recipe.expert_parallel_size,
        dtype=recipe.dtype,
        gradient_dtype={"fp32": "float32", "bf16": "bfloat16"}.get(gradient_dtype, gradient_dtype),
        offload_optimizer=zero.get("offload_optimizer", {}).get("device", "none") != "none",
        offload_param=zero.get("offload_param", {}).get("device", "none") != "none",
        gradient_checkpointing=recipe.gradient_checkpointing,
        activation_bytes=None if recipe.activation_memory_gb is None else int(recipe.activation_memory_gb * 1e9),
        rows=recipe.per_device_train_batch_size,
        row_length=recipe.row_length or recipe.longest_record,
        lora_r=recipe.lora_r if recipe.use_peft else None,
        lora_target_modules=tuple(recipe.lora_target_modules),
        frozen_models=recipe.frozen_models,
        trains_entropy=recipe.algorithm.needs(recipe).entropy_temperature is not None,
        reduce_bucket=int(zero.get("reduce_bucket_size", REDUCE_BUCKET)),
        overlap_comm=bool(zero.get("overlap_comm")),
        prefetch_bucket=int(zero.get("stage3_prefetch_bucket_size", PREFETCH_BUCKET)),
        new_rows=new_rows,
        optim=recipe.optim,
        averages=recipe.ema_decay is not None,
    )


def forecast(model_dir: Path, setup: Setup) -> MemoryForecast:
    """The memory of one rank, line by line. Raises CheckpointError or ConfigError for a directory that is no model."""
    config, counts = read_config(Path(model_dir), setup.new_rows), count_parameters(model_dir, setup.new_rows)
    if setup.lora_r is None:
        return forecast_sizes(config, counts, setup)
    return forecast_sizes(config, counts, setup, count_adapters(model_dir, setup.lora_r, setup.lora_target_modules))


def forecast_sizes(
    config: PreTrainedConfig, counts: ParameterCounts, setup: Setup, adapters: int | None = None
) -> MemoryForecast:
    """The same for sizes that were counted before; `adapters` are LoRA's parameters, None where all are trained."""
    full = adapters is None
    trained = counts.total if full else adapters
    weights = counts.total + (0 if full else trained)
    return MemoryForecast(
        [
            *_state_lines(counts, weights, trained, setup),
            *_activation_lines(config, setup),
            *_passing_lines(counts, full, config, setup),
        ]
    )


def _bytes(dtype: str) -> int:
    return {"bfloat16": 2, "float32": 4}[dtype]


def _state_lines(counts: ParameterCounts, weights: int, trained: int, setup: Setup) -> list[Line]:
    """Weights, gradients and optimiser state, each whole or divided over the ranks (ZeRO, arXiv 1910.02054).

    With m ranks to the experts of a layer, each holds X / m of them, which ZeRO divides over n / m ranks: what ZeRO
    divides comes to the same as without, what it keeps whole is less.
    """
    experts = counts.experts
    n, m, stage, b = setup.world_size, setup.expert_parallel_size, setup.zero_stage, _bytes(setup.dtype)
    g = _bytes(setup.gradient_dtype or setup.dtype)
    moments, parts = MOMENTS[setup.optim]
    copy = 4 if setup.dtype == "bfloat16" or stage else 0  # DeepSpeed's shards keep an fp32 copy of fp32 weights too
    states, parts = copy + moments, f"fp32 copy 4 + {parts}" if copy else parts
    on_host = Phase.HOST if setup.offload_optimizer else Phase.ALWAYS

    def line(name: str, per: int, symbol: str, count: int, divided: bool, phase: Phase, note: str = "") -> Line:
        if divided or m == 1:
            formula = f"{per} x {symbol}" + (" / n" if divided else "") + note
            return Line(name, per * count // (n if divided else 1), formula, phase)
        return Line(name, per * (count - experts + experts // m), f"{per} x ({symbol} - X + X / m){note}", phase)

    weights_on = Phase.HOST if setup.offload_param else Phase.ALWAYS
    # Expert parallelism has no frozen models (recipe.py): below ZeRO-3 they are whole on each rank.
    divided, note = (n, " / n") if stage == 3 else (1, "")
    frozen = [
        Line(name, b * counts.total // divided, f"{b} x P without adapters{note}", weights_on)
        for name in setup.frozen_models
    ]
    return [
        line("weights", b, "P", weights, stage == 3, weights_on),
        *frozen,
        line("gradients", g, "T", trained, stage >= 2, on_host if stage >= 2 else Phase.ALWAYS),
        line("optimiser", states, "T", trained, stage >= 1, on_host, f" ({parts})"),
        *([line("moving average", 4, "T", trained, stage == 3, Phase.ALWAYS)] if setup.averages else []),
    ]


def head_size(config: PreTrainedConfig) -> int:
    """Dimensions of an attention head; not every config states them."""
    return config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads


def key_heads(config: PreTrainedConfig) -> int:
    """Key (and value) heads; where a config has no such number, as many as query heads."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


class ExpertSizes(NamedTuple):
    """Of a layer with routed experts: how many there are, how many a token takes, and the width of one."""

    experts: int
    chosen: int
    inner: int


def expert_sizes(config: PreTrainedConfig) -> ExpertSizes:
    """By the names of transformers' configurations: some call all experts num_experts, and some give theirs no width of
    its own."""
    named = {
        name: getattr(config, name, None) for name in ("num_local_experts", "num_experts", "moe_intermediate_size")
    }
    experts = named["num_local_experts"] or named["num_experts"] or 0
    chosen = getattr(config, "num_experts_per_tok", None) or 0
    return ExpertSizes(experts, chosen, named["moe_intermediate_size"] or config.intermediate_size)


def layer_activations(config: PreTrainedConfig, dtype: str) -> tuple[int, str]:
    """Bytes that autograd keeps for one row position in one decoder layer (its largest kind), and the formula."""
    b = _bytes(dtype)
    # RMSNorms, of the stream and of queries and keys, keep an fp32 copy of what they read.
    half = dtype == "bfloat16"
    per_h, per_a, per_c = (16, 12, 10) if half else (24, 20, 16)
    if half and FAMILIES.of(config).moe_blocks:
        per_h += 4  # so does the router
    head = head_size(config)
    sizes = (config.hidden_size, config.num_attention_heads * head, key_heads(config) * head)
    attention = sum(per * size for per, size in zip((per_h, per_a, per_c), sizes, strict=True))
    formula = f"{per_h} H + {per_a} A + {per_c} C"
    if not FAMILIES.of(config).moe_blocks:
        return attention + 4 * b * config.intermediate_size, f"{formula} + {4 * b} D"
    experts, chosen, inner = expert_sizes(config)
    # n_shared_experts is a name of the Glm4Moe configuration; other families have none.
    shared = (config.to_dict().get("n_shared_experts") or 0) * inner
    routed = chosen * (2 * b * config.hidden_size + 4 * b * inner + 56)
    formula += f" + k ({2 * b} H + {4 * b} I + 56) + {4 * b} I_shared + 5 E"
    return attention + routed + 4 * b * shared + 5 * experts, formula


def layers_kept(config: PreTrainedConfig, setup: Setup) -> int:
    """How many of the last decoder layers keep their activations within `activation_bytes`, next to the inputs of those that
    recompute theirs. All without gradient checkpointing."""
    if not setup.gradient_checkpointing:
        return config.num_hidden_layers
    if setup.activation_bytes is None:
        return 0
    positions, layers = setup.rows * setup.row_length, config.num_hidden_layers
    whole, _ = layer_activations(config, setup.dtype)
    given = _bytes(setup.dtype) * config.hidden_size
    left = setup.activation_bytes - layers * positions * given
    return max(0, min(layers, left // (positions * (whole - given))))


def _spared_by_last_layer(config: PreTrainedConfig, setup: Setup) -> int:
    """Bytes that the last layer does not keep of positions that are no target: it needs their keys and values alone. 0 where
    targets are not counted, so that every position may be one."""
    if setup.targets is None or not FAMILIES.of(config).last_layer_at_targets:
        return 0
    per_h, per_c = (10, 10) if setup.dtype == "bfloat16" else (12, 16)  # the norm before them, and their projections
    keys = per_h * config.hidden_size + per_c * key_heads(config) * head_size(config)
    others = max(0, setup.rows * setup.row_length - setup.targets)
    return others * max(0, layer_activations(config, setup.dtype)[0] - keys)


def _activation_lines(config: PreTrainedConfig, setup: Setup) -> list[Line]:
    positions, kept, b = setup.rows * setup.row_length, layers_kept(config, setup), _bytes(setup.dtype)
    per_position, formula = layer_activations(config, setup.dtype)
    spared = _spared_by_last_layer(config, setup) if kept else 0
    whole = Line("activations", kept * positions * per_position - spared, f"{kept} layers x t x ({formula})")
    if spared:
        whole = dataclasses.replace(whole, formula=f"{whole.formula}, the last one whole at targets alone")
    if not (recomputed := config.num_hidden_layers - kept):
        return [dataclasses.replace(whole, formula=whole.formula.replace(f"{kept} layers", "L"))]
    inputs = Line("layer inputs", recomputed * positions * b * config.hidden_size, f"{recomputed} layers x t x {b} H")
    if kept:  # their backward passes come first, so a layer that is recomputed finds their memory free
        return [inputs, whole]
    return [
        dataclasses.replace(inputs, formula=f"L x t x {b} H"),
        Line("one layer, recomputed", positions * per_position, f"t x ({formula})", Phase.LAYER),
    ]


def _passing_lines(counts: ParameterCounts, full: bool, config: PreTrainedConfig, setup: Setup) -> list[Line]:
    """Gathered weights, gradients before they are divided, buckets, and the head's logits."""
    b, stage, m = _bytes(setup.dtype), setup.zero_stage, setup.expert_parallel_size
    block = counts.largest_block - counts.block_experts + counts.block_experts // m
    size = "largest block" if m == 1 else "largest block with 1 / m of its experts"
    head = config.vocab_size * config.hidden_size
    lines = []
    if stage == 3:
        gathered = b * (block + setup.prefetch_bucket)
        lines += [
            Line("gathered block", gathered, f"{b} x ({size} {block:,} + prefetch bucket)", Phase.LAYER),
            Line("gathered head", b * head, f"{b} x V H", Phase.HEAD),
        ]
    if stage == 3 and full:
        lines.append(Line("gradients of a block", 2 * b * block, f"2 x {b} x {size} (with a flat copy)", Phase.LAYER))
    # DeepSpeed has the buffer of a bucket on one rank, too, at its full size, but not where it sums bf16 gradients in fp32
    # copies (its BF16_Optimizer). On more ranks what is being reduced is as large again.
    in_copies = stage == 1 and setup.dtype == "bfloat16" and setup.gradient_dtype == "float32"
    buckets = 2 if setup.world_size > 1 or (stage < 3 and setup.overlap_comm) else 0 if in_copies else 1
    if stage >= 1 and full and buckets:
        name = "reduce buckets" if buckets > 1 else "reduce bucket"
        lines.append(Line(name, buckets * b * setup.reduce_bucket, f"{buckets} x {b} x reduce bucket"))
    lines.append(_logits_line(config, setup))
    if full:
        cast = b if setup.dtype == "bfloat16" else 0
        lines.append(Line("gradient of the head", (4 + cast) * head, f"(4 + {cast}) x V H", Phase.HEAD))
    return lines


def _logits_line(config: PreTrainedConfig, setup: Setup) -> Line:
    """Logits in the head: of a chunk that is computed twice, or with the gradients in one pass. The larger of both, because
    evaluations and scoring have no gradient."""
    parts = [4] * (3 if setup.trains_entropy else 2) + [_bytes(setup.dtype)]  # bytes of a number of each chunk
    targets = setup.rows * setup.row_length if setup.targets is None else setup.targets
    most = 4 * config.vocab_size * targets
    chunk, once = min(setup.logits_bytes, most), min(setup.one_pass_bytes, most)
    twice = Line(
        "logits of a chunk", chunk * sum(parts) // 4, f"chunk x ({' + '.join(map(str, parts))}) / 4", Phase.HEAD
    )
    tile = min(setup.one_pass_tile, once)
    one_pass = Line("logits, in one pass", once + 2 * tile, "targets at once x V x 4 + 2 tiles", Phase.HEAD)
    return twice if setup.trains_entropy else max(twice, one_pass, key=lambda line: line.bytes)
