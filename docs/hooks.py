"""MkDocs hooks: pages and files that stand outside of ``docs/`` become part of the site."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
OUTSIDE = (
    "CHANGELOG.md",
    "CODE_OF_CONDUCT.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "LICENSE",
    "examples/*.py",
    "benchmarks/results/**/*.*",
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what stands outside, at its path in the repository."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links into and out of ``docs/`` to the place that their target has on the site."""
    inside = Path(page.file.abs_src_path).is_relative_to(config.docs_dir)
    return re.sub(r"\]\(\.\./" if inside else r"\]\(docs/", "](", markdown)
