"""CUDA graphs: when one is captured and launched, on any machine; that they compute the same, on a GPU."""

import subprocess
import sys

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
def test_what_is_captured_has_been_prepared_as_it_is(graphs, doubled):
    """Kernels are compiled for strides and beginnings, which a form says nothing of."""
    run, x = CudaGraphs(doubled), torch.ones(5, 3)
    for given in (x[:, :2], x[1:, 1:], x.T[:2].T[:4], x[:4, :2].contiguous()):
        assert torch.equal(run(given[:4], given[:4]), torch.full((4, 2), 3.0))
    assert len(graphs) == 1
    assert all(given.is_contiguous() and given.data_ptr() % 16 == 0 for given in doubled.calls)


@torch.no_grad()
def test_each_form_has_its_graph(graphs, doubled):
    run = CudaGraphs(doubled)
    forms = [torch.ones(3), torch.ones(2), torch.ones(3, dtype=torch.float64), torch.ones(3, 1)]
    for _ in range(3):
        for x in forms:
            assert torch.equal(run(x, x), 3 * x)
    assert [len(launches) for launches in graphs] == [2, 2, 2, 2]


@torch.no_grad()
def test_the_oldest_makes_room(graphs, doubled):
    run = CudaGraphs(doubled, most=1)
    for size in (2, 2, 5, 5, 5, 2, 2):
        assert torch.equal(run(torch.ones(size), torch.ones(size)), torch.full((size,), 3.0))
    assert [len(launches) for launches in graphs] == [1, 2, 2]


@pytest.mark.parametrize("modes", [(torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)])
def test_captured_in_one_mode_and_called_in_the_other(graphs, doubled, modes):
    run = CudaGraphs(doubled)
    for number, mode in enumerate(modes, 1):
        with mode():
            for _ in range(2):
                x = torch.full((3,), float(number))
                assert torch.equal(run(x, x), 3 * x)
    assert [len(launches) for launches in graphs] == [3]


@torch.no_grad()
def test_a_call_that_fails_prepares_nothing(graphs):
    def function(x):
        if not failed:
            failed.append(x)
            raise MemoryError
        return x + 1

    failed, run = [], CudaGraphs(function)
    with pytest.raises(MemoryError):
        run(torch.ones(3))
    run(torch.ones(3))
    assert not graphs
    assert run(torch.ones(3)).tolist() == [2.0] * 3 and len(graphs) == 1


def test_takes_functions_to_a_tensor():
    with pytest.raises(TypeError, match="takes a function that returns a tensor; this gave .*tuple"):
        CudaGraphs(lambda x: (x, x))(torch.ones(3))


def test_nothing_is_captured_where_gradients_are_recorded(graphs, doubled):
    x = torch.ones(3, requires_grad=True)
    run = CudaGraphs(doubled)
    for _ in range(3):
        (grad,) = torch.autograd.grad(run(x, x).sum(), x)
        assert grad.tolist() == [3.0] * 3
    assert not graphs and len(doubled.calls) == 3


@torch.no_grad()
def test_says_why_a_function_cannot_be_captured(graphs, doubled, monkeypatch):
    def captured(function, device):
        try:
            raise RuntimeError("operation not permitted when stream is capturing")
        finally:
            raise RuntimeError("capture failed")

    monkeypatch.setattr(cuda_graph, "captured", captured)
    run = CudaGraphs(doubled)
    run(torch.ones(3), torch.ones(3))
    with pytest.raises(RuntimeError, match=r"operation not permitted .*vlcore.cuda_graph.enabled = False goes without"):
        run(torch.ones(3), torch.ones(3))
    monkeypatch.setattr(cuda_graph, "enabled", False)
    assert run(torch.zeros(3), torch.ones(3)).tolist() == [1.0] * 3


@torch.no_grad()
def test_on_a_cpu_it_is_the_function(doubled):
    run = CudaGraphs(doubled)
    for _ in range(3):
        assert run(torch.ones(3), torch.ones(3)).tolist() == [3.0] * 3
    assert len(doubled.calls) == 3


on_a_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU")


@on_a_gpu
@torch.no_grad()
def test_graphs_compute_the_same(doubled):
    """Two instances and two forms in turns, one of them made after many others have come and gone."""

    def product(x, y):
        return (doubled(x, y) @ y).softmax(-1)

    old = CudaGraphs(product)
    for turn in range(40):
        run = CudaGraphs(product)
        for size in (64, 96):
            x, y = torch.randn(2, size, size, device="cuda")
            for graph in (run, run, run, old):
                assert torch.equal(graph(x, y), ((2 * x + y) @ y).softmax(-1)), turn
    # Of each instance and form once as it was, and once captured.
    assert len(doubled.calls) == 41 * 2 * 2


@on_a_gpu
def test_a_capture_that_fails_gives_the_stream_back():
    """In a process of its own, which it may leave unusable."""
    program = """
import torch
from vlcore.cuda_graph import CudaGraphs
x, stream = torch.ones(8, device="cuda"), torch.cuda.current_stream()
run = CudaGraphs(lambda x: x * x.sum().item())
with torch.no_grad():
    run(x)
    try:
        run(x)
    except RuntimeError as error:
        print(error)
assert torch.cuda.current_stream() == stream and (x + 1).tolist() == [2.0] * 8
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and "cannot be a CUDA graph" in done.stdout, done.stderr
