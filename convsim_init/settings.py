"""What the user chose, validated once. Imports nothing heavy: a wrong option is refused before torch is loaded."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal, get_args

from convsim_init.errors import InputError

Pairs = Literal["all", "adjacent"]
Channels = Literal["matched", "all"]
ChannelsChoice = Literal["auto", "matched", "all"]
Norm = Literal["preserve", "free"]
Optimizer = Literal["conjugate_gradient", "adam"]
Preset = Literal["convsim", "paper"]
Activation = Literal["linear", "relu", "leaky_relu", "selu", "sigmoid", "tanh"]  # of torch.nn.init.calculate_gain

PAIRS: tuple[Pairs, ...] = get_args(Pairs)
CHANNELS: tuple[Channels, ...] = get_args(Channels)
CHANNELS_CHOICES: tuple[ChannelsChoice, ...] = get_args(ChannelsChoice)
NORMS: tuple[Norm, ...] = get_args(Norm)
OPTIMIZERS: tuple[Optimizer, ...] = get_args(Optimizer)
PRESETS: tuple[Preset, ...] = get_args(Preset)
SCHEMES = ("kaiming_normal", "kaiming_uniform", "xavier_normal", "orthogonal", "delta_orthogonal")
FAN_SCHEMES = SCHEMES[:2]
FANS = ("fan_in", "fan_out")  # that these may name
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
SWITCH = "CONVSIM_INIT_COMPILED"  # variable of the environment: see `may_use_kernels`
DEFAULT_DEVICE = "cpu"  # to compute on, wherever the weights are: no GPU has been measured to be faster
MAX_SEED = 2**63 - 1
BASES = ("model", *SCHEMES, *(f"{scheme}:{fan}" for scheme in FAN_SCHEMES for fan in FANS))


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the weights of each layer are optimized.

    The defaults are those that trained best in ``docs/evidence.md``, where training told them apart; it has the figures
    of the other choices.

    Attributes:
        pairs: Filter pairs that count: ``"all"`` of a layer, or only ``"adjacent"`` ones (i, i + 1).
        channels: Kernels compared: those of ``"matched"`` input channels, or ``"all"`` with all. ``"auto"`` matches
            them, but compares all where no normalization follows a layer before another one uses its output: matched
            channels give each filter a strength of its own there, which harmed training with depth.
        norm: ``"preserve"`` keeps each filter's L2 norm; ``"free"`` does not, and then similarity falls by shrinking.
        optimizer: ``"conjugate_gradient"`` with a line search, nothing to tune; or ``"adam"``.
        steps: Most steps per layer, at least 1.
        tolerance: Stop once steps lower the loss by less than this fraction of its start; 0 never stops early.
        learning_rate: Learning rate of Adam; conjugate gradients have none.

    Raises:
        InputError: If a value is out of its range.

    Examples:
        >>> ci.Settings(steps=20).optimizer
        'conjugate_gradient'
        >>> ci.Settings.paper().norm
        'free'
    """

    pairs: Pairs = "all"
    channels: ChannelsChoice = "auto"
    norm: Norm = "preserve"
    optimizer: Optimizer = "conjugate_gradient"
    steps: int = 50
    tolerance: float = 2e-3
    learning_rate: float = 0.002

    def __post_init__(self) -> None:
        check_choice("pairs", self.pairs, PAIRS)
        check_choice("channels", self.channels, CHANNELS_CHOICES)
        check_choice("norm", self.norm, NORMS)
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        steps = check_whole("steps", self.steps, 1)
        tolerance, rate = _number(self.tolerance), _number(self.learning_rate)
        if not 0 <= tolerance < 1:
            raise InputError(f"expected tolerance to be at least 0 and less than 1, got {self.tolerance!r}")
        if not 0 < rate < math.inf:
            raise InputError(f"expected learning_rate to be positive and finite, got {self.learning_rate!r}")
        # Python's own numbers in place of NumPy's, which JSON does not know.
        for name, value in {"steps": steps, "tolerance": tolerance, "learning_rate": rate}.items():
            object.__setattr__(self, name, value)

    @property
    def compared_channels(self) -> Channels:
        """The kernels that are compared; matched ones where ``"auto"`` knows of no layer that follows."""
        return "all" if self.channels == "all" else "matched"

    @classmethod
    def paper(cls, steps: int = 100) -> Settings:
        """The recipe of the authors' published code (arXiv 2411.03226), kept as a faithful reproduction.

        Adjacent pairs, matched channels, free norms, Adam with learning rate 0.002. Most of what its loss loses it
        loses by shrinking the weights.
        """
        return cls(pairs="adjacent", channels="matched", norm="free", optimizer="adam", steps=steps, tolerance=0.0)

    @classmethod
    def preset(cls, name: Preset) -> Settings:
        """The settings called ``"convsim"`` (the defaults) or ``"paper"``."""
        check_choice("preset", name, PRESETS)
        return cls.paper() if name == "paper" else cls()


