"""CUDA graphs: when one is captured and launched, on any machine; that they compute the same, on a GPU."""

import pytest
import torch
from conftest import DEVICE

from vlcore import cuda_graph
from vlcore.cuda_graph import CudaGraphs


@pytest.fixture
def doubled():
    """A function that notes the arguments it is called with."""
    calls = []

    def function(x, y):
        calls.append(x)
        return 2 * x + y

    function.calls = calls
    return function


@torch.no_grad()
def test_the_second_call_is_captured(graphs, doubled):
    run = CudaGraphs(doubled)
    results = []
    for number in (1.0, 2.0, 3.0, 4.0):
        results.append(run(torch.full((3,), number), torch.ones(3)))
        assert [len(launches) for launches in graphs] == ([] if number < 2 else [number - 1])
    # What a call has returned no later one writes to.
    assert [result.tolist() for result in results] == [[2 * number + 1] * 3 for number in (1.0, 2.0, 3.0, 4.0)]


@torch.no_grad()
def test_each_form_has_its_graph(graphs, doubled):
    run = CudaGraphs(doubled)
    forms = [torch.ones(3), torch.ones(2), torch.ones(3, dtype=torch.float64), torch.ones(3, 1)]
    for _ in range(3):
        for x in forms:
            assert torch.equal(run(x, x), 3 * x)
    assert [len(launches) for launches in graphs] == [2, 2, 2, 2]


@torch.no_grad()
def test_no_more_forms_are_kept_than_asked_for(graphs, doubled):
    run = CudaGraphs(doubled, most=1)
    for _ in range(3):
        assert torch.equal(run(torch.ones(2), torch.ones(2)), torch.full((2,), 3.0))
        assert torch.equal(run(torch.ones(5), torch.ones(5)), torch.full((5,), 3.0))
    assert [len(launches) for launches in graphs] == [2]


def test_nothing_is_captured_where_gradients_are_recorded(graphs, doubled):
    x = torch.ones(3, requires_grad=True)
    run = CudaGraphs(doubled)
    for _ in range(3):
        (grad,) = torch.autograd.grad(run(x, x).sum(), x)
        assert grad.tolist() == [3.0] * 3
    assert not graphs and len(doubled.calls) == 3


@torch.no_grad()
def test_a_function_that_cannot_be_captured_is_called(graphs, doubled, monkeypatch):
    attempts = []

    def captured(function, device):
        attempts.append(device)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(cuda_graph, "captured", captured)
    run = CudaGraphs(doubled)
    run(torch.ones(3), torch.ones(3))
    with pytest.warns(UserWarning, match="without a CUDA graph, and slower: operation not permitted"):
        assert run(torch.ones(3), torch.ones(3)).tolist() == [3.0] * 3
    assert run(torch.zeros(3), torch.ones(3)).tolist() == [1.0] * 3
    assert len(attempts) == 1


@torch.no_grad()
def test_on_a_cpu_it_is_the_function(doubled):
    run = CudaGraphs(doubled)
    for _ in range(3):
        assert run(torch.ones(3), torch.ones(3)).tolist() == [3.0] * 3
    assert len(doubled.calls) == 3


@pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU")
@torch.no_grad()
def test_a_graph_computes_the_same(doubled):
    run = CudaGraphs(lambda x, y: doubled(x, y).softmax(-1))
    for seed in range(4):
        x, y = torch.randn(2, 64, 64, device="cuda", generator=torch.Generator("cuda").manual_seed(seed))
        assert torch.equal(run(x, y), (2 * x + y).softmax(-1))
    # Once as it was, and once captured.
    assert len(doubled.calls) == 2
