"""What Python would launch kernel by kernel on a GPU, as one launch."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class CudaGraphs:
    """A function of tensors, called as it is; on a GPU it becomes a CUDA graph for each form of its arguments.

    A step of decoding, or an image in an encoder, is hundreds of kernels, and Python can take longer to launch them
    than they run. The first call with tensors of some shapes and dtypes is made as it is, and prepares what a kernel's
    first launch needs; the second is captured, and from then on all are one launch. On other devices, and where
    gradients are recorded, nothing is captured.

    Whatever else the function reads or writes, such as weights and caches, has to stay where it is in memory: after a
    model is moved, quantised or cast, make a new one. Each form keeps the memory that its kernels work in.

        encode = CudaGraphs(model.encode_images)
        with torch.inference_mode():
            features = encode(pixels)
    """

    def __init__(self, function: Callable[..., Tensor], most: int = 8):
        """
        Args:
            function: of tensors alone, to a tensor. It must not wait for the GPU, as `item` and `nonzero` do.
            most: forms that are kept; calls with any other are made as they are.
        """
        self._function, self._most = function, most
        # A form that was seen once, or cannot be captured, has no graph.
        self._graphs: dict[tuple, _Graph | None] = {}

    def __call__(self, *tensors: Tensor) -> Tensor:
        """What the function returns for these; a tensor of its own each time."""
        if not self._captures(*tensors):
            return self._function(*tensors)
        form = tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in tensors)
        if form not in self._graphs:
            if len(self._graphs) < self._most:
                self._graphs[form] = _Graph()
            return self._function(*tensors)
        graph = self._graphs[form]
        if graph is not None and not graph.is_captured:
            try:
                graph.capture(self._function, tensors)
            except RuntimeError as error:
                graph = self._graphs[form] = None
                warnings.warn(f"Goes on without a CUDA graph, and slower: {error}", stacklevel=2)
        return self._function(*tensors) if graph is None else graph.replay(tensors)

    @staticmethod
    def _captures(*tensors: Tensor) -> bool:
        return not torch.is_grad_enabled() and all(tensor.is_cuda for tensor in tensors)


class _Graph:
    """The kernels of one call, with the memory that they read the arguments from and leave the result in."""

    def __init__(self) -> None:
        self._launch: Callable[[], Any] | None = None

    @property
    def is_captured(self) -> bool:
        return self._launch is not None

    def capture(self, function: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> None:
        given = [tensor.clone() for tensor in tensors]
        self._launch, self._result = captured(lambda: function(*given), tensors[0].device)
        self._given = given

    def replay(self, tensors: tuple[Tensor, ...]) -> Tensor:
        assert self._launch is not None
        for given, tensor in zip(self._given, tensors, strict=True):
            given.copy_(tensor)
        self._launch()
        return self._result.clone()


def captured(function: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """What launches a function's kernels, and the tensor that they write each time."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    # Other threads, such as those that pin a loader's batches, do not concern it.
    with torch.cuda.device(device), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        result = function()
    return graph.replay, result