def may_use_kernels() -> bool:
    """Whether kernels in C and Triton may compute; if `SWITCH` is "0", only torch's operations may."""
    return os.environ.get(SWITCH) != "0"


def check_settings(settings: object) -> Settings:
    """The settings, or the default ones for None; InputError if they are anything else."""
    if settings is None:
        return Settings()
    check_type("settings", settings, Settings, "write Settings(steps=20)")
    return settings  # type: ignore[return-value]


def parse_base(base: str) -> tuple[str, str, Activation | None]:
    """The scheme, the fan, "" for none, and the activation of a base such as ``"kaiming_normal:fan_out:tanh"``.

    Raises:
        InputError: If it is not of that form.
    """
    text = base if isinstance(base, str) else ""
    # With its colon, because leaky_relu ends in relu, too.
    activation = next((name for name in ACTIVATIONS if text.endswith(f":{name}")), None)
    start = text.removesuffix(f":{activation}") if activation else text
    if start not in BASES or (start == "model" and activation):
        expected = f"to be model or one of {', '.join(SCHEMES)}"
        if text.partition(":")[0] in SCHEMES:
            ends = f"at most {' or '.join(FANS)}, after kaiming's alone, and then one of {', '.join(ACTIVATIONS)}"
            expected = f"to end in {ends}, such as kaiming_normal:fan_out:tanh"
        raise InputError(f"expected base {expected}, got {base!r}")
    scheme, _, fan = start.partition(":")
    return scheme, fan, activation


def check_prefix(prefix: str) -> None:
    """Refuse a prefix of a state dict's keys that would run into their first part."""
    check_type("prefix", prefix, str, "write prefix='model.'")
    if prefix and not prefix.endswith("."):
        raise InputError(f"expected a prefix of keys that ends in a dot, such as {prefix + '.'!r}, got {prefix!r}")
    if not prefix.isprintable():
        raise InputError(f"expected a prefix of letters that print, such as 'model.', got {prefix!r}")


def check_type(name: str, value: object, kind: type, advice: str) -> None:
    """Refuse a value of another type."""
    if not isinstance(value, kind):
        raise InputError(f"expected {name} of type {kind.__name__}, got {type(value).__name__}: {advice}")


def check_whole(name: str, value: object, low: int, high: int | None = None) -> int:
    """The value as an int; InputError if it is no whole number, or out of the range that includes both ends."""
    whole = int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None
    if whole is not None and low <= whole and (high is None or whole <= high):
        return whole
    span = f"of at least {low}" if high is None else f"from {low} to {high}"
    got = f"type {type(value).__name__}" if whole is None else str(whole)  # a repr may fill many lines
    raise InputError(f"{name}: expected a whole number {span}, got {got}; pass one in that range or leave it out")


def _number(value: object) -> float:
    """A real number as a float; NaN, which is in no range, for anything else."""
    try:
        return float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:  # a whole number beyond the range of floats
        return math.inf


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Refuse a value that is none of the choices."""
    if value not in choices:
        raise InputError(f"expected {name} to be one of {', '.join(choices)}, got {value!r}")
