"""Work that is repeated on an accelerator: its kernels are recorded once and launched together from then on.

Small kernels take the host longer to launch than the device to run. A CUDA graph launches a whole sequence of them at
the price of about one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch


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

    def wait(self) -> None:
        """Wait until the device has done the work."""
        if self._stream:
            self._stream.synchronize()

    def _capture(self, stream: torch.cuda.Stream) -> None:
        # Not by torch.cuda.graph, which collects garbage and empties caches first: that takes longer than a descent.
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            self._work()
            stream.synchronize()
            try:
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    self._work()
                finally:
                    graph.capture_end()
            except RuntimeError as error:
                reason = str(error).partition("\n")[0]
                warnings.warn(f"without a CUDA graph, each operation is launched by itself: {reason}", stacklevel=2)
            else:
                self._graph = graph
