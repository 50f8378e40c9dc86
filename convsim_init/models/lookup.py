"""Which model a bare name means that is not built in."""

from __future__ import annotations

from dataclasses import dataclass

from convsim_init.errors import InputError
from convsim_init.models import libraries
from convsim_init.models.spec import LIBRARIES, Source, Spec, parse
from convsim_init.models.zoo import catalog
from convsim_init.models.zoo.catalog import UnknownModelError, closest


@dataclass(frozen=True)
class Resolved:
    """A spec that names its source, and what its user should know of how it was found."""

    spec: Spec
    remark: str | None = None


def check(name: str) -> None:
    """Refuse a name that nobody can look up.

    Raises:
        UnknownModelError: If no library is installed, with the closest built-in names.
    """
    if not libraries.installed():
        raise _unknown(name)


def resolve(text: str) -> Resolved:
    """What a spec means: a bare name that is not built in is torchvision's if it has that model, else timm's.

    Raises:
        UnknownModelError: If none that is installed has it, or one cannot be imported.
        InputError: If the spec is malformed.
    """
    spec = parse(text)
    if spec.source is not Source.ANY:
        return Resolved(spec)
    try:
        owners = [library for library in libraries.installed() if libraries.has(library, text)]
    except InputError as error:
        alike = " or ".join(closest(text))
        hint = f" (did you mean {alike}?)" if alike else ""
        raise UnknownModelError(
            f"{text!r} is no built-in model{hint}, and the libraries cannot be asked: {error}"
        ) from error
    if not owners:
        raise _unknown(text)
    first, *others = owners
    remark = f"{text} was taken from {first.value}"
    for other in others:
        remark += f"; {other.value} has one of that name too, whose keys may differ: {other.value}:{text}"
    return Resolved(parse(f"{first.value}:{text}"), remark)


def _unknown(name: str) -> UnknownModelError:
    known = {one: one for one in catalog.MODELS}
    for library in libraries.installed():
        for one in libraries.names(library):
            known.setdefault(one, f"{library.value}:{one}")
    alike = " or ".join(known[one] for one in closest(name, known))
    hint = f"did you mean {alike}? For all names" if alike else "for all names"
    missing = [library.value for library in LIBRARIES if library not in libraries.installed()]
    extras = f"; pip install 'convsim-init[{','.join(missing)}]' for more" if missing else ""
    return UnknownModelError(f"expected the name of a model, got {name!r}: {hint} run `convsim-init list`{extras}")
