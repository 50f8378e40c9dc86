"""Writing a folder that Hugging Face's libraries load: weights, config and a card that says what they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from convsim_init.checkpoint.save import Contents, write_checkpoint
from convsim_init.files.writing import check_new_folder, new_folder
from convsim_init.report.report import Report
from convsim_init.report.text import printable
from convsim_init.version import __version__

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
LOADS = {
    "transformers": 'model = AutoModelForImageClassification.from_pretrained("FOLDER")',
    "timm": 'model = timm.create_model("local-dir:FOLDER", pretrained=True)',
}


def write_folder(
    contents: Contents,
    path: Path,
    *,
    config: str,
    report: Report,
    drawn: bool,
    picture: tuple[str, Callable[[Path], object]] | None = None,
) -> Path:
    """Write a new folder, whole or not at all; the same arguments give the same bytes.

    ``config`` is what `models.hub.describe` returns, ``drawn`` whether no weight was read from a file, and ``picture``
    the name of a picture, which the card shows, and a function that writes it to a path.

    Raises:
        InputError: If the path cannot be written, or something is there.
        RunError: If writing fails; then there is nothing.
    """
    target = check_new_folder(path)
    with new_folder(target) as folder:
        write_checkpoint(contents, folder / WEIGHTS)
        (folder / CONFIG).write_bytes(config.encode())
        (folder / CARD).write_bytes(_card(report, config, drawn, picture and picture[0]).encode())
        if picture is not None:
            picture[1](folder / picture[0])
    return target


def _card(report: Report, config: str, drawn: bool, picture: str | None) -> str:
    library = "transformers" if '"model_type"' in config else "timm"
    table = report.table
    table = replace(table, summary=table.summary[:-1])  # its last line has the time, which differs
    settings = "\n".join(f"| {name} | {value} |" for name, value in asdict(report.settings).items())
    anew = "" if report.seed is None else f", drawn anew by {report.base} with seed {report.seed},"
    name = printable(report.model or "a model")
    origin = (
        f"These weights are **not trained**. They are {name} with seed {report.seed}, whose convolutions"
        if drawn
        else f"These weights were read from {name}, whose convolutions{anew}"
    )
    image = f"![Similarity of the filters before and after]({picture})\n\n" if picture else ""
    return f"""---
library_name: {library}
tags:
- convsim-init
---

# {name}, {"to be trained from scratch" if drawn else "decorrelated"}

{origin} were
decorrelated by [convsim-init](https://arxiv.org/abs/2411.03226) {__version__}.

```python
{LOADS[library]}
```

{image}| setting | value |
|---|---|
| base | {report.base} |
{settings}

```text
{table.text()}
```
"""
