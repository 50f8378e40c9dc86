"""Completion of half-typed words in a shell, of models and layers too. It runs no code of the user's."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import click
from click.shell_completion import BashComplete, CompletionItem, add_completion_class, get_completion_class

from convsim_init.files.sources import METADATA_KEY, safetensors_header
from convsim_init.models.libraries import installed, names_in_sources
from convsim_init.models.spec import LIBRARIES
from convsim_init.models.zoo.catalog import MODELS
from convsim_init.settings import ACTIVATIONS, BASES

PLAIN = re.compile(r"[\w./-]+")  # names that need no quotes in any shell; others are not offered
EPILOG = """\b
Examples:
  eval "$(convsim-init completion bash)"        in ~/.bashrc
  eval "$(convsim-init completion zsh)"         in ~/.zshrc
  convsim-init completion fish > ~/.config/fish/completions/convsim-init.fish
"""


def complete_models(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Files, built-in models and, after ``timm:`` or ``torchvision:``, the library's."""
    library = next((library for library in LIBRARIES if incomplete.startswith(f"{library.value}:")), None)
    if library is not None:
        return _items((f"{library.value}:{name}" for name in names_in_sources(library)), incomplete)
    models = [CompletionItem(name, help=model.summary) for name, model in MODELS.items() if name.startswith(incomplete)]
    return [
        CompletionItem(incomplete, type="file"),
        *models,
        *_items((f"{library.value}:" for library in installed()), incomplete),
    ]


def complete_bases(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Values of --base: the schemes and, after a scheme and a colon, the activations."""
    activations = (f"{base}:{activation}" for base in BASES[1:] for activation in ACTIVATIONS)
    return _items(BASES, incomplete) or _items(activations, incomplete)


def complete_layers(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Convolutions of the model that stands before the word, if it is built in or a safetensors file."""
    given = ctx.params.get("models") or ctx.params.get("specs") or [ctx.params.get("spec")]
    # While the option before the word has no value, click leaves the model in `args`.
    spec = [*ctx.args, *given][0]
    with suppress(Exception):  # a file that cannot be read has no names to offer
        return _items((name for name in _layers(spec) if PLAIN.fullmatch(name)), incomplete)
    return []


def _layers(spec: str) -> list[str]:
    """Names of the convolutions: all that have a weight of three dimensions or more."""
    if spec in MODELS:
        import torch

        # The meta device draws no weights, which names do not need.
        with torch.device("meta"):
            state = MODELS[spec].build({}).state_dict()
        ranks = {key: tensor.dim() for key, tensor in state.items()}
    else:
        header = safetensors_header(Path(spec))
        ranks = {key: len(entry["shape"]) for key, entry in header.items() if key != METADATA_KEY}
    return [key.removesuffix(".weight") for key, rank in ranks.items() if rank > 2 and key.endswith(".weight")]


def _items(names: Iterable[str], incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


@add_completion_class
class Bash(BashComplete):
    """Bash's completion, also of words with `:` and `=`: bash takes ``timm:resnet18`` for three words."""

    _kept = 0  # number of characters at the word's start that bash does not replace

    def get_completion_args(self) -> tuple[list[str], str]:
        """The words before the one to complete, and that word."""
        args, incomplete = super().get_completion_args()
        words: list[str] = []
        # Bash has `=` and `:` in COMP_WORDBREAKS: they come as words of their own.
        for word in [*(arg for arg in args if arg != "="), incomplete]:
            if words and (word.startswith(":") or words[-1].endswith(":")):
                words[-1] += word
            else:
                words.append(word)
        self._kept = len(words[-1]) - len(incomplete.lstrip(":"))
        return words[:-1], words[-1]

    def format_completion(self, item: CompletionItem) -> str:
        """A line for the shell."""
        return f"{item.type},{item.value[self._kept :]}"


@click.command(epilog=EPILOG, short_help="Print a script that completes commands in a shell.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print a script that makes SHELL complete options, models and layers."""
    root = ctx.find_root()
    program = root.info_name or ""
    variable = f"_{program.replace('-', '_')}_COMPLETE".upper()
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(root.command, {}, program, variable).source())
