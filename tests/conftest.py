"""Triton runs in its interpreter where there is no GPU, so every kernel is tested on every machine."""

import os
import sys

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure():
    from vlcore.kernels import launch

    if launch.AVAILABLE and launch.INTERPRETED:
        from interpreter import count_with_numpy, patch_once, teach_bfloat16

        teach_bfloat16()
        count_with_numpy()
        patch_once()


def pytest_collectstart():
    """What a module makes as it is imported is the same in every run, whatever was imported before."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def same_random_numbers():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def decided_anew():
    """Tests change what kernels say that they can run, and how they are launched."""
    from vlcore import native

    native.Kinds.forget()
    yield
    native.Kinds.forget()


@pytest.fixture(autouse=True)
def cuda_on_cpu(request, monkeypatch):
    """Without a GPU, tests of the "cuda" backend run its kernels on the CPU."""
    parameters = getattr(getattr(request.node, "callspec", None), "params", {})
    if parameters.get("backend") == "cuda" and DEVICE == "cpu" and sys.platform == "linux":
        from cuda_on_cpu import run_on_cpu

        run_on_cpu(monkeypatch)


@pytest.fixture
def graphs(monkeypatch):
    """CUDA graphs without a GPU: a list of launches for each that is captured, which compute on a CPU."""
    from vlcore import cuda_graph

    made = []

    def captured(function, device):
        result, launches = function(), []
        made.append(launches)

        def launch():
            result.copy_(function())
            launches.append(device)

        return launch, result

    monkeypatch.setattr(cuda_graph, "captured", captured)
    monkeypatch.setattr(cuda_graph, "can_be_captured", lambda *tensors: True)
    return made
