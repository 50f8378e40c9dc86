"""`initializing`: a context that initializes the models which other code builds, before it trains them."""

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
from convsim_init.tracking.construction import Construction, Event, UnmatchedError, left_alone
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

    - Weights that are drawn anew between the making of the optimizer and the first forward pass of one of the models
      are treated at that pass, unless several processes of `torch.distributed` run: they may be those of another one.
    - Weights that ``reset_parameters`` draws anew later, or that ``load_state_dict`` resets to what was drawn, are
      treated before the next optimizer is made; a layer that is built later, before an optimizer gets its parameters.

    Left alone are convolutions

    - that were built before the context, in a context within it, or on the meta device;
    - that `initialize_` has treated, or left because of ``include`` or ``exclude``;
    - that ``load_state_dict`` has loaded, such as pretrained weights: a checkpoint that is loaded at any time replaces
      what was drawn;
    - that got a gradient by ``backward`` before an optimizer was made, as in a loop that trains without one.

    Weights that are loaded or trained in another way, such as by ``weight.data.copy_`` or ``torch.autograd.grad``,
    cannot be distinguished from drawn ones: load them after the context, or exclude them. A copy that is left alone,
    such as a target network or a tensor that the optimizer is made with, is named in a remark if its original was
    treated. Processes that are started in the context are not part of it, and one thread should build and train the
    models.

    Args:
        settings: Optimization settings. Default: `Settings()`.
        include: Shell patterns of layer names; where any are given, others are left alone.
        exclude: Shell patterns of layer names to leave alone. Names are those within the model, which is a module that
            is part of no other one.
        device: Device to compute on. Default: the CPU, wherever the weights are.
        on_report: Function to call with each report as soon as its model is treated.

    Yields:
        A list that gets a report whenever a model was treated; ``model`` is the name of the model's class.

    Raises:
        InputError: If the patterns are no lists, or, at the first forward pass after an optimizer was made or at the
            end of the context, if a pattern matches no layer of the models.

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
    checked_settings, reports, history = check_settings(settings), list[Report](), History()
    names: list[str] = []  # of the layers of all models so far, which patterns must match
    last_treated: dict[int, set[str]] = {}  # names of layers, by the ids of their models

    def obstacle(parts: Mapping[str, nn.Module], layer: Layer) -> Obstacle | None:
        origin = left_alone(parts.get(layer.name))
        if origin is not None and origin.cause is Cause.LOADED and history.began_with(layer):
            origin = None  # reset to what was drawn, as for another fold of a cross-validation
        return unselected(layer.name, include, exclude) or history.obstacle(layer) or origin

    def treat(models: Sequence[nn.Module], event: Event) -> None:
        again = event in (Event.FORWARD, Event.STEP)  # after they were treated before the optimizer was made
        if (include or exclude) and not again:
            names.extend(layer.name for model in models for layer in find_layers(model, read_only=True))
        if names and event is not Event.OPTIMIZER:  # after which other models may follow
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
            # Another process may have sent these weights, which it has treated.
            if event is Event.STEP or (again and of_several_processes()):
                for layer in drawn:
                    # A layer without a pair of filters is left for that reason.
                    layer.obstacle = RECEIVED if pair_obstacle(layer.bank("matched")) is None else None
            report = initialize_layers(model, layers, checked_settings, device, within=history)
            treated = {layer.name for layer in report.layers if layer.after}
            # A report that only repeats the one before is dropped.
            if again and not treated and not any(layer.is_left_for(Cause.RECEIVED, Cause.LOADED) for layer in layers):
                continue
            if again and treated & last_treated.get(id(model), set()):
                report.remarks.insert(0, CHANGED)
            last_treated[id(model)] = treated
            report.model = type(unwrap(model)).__name__
            reports.append(report)
            if on_report is not None:
                on_report(report)

    open_histories.append(history)
    try:
        with Construction(treat, history.watch):
            yield reports
    finally:
        open_histories.remove(history)
