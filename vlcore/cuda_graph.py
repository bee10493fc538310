"""What Python would launch kernel by kernel on a GPU, as one launch."""

from collections.abc import Callable

import torch
from torch import Tensor

# Whether functions become graphs at all; False calls them as they are.
enabled = True


class CudaGraphs:
    """A function of tensors, called as it is; on a GPU it becomes a CUDA graph for each form of its arguments.

    A step of decoding, or an image in an encoder, is hundreds of kernels, and Python can take longer to launch them
    than they run. The first call with tensors of some shapes and dtypes is made as it is, and prepares what a kernel's
    first launch needs; the second is captured, and from then on all are one launch. On other devices, and where
    gradients are recorded, nothing is captured.

    A graph reads and writes the memory that the capture found: of weights, caches, whatever the function uses besides
    its arguments. After a model is moved, cast or quantised, or computes in another dtype, make a new one: the old one
    reads memory that may be anybody's. Each form keeps the memory that its kernels work in. For one thread at a time.

        encode = CudaGraphs(model.encode_images)
        with torch.inference_mode():
            features = encode(pixels)
    """

    def __init__(self, function: Callable[..., Tensor], most: int = 8):
        """
        Args:
            function: of tensors alone, to a tensor. It must not wait for the GPU, as `item` and `nonzero` do.
            most: graphs that are kept; then the oldest makes room.
        """
        self._function, self._most = function, most
        self._called: set[tuple] = set()
        self._graphs: dict[tuple, _Graph] = {}

    def __call__(self, *tensors: Tensor) -> Tensor:
        """What the function returns for these; a tensor of its own each time.

        Raises:
            TypeError: the function returns something else than a tensor.
            RuntimeError: it cannot be captured. torch's allocator and generator are then no more to be counted on.
        """
        if not self._captures(*tensors):
            return self._run(tensors)
        form = tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in tensors)
        if form not in self._called:
            # On such tensors as will be captured: of others, a kernel's first launch may be that of another kernel.
            result = self._run(tuple(map(_copy, tensors)))
            self._called.add(form)
            return result
        if form not in self._graphs:
            try:
                graph = _Graph(self._function, tensors)
            except RuntimeError as error:
                # What ends a capture says only that it failed; why stands in what came before.
                cause = error.__context__ or error
                raise RuntimeError(
                    f"This cannot be a CUDA graph: {cause}. In a new process, vlcore.cuda_graph.enabled = False goes "
                    f"without, and slower."
                ) from cause
            if len(self._graphs) >= self._most:
                del self._graphs[next(iter(self._graphs))]
            self._graphs[form] = graph
        return self._graphs[form](tensors)

    def _run(self, tensors: tuple[Tensor, ...]) -> Tensor:
        result = self._function(*tensors)
        if not isinstance(result, Tensor):
            raise TypeError(f"CudaGraphs takes a function that returns a tensor; this gave {type(result)}.")
        return result

    @staticmethod
    def _captures(*tensors: Tensor) -> bool:
        """Whether calls with these may be a graph."""
        return (
            enabled and not torch.is_grad_enabled() and not torch.compiler.is_compiling() and can_be_captured(*tensors)
        )


def can_be_captured(*tensors: Tensor) -> bool:
    """Whether they are on one GPU, whose current stream nobody captures already."""
    devices = {tensor.device for tensor in tensors}
    return len(devices) == 1 and tensors[0].is_cuda and not torch.cuda.is_current_stream_capturing()


class _Graph:
    """The kernels of one call, with the memory that they read the arguments from and leave the result in."""

    def __init__(self, function: Callable[..., Tensor], tensors: tuple[Tensor, ...]):
        self._given = list(map(_copy, tensors))
        self._launch, self._result = captured(lambda: function(*self._given), tensors[0].device)

    def __call__(self, tensors: tuple[Tensor, ...]) -> Tensor:
        # Who captures in inference mode and calls without it may still write to what is kept here.
        with torch.inference_mode():
            for given, tensor in zip(self._given, tensors, strict=True):
                given.copy_(tensor)
            self._launch()
        return self._result.clone()


def _copy(tensor: Tensor) -> Tensor:
    """One that looks the same, whatever the strides and the beginning of those of its form."""
    return tensor.clone(memory_format=torch.contiguous_format)


def captured(function: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """What launches a function's kernels, and the tensor that they write each time.

    torch.cuda.graph would give all cached memory back to the driver first, and leave its stream behind where a capture
    fails.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    with torch.cuda.device(device):
        stream.wait_stream(torch.cuda.current_stream())
        # torch keeps cuBLAS's workspaces by stream, and streams come again: each graph is to have its own, in its pool.
        torch._C._cuda_clearCublasWorkspaces()
        with torch.cuda.stream(stream):
            # Other threads, such as those that pin a loader's batches, do not concern it.
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                result = function()
            finally:
                graph.capture_end()
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.current_stream().wait_stream(stream)
    return graph.replay, result
