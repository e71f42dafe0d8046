"""`decode.compile`: the decoder's forwards as code that torch.compile makes once for a model.

A forward over a block is hundreds of small operations. Started one by one from the modules of a model, they take as long as
its products. Here all layers are one graph of few kernels, whose lengths are symbolic.

Attention over the cache is one operation of that graph, which the compiler does not look into. Slots, spans and the number
of keys are therefore no part of the code: one graph serves prefills, ragged blocks and all decoders of a model. Weights are
its inputs, so a model that goes on learning needs no other.

Letters: N tokens of a forward, M chosen ones; d size of a head.
"""

import contextvars
import logging
import os
import shutil
import time
import types
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import InductorError
from transformers import Cache

from dfactory.decoding.slots import Decodable
from dfactory.errors import ConfigError
from dfactory.types import EmbeddingInputs

BACKEND = "inductor"
FEWEST = 2  # tokens; torch.compile makes code of its own for the lengths 0 and 1
TRACED = (67, 29)  # tokens and chosen ones of the call that compiles; of no relation, or it would be taken for a rule

logger = logging.getLogger(__name__)


class _Running(NamedTuple):
    """What attention needs of the forward that runs."""

    plan: Any
    cache: Any


_RUNNING: contextvars.ContextVar[_Running | None] = contextvars.ContextVar("running", default=None)


@torch.library.custom_op("dfactory::attend_to_cache", mutates_args=())
def _attend_to_cache(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    chosen_M: torch.Tensor | None,
    layer: int,
    scaling: float,
) -> torch.Tensor:
    """query [1, heads, N or M, d], key and value [1, kv heads, N, d], which go to the cache -> [1, N or M, heads, d]."""
    running = _RUNNING.get()
    if running is None:  # the call that compiles
        return torch.zeros_like(_shaped(query, key, value, chosen_M, layer, scaling))
    keys, values = running.cache.update(key, value, layer)
    plan = running.plan if chosen_M is None else running.plan.at(chosen_M, (1, key.shape[2]))
    return plan.attend(query, keys, values, scaling).contiguous()


@_attend_to_cache.register_fake
def _shaped(query, key, value, chosen_M, layer, scaling):
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])


class _TracedCache(Cache):
    """Stands for a cache while a model is traced: says in which layer attention comes next."""

    def __init__(self):
        super().__init__(layers=[])
        self.layer = -1

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        self.layer = layer_idx
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


class _TracedPlan:
    """Stands for an attention plan while a model is traced."""

    def __init__(self, cache: _TracedCache, chosen_M: torch.Tensor | None = None):
        self.cache, self.chosen_M = cache, chosen_M

    def attend(self, query, key, value, scaling):
        return _attend_to_cache(query, key, value, self.chosen_M, self.cache.layer, scaling)

    def at(self, chosen_M: torch.Tensor, shape: tuple[int, int]) -> "_TracedPlan":
        return _TracedPlan(self.cache, chosen_M)


def _traced(policy, chosen_M: torch.Tensor, token_1N: torch.Tensor, position_1N: torch.Tensor) -> torch.Tensor:
    cache = _TracedCache()
    inputs_1N = EmbeddingInputs(token_1N, noise=None)
    return policy.hidden_at(chosen_M, inputs_1N, position_1N, _TracedPlan(cache), cache)


class CompiledForward:
    """`hidden_at` of a policy, over a cache, as compiled code."""

    def __init__(self, policy: Decodable):
        self._policy = weakref.ref(policy)  # which outlives whoever decodes with it
        self.graphs = 0  # that were compiled; more than one where some length is not symbolic
        # torch.compile counts graphs by code object, and models share none
        own = types.FunctionType(_traced.__code__.replace(), _traced.__globals__)
        self._run = torch.compile(own, fullgraph=True, dynamic=True, backend=self._counted)
        self._compile(policy)

    def _counted(self, graph: torch.fx.GraphModule, inputs: list) -> Callable:
        made = torch._dynamo.lookup_backend(BACKEND)(graph, inputs)
        self.graphs += 1
        return made

    @torch.no_grad()
    @torch._dynamo.config.patch(specialize_float=True)  # a model's numbers are constants; else it is traced twice
    def _compile(self, policy: Decodable) -> None:
        started = time.perf_counter()
        tokens, chosen = TRACED
        chosen_M = torch.arange(chosen, device=policy.device)
        token_1N, position_1N = torch.arange(tokens, device=policy.device).repeat(2, 1, 1)
        try:
            self._run(policy, chosen_M, token_1N.clone(), position_1N.clone())  # which share no memory
        except (TorchDynamoException, InductorError) as problem:
            told = str(problem).strip().splitlines()[0]
            raise ConfigError(
                f"decode.compile true: torch.compile does not take this model ({told}); set it to false"
            ) from problem
        logger.warning(  # which is seen without any logging set up
            "decode.compile: compiled the model's forward in %.0f s, once for this process",
            time.perf_counter() - started,
        )

    def hidden_at(
        self, chosen_N: torch.Tensor, inputs_1N: EmbeddingInputs, position_ids_1N, visibility, cache
    ) -> torch.Tensor:
        """As `Policy.hidden_at`."""
        policy, count = self._policy(), len(chosen_N)
        if position_ids_1N.shape[1] < FEWEST:
            return policy.hidden_at(chosen_N, inputs_1N, position_ids_1N, visibility, cache)
        if count < FEWEST:
            last_N = chosen_N[-1:] if count else chosen_N.new_zeros(1)
            chosen_N = torch.cat([chosen_N, last_N.expand(FEWEST - count)])
        token = _RUNNING.set(_Running(visibility, cache))
        try:
            return self._run(policy, chosen_N, inputs_1N.token, position_ids_1N)[:count]
        finally:
            _RUNNING.reset(token)


_COMPILED: weakref.WeakKeyDictionary[Any, CompiledForward] = weakref.WeakKeyDictionary()


def compiled_forward(policy: Decodable) -> CompiledForward:
    """The compiled forward of a model, made at the first call. Raises ConfigError for a model that cannot be compiled, and
    on a machine without a compiler."""
    if policy not in _COMPILED:
        _refuse(policy)
        _COMPILED[policy] = CompiledForward(policy)
    return _COMPILED[policy]


def _refuse(policy: Decodable) -> None:
    if policy.compile_problem is not None:
        raise ConfigError(f"decode.compile true with {policy.compile_problem}, or set decode.compile to false")
    compiler = os.environ.get("CXX", "g++")
    if BACKEND == "inductor" and policy.device.type == "cpu" and shutil.which(compiler) is None:
        raise ConfigError(
            f"decode.compile true: torch.compile needs the C++ compiler {compiler}, which is not installed; install it "
            "(`apt-get install g++`, `conda install gxx`) or name another one in CXX, or set decode.compile to false"
        )
