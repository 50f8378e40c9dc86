"""How alike the feature maps of a model are on given data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from convsim_init.errors import InputError
from convsim_init.functional.bank import accumulation_dtype, full_precision
from convsim_init.layers import tree
from convsim_init.layers.find import find_convolutions, refuse_lazy
from convsim_init.layers.forward.calls import convolution_outputs, per_axis
from convsim_init.layers.forward.code import is_from_library
from convsim_init.layers.forward.isolation import undisturbed
from convsim_init.layers.memory import has_no_data
from convsim_init.layers.names import unwrap
from convsim_init.layers.stored import unknown_hooks
from convsim_init.layers.symbolic.follow import follow
from convsim_init.layers.symbolic.uses import find_uses

VALUES_PER_CHUNK = 2**22  # how much of the feature maps is copied at once
COPIED = 2**30  # parameters of no more bytes than that are all copied before a forward pass


@torch.no_grad()
def measure_feature_correlation(
    model: nn.Module, batch: Tensor | tuple[object, ...] | list[object] | Mapping[str, object]
) -> dict[str, float]:
    """Mean absolute correlation between the feature maps of every convolution, before its activation, on a batch.

    The model runs once, in the mode it is in: batch norm in training mode normalizes by the batch. Correlations are
    centred, over the batch and all positions, and over all calls where a module is called several times. Every two
    feature maps of a layer form a pair, those of different groups too, but constant ones none. Nothing is changed,
    also after an error: what the pass does to parameters, buffers, running statistics among them, attributes and random
    states is put back.

    Args:
        model: Any module; wrappers such as DistributedDataParallel and torch.compile are looked through.
        batch: Passed to the model: a tensor as its argument, a tuple or list as its arguments, a mapping as its
            keyword arguments; on the model's device.

    Returns:
        From 0 to 1 for each convolution, by its dotted name. Those that did not run, with complex feature maps, or
        with fewer than two that vary are not in it. NaN where feature maps hold infinities or NaN.

    Raises:
        InputError: If the model has no convolution, none ran or they give no data, or there is a lazy module, which
            running would change.
        Exception: What the model itself raises when it is given the batch.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        >>> correlations = ci.measure_feature_correlation(model, torch.randn(4, 3, 16, 16))
        >>> 0 < correlations["0"] < 1
        True
    """
    modules = find_convolutions(model)
    model = unwrap(model)
    refuse_lazy(model)
    maps = {name: FeatureMaps(rank=len(per_axis(module, "kernel_size"))) for name, module in modules}

    def look(name: str, output: Tensor, bias: Tensor | None) -> None:
        if has_no_data(output):
            raise InputError("expected a model and a batch with data, got feature maps without: initialize it first")
        if not output.is_complex():
            maps[name].add(output)

    # From a weight without data PyTorch computes feature maps of whatever the memory holds.
    if any(_lacks_data(module) for _, module in modules):
        raise InputError("expected a model and a batch with data, got parameters without: initialize it first")
    with undisturbed(model, copy=_copied(model)), convolution_outputs(modules, look):
        _run(model, batch)
    if not any(layer_maps.count for layer_maps in maps.values()):
        raise InputError(
            "expected a model that calls its convolutions, got one whose forward pass called none of real numbers"
        )
    correlations = {name: layer_maps.mean_correlation() for name, layer_maps in maps.items()}
    return {name: value for name, value in correlations.items() if value is not None}


class FeatureMaps:
    """Sums over the feature maps of one layer: their covariance, without keeping them.

    The sums of chunks are merged as by Chan, Golub and LeVeque, *Updating formulae and a pairwise algorithm for
    computing sample variances* (1979): nothing cancels where means are large.
    """

    def __init__(self, rank: int) -> None:
        self.count = 0  # positions seen, over all samples
        self._rank = rank  # number of positional dimensions
        self._varies = self._origin = self._mean = self._scatter = torch.empty(0, device="cpu")
        self._unit = 1.0

    def add(self, output: Tensor) -> None:
        """Add the output of a convolution, ``[N, M, *positions]`` or that of one sample."""
        maps = (output if output.dim() == self._rank + 2 else output[None]).detach().flatten(2)  # [N, M, P]
        if maps.numel() == 0:
            return
        step = max(1, VALUES_PER_CHUNK // maps[0].numel())
        with full_precision(output.device):
            for start in range(0, len(maps), step):
                chunk = maps[start : start + step].to(accumulation_dtype(maps.dtype))
                self._merge(chunk.transpose(0, 1).flatten(1))

    def _merge(self, values: Tensor) -> None:
        filters, positions = values.shape  # [M, n]
        if self.count == 0:
            # Constant maps become exactly zero, and squares neither vanish nor overflow.
            self._origin = values[:, :1].clone()
            # An infinite unit would make all other maps zero and so constant: the result None, not NaN.
            self._unit = float((values - self._origin).abs().nan_to_num(0, 0).max()) or 1.0
            self._mean = values.new_zeros(filters)
            self._scatter = values.new_zeros(filters, filters)
            self._varies = values.new_zeros(filters, dtype=torch.bool)
        values = (values - self._origin).div_(self._unit)
        self._varies |= values.ne(0).any(1)
        mean = values.mean(1)
        values -= mean[:, None]
        self._scatter.addmm_(values, values.T)
        shift, total = mean - self._mean, self.count + positions
        # S = S_a + S_b + n_a n_b / n (m_b - m_a)(m_b - m_a)^T, of counts n, means m and scatters S.
        self._scatter.addr_(shift, shift, alpha=self.count * positions / total)
        self._mean += shift * (positions / total)
        self.count = total

    def mean_correlation(self) -> float | None:
        """Mean absolute correlation over pairs of maps that vary; None without a pair."""
        alive = int(self._varies.sum())
        if alive < 2:
            return None
        scatter = self._scatter[self._varies][:, self._varies]  # [M, M]
        deviations = scatter.diagonal().sqrt()
        correlations = scatter.div_(deviations).div_(deviations[:, None]).abs_()
        return (float(correlations.sum()) - float(correlations.diagonal().sum())) / (alive * (alive - 1))


def _lacks_data(part: nn.Module) -> bool:
    """Whether its parameters have no data, and neither a hook nor what wraps its forward pass may fetch it."""
    lacking = any(map(has_no_data, tree.parameters(part)))
    return lacking and not (part._forward_pre_hooks or "forward" in vars(part))


def _copied(model: nn.Module) -> Callable[[Tensor], bool]:
    """Which tensors to copy before a forward pass: all, but in a very large model no parameter that it leaves alone."""
    if sum(parameter.nbytes for parameter in tree.parameters(model)) <= COPIED:
        return lambda _: True
    followed = follow(model)
    uses, parts = find_uses(followed), followed.modules
    written = uses.changed | {
        id(tensor) for name, part in parts.items() for tensor in _may_be_written(part, name in uses.ran)
    }
    return lambda tensor: id(tensor) in written or not isinstance(tensor, nn.Parameter)


def _may_be_written(part: nn.Module, ran: bool) -> Iterable[Tensor | None]:
    """Parameters that a module's forward pass may change, beside those that it was seen to change where it ran."""
    of_torch = is_from_library(type(part))
    if unknown_hooks(part) or part._forward_hooks or not (of_torch or ran):
        return tree.parameters(part)
    return () if of_torch else part._parameters.values()


def _run(model: nn.Module, batch: object) -> None:
    """A forward pass with copies of the buffers, because buffers made in inference mode cannot be written to."""
    clones = {id(buffer): buffer.clone() for buffer in tree.buffers(model)}
    buffers = {name: clones[id(buffer)] for name, buffer in tree.named_buffers(model, remove_duplicate=False)}
    named, given = (dict(batch), ()) if isinstance(batch, Mapping) else ({}, batch)
    arguments = tuple(given) if isinstance(given, (tuple, list)) else (given,)
    # Ties need not be found, which would call methods of the model: all names of each buffer are given.
    functional_call(model, buffers, arguments, named, tie_weights=False)
