"""Launchers such as the kernels' own, which count how often they run, and what their calls launch."""

import pytest
import torch

from vlcore import native
from vlcore.kernels import launch

if not launch.AVAILABLE:
    pytest.skip("Triton is not installed", allow_module_level=True)
if native.signature() is None:
    pytest.skip("this build cannot tell what tensors look like: no call is repeated", allow_module_level=True)

import triton.language as tl
from recorder import ARGUMENTS_BEFORE

from vlcore.kernels import direct_launch, replay

SETTINGS = {"BLOCK": 16, "num_warps": 2}


def scaled(x_ptr, bias_ptr, out_ptr, size, scale, BLOCK: tl.constexpr):
    pass


class Launcher:
    """As a kernel's own, and counts how often it runs."""

    def __init__(self, kernel, body=None):
        self.kernel, self.body, self.runs = kernel, body, 0
        self.call = replay.remembered(self.run)

    def run(self, *arguments):
        self.runs += 1
        return (self.body or scale)(self.kernel, *arguments)


def start(kernel, x, bias, out, scale=1.0):
    direct_launch.run(kernel, (x.numel() // 16 + 1,), (x, bias, out), (x.numel(), scale), SETTINGS)


def scale(kernel, x, bias=None, factor=1.0):
    out = torch.empty_like(x)
    start(kernel, x, bias, out, factor)
    return out


def arguments(launched):
    return launched[ARGUMENTS_BEFORE:]


def called(driver, launcher, *given):
    """What a call gives back and launches."""
    driver.launches.clear()
    return launcher.call(*given), list(driver.launches)
