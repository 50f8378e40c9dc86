"""How alike the feature maps of a ResNet-18 are expected to be, from convsim weights and from what they compete with.

    python -m benchmarks.claims.redundancy [--model resnet18] [--seeds 3] [--write]

Every start has the same filter norms. The figures are closed forms of the weights (`convsim_init.measure`): nothing is
sampled, nothing is trained. With ``--write`` the table goes to ``benchmarks/results/``.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn

import convsim_init as ci
from benchmarks.machine import cpu_name
from benchmarks.page import RESULTS, Page

COLUMNS = {
    "feature_correlation_white": "correlation, white",
    "feature_correlation_natural": "correlation, natural",
    "effective_rank_white": "effective rank, white",
    "effective_rank_natural": "effective rank, natural",
    "normalized_similarity": "normalized similarity",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18", help="any that convsim-init can build (default resnet18)")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default 3)")
    parser.add_argument("--write", action="store_true", help="write the table to benchmarks/results/")
    options = parser.parse_args()
    runs = [measure_starts(options.model, seed) for seed in range(options.seeds)]
    page = Page(
        f"Expected redundancy of a {options.model} at the start",
        f"Made by `python -m benchmarks.claims.redundancy --write` on {cpu_name()}. Means over the 3×3 layers, then "
        f"mean ± standard deviation over {options.seeds} seeds. Correlation: mean absolute correlation of two "
        "feature maps of a layer; effective rank: of their covariance, over their number. Both expected over a random "
        "input of white or natural (1/|f|²) spectrum and independent channels.",
    )
    page.head(["start", *COLUMNS.values()])
    page.rows([start, *(spread([run[start][measure] for run in runs]) for measure in COLUMNS)] for start in runs[0])
    if options.write:
        page.write(RESULTS / "redundancy.md")


def measure_starts(name: str, seed: int) -> dict[str, dict[str, float]]:
    """The measures of every start of a model, each the mean over its 3x3 layers."""
    model = ci.build_model(name, seed=seed)
    weights = {key: value for key, value in model.state_dict().items() if value.shape[2:] == (3, 3)}
    before = {key: value.clone() for key, value in weights.items()}
    ci.initialize_(model)
    after = {key: value.clone() for key, value in weights.items()}

    def redrawn(
        draw: Callable[[Tensor], Tensor], like: dict[str, Tensor], dimensions: tuple[int, ...]
    ) -> dict[str, float]:
        torch.manual_seed(1000 + seed)
        return layer_means({key: match(draw(value), value, dimensions) for key, value in like.items()})

    filters, kernels = (1, 2, 3), (2, 3)
    return {
        "the model's own": layer_means(before),
        "**convsim, default settings**": layer_means(after),
        "orthogonal": redrawn(lambda value: nn.init.orthogonal_(torch.empty_like(value)), before, filters),
        "random, filter norms matched": redrawn(torch.randn_like, before, filters),
        "random, kernel norms matched to convsim's": redrawn(torch.randn_like, after, kernels),
        "one random channel per filter": redrawn(one_channel, before, filters),
    }


def layer_means(weights: dict[str, Tensor]) -> dict[str, float]:
    layers = ci.measure(weights).layers
    return {measure: statistics.fmean(layer.before[measure] for layer in layers) for measure in COLUMNS}


def match(weight: Tensor, like: Tensor, dimensions: tuple[int, ...]) -> Tensor:
    """The weight, with the norms over some dimensions that another has."""
    norms, wanted = (torch.linalg.vector_norm(w, dim=dimensions, keepdim=True) for w in (weight, like))
    return weight * (wanted / norms)


def one_channel(weight: Tensor) -> Tensor:
    """Filters that look at one input channel each, drawn at random."""
    filters, channels = weight.shape[:2]
    drawn = torch.zeros_like(weight)
    drawn[range(filters), torch.randint(channels, (filters,))] = torch.randn_like(weight[:, 0])
    return drawn


def spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.4f} ± {deviation:.4f}"


if __name__ == "__main__":
    main()
