"""`initializing`: the models that somebody else's code builds are initialized before it trains them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from convsim_init.errors import InputError
from convsim_init.initialize import initialize_layers
from convsim_init.layers import tree
from convsim_init.layers.find import find_layers, pair_obstacle, unselected
from convsim_init.layers.layer import Layer
from convsim_init.layers.names import bare_name, unwrap
from convsim_init.layers.obstacle import Cause, Obstacle
from convsim_init.parallel.processes import of_several_processes
from convsim_init.report.patterns import check_list, check_patterns
from convsim_init.report.report import Report
from convsim_init.settings import Settings, check_settings, check_type
from convsim_init.tracking.construction import Construction, Moment, UnmatchedError, left_alone
from convsim_init.tracking.history import History, open_histories

CHANGED = "changed after the optimizer was made, and treated as if it was drawn anew: exclude it if it was trained"
RECEIVED = Obstacle("changed after the optimizer was made, in this process or by another one", Cause.RECEIVED)


@contextmanager
def initializing(
    *,
    settings: Settings | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    device: torch.device | str | None = None,
    on_report: Callable[[Report], None] | None = None,
) -> Iterator[list[Report]]:
    """Context in which every model that is built is initialized as by `initialize_`.

    It is for code that builds its models itself. A model is treated when an optimizer is made, because training is then
    about to begin, or else when the context ends; if it ends with an exception, nothing is treated then. Treated are
    the convolutions that were drawn in the context, from what their constructors or later code drew:

    - What is drawn anew between the making of the optimizer and the first forward pass of one of the models is treated
      at that pass, but not where several processes of `torch.distributed` run: it may have come from another one.
    - What ``reset_parameters`` draws anew later, or ``load_state_dict`` puts back as it was drawn, is treated before
      the next optimizer is made; a layer that is built later, before its parameters are added to one.

    Left alone are convolutions

    - that were built before the context, in a context within it, or on the meta device;
    - that `initialize_` has treated, or was told to exclude;
    - that ``load_state_dict`` has loaded, as pretrained weights are: a checkpoint that is loaded at any time replaces
      what was drawn;
    - that got a gradient by ``backward`` before an optimizer was made, as in a loop that trains without one.

    Weights that are loaded or trained in another way, such as by ``weight.data.copy_`` or ``torch.autograd.grad``,
    cannot be told from drawn ones: load them after the context, or exclude them. A copy that is left alone, such as a
    target network, is named in a remark where what it was copied from was treated. Processes that are started in the
    context are not part of it, and models are to be built and trained by one thread.

    Args:
        settings: Optimization settings. Default: `Settings()`.
        include: Shell patterns of layer names; where any are given, others are left alone.
        exclude: Shell patterns of layer names to leave alone. A model is a module that is part of no other one, and
            its layers' names start there.
        device: Device to compute on. Default: that of each weight.
        on_report: Function to call with each report once it is there.

    Yields:
        The reports, one for each model, which are there once it is treated; ``model`` is the name of its class.

    Raises:
        InputError: If the patterns are no lists; or if one matches no layer of the models: at the first forward pass
            after an optimizer was made, or when the context ends.

    Examples:
        >>> with ci.initializing(exclude=["0"]) as reports:
        ...     model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3))
        ...     _ = model.apply(lambda part: nn.init.xavier_normal_(part.weight) if hasattr(part, "weight") else None)
        >>> [(report.model, report.totals["initialized"]) for report in reports]
        [('Sequential', 1)]
    """
    check_list("include", include)
    check_list("exclude", exclude)
    if on_report is not None:
        check_type("on_report", on_report, Callable, "pass print or the like")  # type: ignore[arg-type]
    checked, reports, names, history = check_settings(settings), list[Report](), list[str](), History()
    before: dict[int, set[str]] = {}  # what was treated at last, by the ids of the models

    def obstacle(parts: Mapping[str, nn.Module], layer: Layer) -> Obstacle | None:
        why = left_alone(parts.get(layer.name))
        if why is not None and why.cause is Cause.LOADED and history.began_with(layer):
            why = None  # put back as it was drawn, as for another fold of a cross-validation
        return unselected(layer.name, include, exclude) or history.obstacle(layer) or why

    def treat(models: Sequence[nn.Module], moment: Moment) -> None:
        again = moment in (Moment.FORWARD, Moment.STEP)
        if (include or exclude) and not again:
            names.extend(layer.name for model in models for layer in find_layers(model, read_only=True))
        if names and moment is not Moment.OPTIMIZER:  # others may follow
            try:
                check_patterns("include", include, names)
                check_patterns("exclude", exclude, names)
            except InputError as error:
                raise UnmatchedError(str(error)) from None
        for model in models:
            parts = {bare_name(name): part for name, part in tree.named_modules(unwrap(model))}
            layers = find_layers(model, obstacle=partial(obstacle, parts))
            drawn = [layer for layer in layers if layer.obstacle is None]
            if again and not drawn and not any(layer.is_left_for(Cause.LOADED) for layer in layers):
                continue
            if moment is Moment.STEP or (again and of_several_processes()):  # those would treat what they were sent
                # Without a pair of filters a layer would be left anyway, and says so itself.
                for layer in drawn:
                    layer.obstacle = RECEIVED if pair_obstacle(layer.bank("matched")) is None else None
            report = initialize_layers(model, layers, checked, device, within=history)
            # The report that was there before says it all.
            treated = {layer.name for layer in report.layers if layer.after}
            if again and not treated and not any(layer.is_left_for(Cause.RECEIVED, Cause.LOADED) for layer in layers):
                continue
            if again and treated & before.get(id(model), set()):
                report.remarks.insert(0, CHANGED)
            before[id(model)] = treated
            report.model = type(unwrap(model)).__name__
            reports.append(report)
            if on_report is not None:
                on_report(report)

    open_histories.append(history)
    try:
        with Construction(treat):
            yield reports
    finally:
        open_histories.remove(history)
