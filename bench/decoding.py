"""One token of the 1.3B behind a prompt, its weights as they are, in 8 and in 4 bits, beside transformers."""

import copy
from collections.abc import Iterator
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from vlcore.bench.models import PROMPT, EndToEnd, Run, fill, prompt, random_model, twins_of, widened, wider
from vlcore.bench.peers import COMPILED, OURS, SDPA, torch_backend
from vlcore.config import preset
from vlcore.decoding import KVCache, next_logits
from vlcore.models import DeepSeekVL, quantize

BITS = {"vlcore, int8": 8, "vlcore, int4": 4}


def decode(dtype: torch.dtype, device: str, compiled: bool) -> Iterator[EndToEnd]:
    """One token of the 1.3B behind a prompt, with weights as they are, in 8 and in 4 bits."""
    model = random_model(preset("deepseek_vl_1_3b"), dtype, device)
    # A copy, in memory as torch gives it: ours lies on huge pages.
    twins = twins_of(copy.deepcopy(model), compiled)
    ids = prompt(model, device)
    token = ids[:, :1]
    models = {OURS: model}
    for name, bits in BITS.items():
        models[name] = _shallow(model)
        quantize(models[name], bits)
    caches = {name: fill(variant, ids)[0] for name, variant in models.items()}
    ours = {name: _next_token(variant, caches[name], token) for name, variant in models.items()}
    peers = {name: _public_next_token(twin, ids, token, name == COMPILED) for name, twin in twins.items()}
    checks = [(ours[OURS], peers[SDPA], lambda: _public_next_token(widened(twins[SDPA], wider(dtype)), ids, token)())]
    for name in BITS:
        narrow, wide = (_by_references(models[name], ids, token, kind) for kind in (dtype, wider(dtype)))
        checks.append((ours[name], narrow, wide))
    yield EndToEnd(
        what="decode, 1.3B",
        shape=f"a token behind {PROMPT}",
        ours=ours,
        peers=peers,
        checks=checks,
        bytes={name: _bytes_read(variant, caches[name]) for name, variant in models.items()},
    )


def _shallow(model: DeepSeekVL) -> DeepSeekVL:
    """A model of its own modules, to be quantised, that shares every weight."""
    memo = {id(parameter): parameter for parameter in model.parameters()}
    return copy.deepcopy(model, memo)


def _next_token(model: DeepSeekVL, cache: KVCache, token: Tensor) -> Run:
    """Our step; the cache does not keep the token."""
    step = next_logits(model, cache)
    return lambda: step(token[:, 0])


def _public_next_token(twin: Any, ids: Tensor, token: Tensor, compiled: bool = False) -> Run:
    """transformers' step; what it appends to its cache is taken off again, which moves nothing."""
    cache: Any = None
    forward = torch.compile(twin.forward, dynamic=False) if compiled else twin.forward
    # Its name since transformers 5.24, and before.
    name = "cache" if "cache" in signature(twin.forward).parameters else "past_key_values"

    def run() -> Tensor:
        nonlocal cache
        if cache is None:
            cache = getattr(twin(input_ids=ids, use_cache=True, logits_to_keep=1), name)
        logits = forward(input_ids=token, use_cache=True, logits_to_keep=1, **{name: cache}).logits
        cache.crop(-1)
        return logits[:, -1]

    return run


def _by_references(model: DeepSeekVL, ids: Tensor, token: Tensor, dtype: torch.dtype) -> Run:
    """The same step by the torch references, prompt included, computed in `dtype`."""

    def run() -> Tensor:
        with torch_backend():
            kept, model.compute_dtype = model.compute_dtype, dtype
            try:
                cache, operands = fill(model, ids)[0], model.language.operands(dtype)
                return model.lm_head(model.decode(token[:, 0], operands, cache.keys, cache.values, cache.lengths))
            finally:
                model.compute_dtype = kept

    return run


def _bytes_read(model: DeepSeekVL, cache: KVCache) -> int:
    """What a token cannot but read: every weight of the layers and the head, and the cache."""
    modules = (model.language.layers, model.lm_head)
    weights = (tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))
    read = PROMPT / cache.capacity
    return sum(w.nbytes for w in weights) + round(read * sum(kv.nbytes for kv in (*cache.keys, *cache.values)))
