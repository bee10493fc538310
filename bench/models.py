"""The models end to end, with random weights at their real sizes, beside transformers on the same weights.

Outputs are held against a wider dtype before anything is timed: ours may err twice as far as the peer's.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from vlcore.bench.accuracy import assert_as_accurate
from vlcore.bench.harness import Measurement, dtype_name, split
from vlcore.bench.peers import COMPILED, EAGER, OURS, SDPA, public_twin
from vlcore.bench.public_models import make_telling, public_inputs
from vlcore.bench.timing import waited, working_memory
from vlcore.config import VLConfig, preset
from vlcore.costs import head_flops, image_flops, llama_flops
from vlcore.cuda_graph import CudaGraphs
from vlcore.decoding import KVCache
from vlcore.models import DeepSeekVL
from vlcore.native import prefer_huge_pages

PROMPT = 640
GRAPH = "vlcore, CUDA graph"
Run = Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class EndToEnd:
    """One thing that a model does, run by us and by others.

    Attributes:
        ours, peers: what is timed, by name.
        checks: of each of ours (a run of ours, one that it may err twice as far as, the truth).
        bytes: of the weights that a run reads, by name of ours, where memory bounds it.
    """

    what: str
    shape: str
    ours: Mapping[str, Run]
    peers: Mapping[str, Run]
    checks: Sequence[tuple[Run, Run, Run]]
    flops: float = 0
    bytes: Mapping[str, float] = field(default_factory=dict)
    memory: bool = False
    trains: bool = False


def measure(case: EndToEnd, dtype: torch.dtype, device: str) -> Iterator[Measurement]:
    """Check, then time; one measurement for each of ours.

    Raises:
        AssertionError: an output is not as accurate as the peer's; nothing is timed then.
    """
    with torch.inference_mode(not case.trains):
        if device == "cuda" and not case.trains:
            # The first call is no CUDA graph yet, which is what is to be checked and timed.
            for run in case.ours.values():
                run()
        for ours, baseline, exact in case.checks:
            assert_as_accurate(ours(), baseline(), exact().double())
        every = {**case.ours, **case.peers}
        seconds, quartiles = split(waited(every, device))
        # What a graph works in, it holds between calls too.
        measured = [name for name in every if case.memory and name != GRAPH]
        memory = {name: working_memory(every[name], device) for name in measured}
    for name in case.ours:
        yield Measurement(
            operator=case.what,
            shape=case.shape,
            dtype=dtype_name(dtype),
            trains=case.trains,
            ours=name,
            seconds={other: time for other, time in seconds.items() if other == name or other in case.peers},
            quartiles={other: two for other, two in quartiles.items() if other == name or other in case.peers},
            flops=case.flops,
            bytes=case.bytes.get(name, 0),
            memory=memory,
        )


def random_model(config: VLConfig, dtype: torch.dtype, device: str) -> DeepSeekVL:
    """A model of random weights in eval mode, in memory as `from_pretrained` takes it."""
    with torch.device("meta"):
        model = DeepSeekVL(config).to(dtype)
    model = model.to_empty(device=device).eval()
    for parameter in model.parameters():
        prefer_huge_pages(parameter.detach())
    make_telling(model)
    return model


def wider(dtype: torch.dtype) -> torch.dtype:
    """What is as good as exact beside `dtype`, at a cost that whole models bear."""
    return torch.float64 if dtype == torch.float32 else torch.float32


def widened(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a module in a wider dtype; no parameter is copied as it is first."""
    memo = {id(p): nn.Parameter(p.detach().to(dtype), requires_grad=False) for p in module.parameters()}
    return copy.deepcopy(module, memo).to(dtype)


def twins_of(model: DeepSeekVL, compiled: bool) -> dict[str, nn.Module]:
    twins = {EAGER: public_twin(model, "eager"), SDPA: public_twin(model, "sdpa")}
    if compiled:
        twins[COMPILED] = public_twin(model, "sdpa")
    return twins


