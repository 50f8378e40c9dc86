"""Work that is repeated on an accelerator: its kernels are recorded once and launched together from then on.

Small kernels take the host longer to launch than the device to run. A CUDA graph launches a whole sequence of them at
the price of about one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor


class Replay:
    """Repeats work that changes tensors in place and never waits for the device.

    On CUDA it runs on a stream of its own, so that several of them share the device: once as it is made, which warms
    up, and then as a recorded graph. Elsewhere it is simply called. What it works on is made on the current stream.

    Args:
        work: What to repeat.
        device: Where its tensors are.
    """

    def __init__(self, work: Callable[[], None], device: torch.device) -> None:
        self._work = work
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream: torch.cuda.Stream | None = None  # of which a context changes nothing
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._stream.wait_stream(torch.cuda.current_stream(device))
            self._capture(self._stream)

    @property
    def captured(self) -> bool:
        """Whether it is a graph that is launched."""
        return self._graph is not None

    def __call__(self, times: int) -> None:
        """Repeat the work so often, without waiting for its end."""
        with torch.cuda.stream(self._stream):
            for _ in range(times):
                if self._graph:
                    self._graph.replay()
                else:
                    self._work()

    def read(self, flags: Tensor) -> bool:
        """Wait for the work's end and read whether any of the flags that it sets is up."""
        with torch.cuda.stream(self._stream):
            return bool(flags.any())

    def _capture(self, stream: torch.cuda.Stream) -> None:
        with torch.cuda.stream(stream):
            self._work()
        graph = torch.cuda.CUDAGraph()
        try:
            with (
                torch.cuda.device(stream.device),
                torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
            ):
                self._work()
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            warnings.warn(f"no CUDA graph of the descent, its steps are launched one by one: {reason}", stacklevel=2)
        else:
            self._graph = graph
