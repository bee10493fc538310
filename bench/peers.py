"""What a user would run instead of the models: transformers on the very same weights, and our own torch references."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import nn

from vlcore import layouts, native, ops
from vlcore.models import DeepSeekVL

OURS, TORCH_BACKEND, TORCH_COMPILED = "vlcore", "torch backend", "torch.compile"
EAGER, SDPA = "transformers eager", "transformers SDPA"
COMPILED = "transformers SDPA, torch.compile"


def public_twin(model: DeepSeekVL, attention: str) -> nn.Module:
    """transformers' model of the same config, whose parameters are views of `model`'s: no weight exists twice.

    Args:
        attention: transformers' name of an implementation: "eager" or "sdpa".

    Raises:
        ImportError: transformers or accelerate is not installed.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForImageTextToText

    from vlcore.bench.public_models import public_config

    with TemporaryDirectory() as folder, init_empty_weights(include_buffers=False):
        public = AutoModelForImageTextToText.from_config(public_config(model.config, Path(folder))).eval()
    public.set_attn_implementation(attention)
    parameters = dict(model.named_parameters())
    strays = {name for name, _ in public.named_parameters()}
    for binding in layouts.bindings(model.config, "transformers"):
        if binding.parameter is None:
            continue
        weight = parameters[binding.parameter].detach()
        weight = weight if binding.rows is None else weight[binding.rows]
        owner, _, name = binding.key.rpartition(".")
        setattr(public.get_submodule(owner), name, nn.Parameter(weight.view(binding.shape), requires_grad=False))
        strays.discard(binding.key)
    for key, buffer in list(public.named_buffers()):
        owner, _, name = key.rpartition(".")
        setattr(public.get_submodule(owner), name, buffer.to(weight.device))
    assert all(layouts.is_never_applied(name) for name in strays), strays
    return public


@contextmanager
def torch_backend() -> Iterator[None]:
    """Within it "auto" finds no kernels: every operator runs its torch reference."""
    tables = [import_module(f"vlcore.ops.{name}").KERNELS for name in operators()]
    kept = [dict(table) for table in tables]
    native.Kinds.forget()
    try:
        for table in tables:
            table.clear()
        yield
    finally:
        native.Kinds.forget()
        for table, kernels in zip(tables, kept, strict=True):
            table.update(kernels)


def operators() -> list[str]:
    """The operators of vlcore.ops: those that stand in a module of their own name."""
    return [name for name in ops.__all__ if find_spec(f"vlcore.ops.{name}")]
