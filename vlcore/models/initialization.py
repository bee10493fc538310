"""Random weights to train a model from, all of it or none of it pretrained."""

import torch
from torch import nn

from vlcore.models.layers import RMSNorm

SUBLAYER_ENDS = (".attn.proj", ".mlp.fc2", ".self_attn.o_proj", ".mlp.down_proj")


@torch.no_grad()
def init_weights(model: nn.Module, seed: int) -> None:
    """Draw every parameter of a model or of a part of it, the same on every device.

    Linear maps, embeddings and positions are normal with a deviation of sqrt(2 / 5N), N their last dimension
    (SmallInit, arXiv 1910.05895): 0.014 at the 1.3B's width, and more in a narrow model, which learns several times
    slower from the usual 0.02. What ends a sublayer is scaled down by sqrt(2 * layers), so that the residual stream
    of a deep stack starts no wider than that of a shallow one (GPT-2, section 2.3). Convolutions keep the variance of
    their input. Biases and alpha, which mixes SAM's second branch in, are zero; norms are the identity. The paper
    starts from pretrained towers and is silent on all of it.
    """
    generator = torch.Generator().manual_seed(seed)
    depths = _depths(model)
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if name in ("bias", "alpha"):
                parameter.zero_()
            elif isinstance(module, (nn.LayerNorm, RMSNorm)):
                parameter.fill_(1.0)
            else:
                std = _deviation(module, parameter)
                if module_name.endswith(SUBLAYER_ENDS):
                    std /= (2 * depths[module_name]) ** 0.5
                values = torch.empty(parameter.shape, dtype=torch.float32).normal_(0.0, std, generator=generator)
                parameter.copy_(values)


def _deviation(module: nn.Module, parameter: nn.Parameter) -> float:
    if isinstance(module, nn.Conv2d):
        return parameter[0].numel() ** -0.5
    return (2 / (5 * parameter.shape[-1])) ** 0.5


def _depths(model: nn.Module) -> dict[str, int]:
    """Name of each module inside a stack of layers -> how many layers the stack has."""
    return {
        f"{stack_name}.{inner_name}".removeprefix("."): len(stack)
        for stack_name, stack in model.named_modules()
        if isinstance(stack, nn.ModuleList)
        for inner_name, _ in stack.named_modules()
    }