def vision(dtype: torch.dtype, device: str, compiled: bool) -> Iterator[EndToEnd]:
    """One image through SAM-B with its two necks, SigLIP-L, and the whole hybrid encoder of the 1.3B."""
    config = preset("deepseek_vl_1_3b_hybrid")
    model = random_model(replace(config, language=replace(config.language, num_layers=1)), dtype, device)
    twins = twins_of(model, compiled)
    exact = widened(twins[SDPA], wider(dtype))
    pixels = torch.rand(1, 3, config.image_size, config.image_size, device=device)
    low = torch.rand(1, 3, config.siglip.image_size, config.siglip.image_size, device=device)
    given = public_inputs(config, pixels)
    low_given = (low - 0.5) / 0.5
    flops = image_flops(config)

    own_sam = model.vision.sam
    assert own_sam and config.sam
    first_global = config.sam.global_layers[0]

    def sam(twin: Any, pixels: Tensor) -> Tensor:
        found = twin.model.high_res_vision_model(pixels, output_hidden_states=True)
        tapped = found.hidden_states[first_global + 1]
        return torch.cat((found.last_hidden_state, twin.model.high_res_vision_neck(tapped)))

    def siglip(twin: Any, pixels: Tensor) -> Tensor:
        return twin.model.vision_model(pixels).last_hidden_state

    def whole(twin: Any, low: Tensor, high: Tensor) -> Tensor:
        return twin.model.get_image_features(low, high, return_dict=True).pooler_output

    yield _against(
        twins,
        exact,
        sam,
        (given["high_res_pixel_values"],),
        dtype,
        what="SAM-B encode",
        shape="1 image",
        flops=flops["sam"],
        memory=True,
        ours=_in_both_ways(lambda pixels: torch.cat(own_sam(pixels, dtype)), pixels),
    )
    yield _against(
        twins,
        exact,
        siglip,
        (low_given,),
        dtype,
        what="SigLIP-L encode",
        shape="1 image",
        flops=flops["siglip"],
        ours=_in_both_ways(lambda low: model.vision.siglip(low, dtype), low),
    )
    yield _against(
        twins,
        exact,
        whole,
        (given["pixel_values"], given["high_res_pixel_values"]),
        dtype,
        what="hybrid vision encode",
        shape="1 image",
        flops=sum(flops.values()),
        memory=True,
        ours=_in_both_ways(model.encode_images, pixels),
    )


def _in_both_ways(encode: Callable[[Tensor], Tensor], pixels: Tensor) -> dict[str, Run]:
    """Launched kernel by kernel, as transformers is, and on a GPU as one CUDA graph too."""
    ways: dict[str, Run] = {OURS: lambda: encode(pixels)}
    if pixels.is_cuda:
        graphs = CudaGraphs(encode)
        ways[GRAPH] = lambda: graphs(pixels)
    return ways


def _against(
    twins: Mapping[str, nn.Module],
    exact: Any,
    call: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    dtype: torch.dtype,
    ours: Mapping[str, Run],
    **described,
) -> EndToEnd:
    """Ours, in one way or more, beside the same call of every twin."""
    narrow = tuple(x.to(dtype) for x in inputs)

    def run(name: str, twin: Any) -> Run:
        # On a GPU, with the CUDA graphs that torch.compile makes.
        mode = "reduce-overhead" if narrow and narrow[0].is_cuda else None
        function: Any = torch.compile(call, mode=mode) if name == COMPILED else call
        return lambda: function(twin, *narrow)

    peers = {name: run(name, twin) for name, twin in twins.items()}
    return EndToEnd(
        ours=ours,
        peers=peers,
        checks=[
            (run_ours, peers[SDPA], lambda: call(exact, *(x.to(wider(dtype)) for x in inputs)))
            for run_ours in ours.values()
        ],
        **described,
    )


def prefill(dtype: torch.dtype, device: str, compiled: bool) -> Iterator[EndToEnd]:
    """A prompt through the 1.3B's language model into its cache, and the logits behind it."""
    model = random_model(preset("deepseek_vl_1_3b"), dtype, device)
    twins = twins_of(model, compiled)
    exact = widened(twins[SDPA], wider(dtype))
    ids = prompt(model, device)

    def call(twin: Any) -> Tensor:
        return twin(input_ids=ids, use_cache=True, logits_to_keep=1).logits[:, -1]

    language = model.config.language
    yield _against(
        twins,
        exact,
        call,
        (),
        dtype,
        what="prefill, 1.3B",
        shape=f"{PROMPT} tokens",
        flops=llama_flops(language, PROMPT) + head_flops(language, 1),
        ours={OURS: lambda: fill(model, ids)[1]},
    )


def prompt(model: DeepSeekVL, device: str) -> Tensor:
    return torch.randint(model.config.image_token_id, (1, PROMPT), device=device)


@torch.inference_mode()
def fill(model: DeepSeekVL, ids: Tensor) -> tuple[KVCache, Tensor]:
    """The cache of a prompt, and the logits behind it."""
    cache = KVCache(model.config.language, 1, PROMPT + 8, model.compute_dtype, ids.device)
    cache.begin([ids.shape[1]])
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    hidden = model(ids, positions=positions, memory=cache, return_logits=False).hidden
    return cache, model.lm_head(hidden[:, -1])
