"""Which of 44 photographs is this patch from? They come with scikit-learn, scikit-image and Debian's wallpapers.

    pip install scikit-learn scikit-image
    apt-get install --no-install-recommends lomiri-wallpapers-16.04 lomiri-wallpapers-20.04 mate-backgrounds \
        plasma-workspace-wallpapers

Every photograph is made grey, or left in colour, brought to a height of 512 pixels and cut into cells of 32 × 32
pixels. The cells are those of a checkerboard: patches for training are cut from the white ones, patches for the test
from the black ones, so that no pixel is in both. A patch has zero mean and unit variance, in colour over its three
channels together, so that neither brightness nor contrast tells its source; its colours may.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import convsim_init as ci
from benchmarks.training.tasks.data import Data, contrast_normalized

HEIGHT, CELL, PATCH = 512, 32, 16
TEST = 10_000

IN_SCIKIT_IMAGE = ("astronaut", "brick", "camera", "chelsea", "coffee", "grass", "gravel", "rocket")
BACKGROUNDS, WALLPAPERS = Path("/usr/share/backgrounds"), Path("/usr/share/wallpapers")
IN_LOMIRI = (
    *("Bridge_by_Sander_Klootwijk", "Dragonfly_by_Bolly", "Kleiber_by_Lukas_Baubkus", "Picture_0B_by_freespace"),
    *("Picture_1A_by_freespace", "Wine_by_Jakkub_Mede", "aitzgorri_by_Aitzol_Berasategi", "free_by_Peter_Nerlich"),
    *("friends_by_Aitzol_Berasategi", "greentock_by_Peter_Nerlich", "life_by_Aitzol_Berasategi"),
    *("picosdeeuropa_by_Aitzol_Berasategi", "seeding_by_Clements_Engelhardt", "sunset_by_Aitzol_Berasategi"),
)
IN_MATE = (
    *("Aqua", "Blinds", "Dune", "FreshFlower", "Garden", "GreenMeadow", "LadyBird", "RainDrops", "Storm"),
    *("TwoWings", "Wood", "YellowFlower"),
)
IN_PLASMA = (
    *("BytheWater", "ColdRipple", "ColorfulCups", "EveningGlow", "FallenLeaf", "Grey", "OneStandsOut", "Path"),
)
FILES = (
    *(BACKGROUNDS / f"{name}.jpg" for name in IN_LOMIRI),
    *(BACKGROUNDS / "mate" / "nature" / f"{name}.jpg" for name in IN_MATE),
    *(WALLPAPERS / name / "contents" / "images" / "2560x1600.jpg" for name in IN_PLASMA),
)


def photos(seed: int, mode: Literal["L", "RGB"] = "L") -> Data:
    """Cells of every photograph for training, grey or in colour, cropped and mirrored anew in every batch; and a test.

    Raises:
        ci.InputError: If a photograph is missing; it names the packages.
    """
    return patches_of(_photographs(mode), seed)


def patches_of(photographs: list[np.ndarray], seed: int, test: int = TEST) -> Data:
    """The task made of any photographs, `[C, H, W]` from 0 to 1: as many test patches of each as of the others."""
    generator = torch.Generator().manual_seed(seed)
    both = [checkerboard(torch.from_numpy(photograph)) for photograph in photographs]
    labels = torch.cat([torch.full((len(white),), label) for label, (white, _) in enumerate(both)])
    order = torch.randperm(len(labels), generator=generator)
    test_labels = torch.arange(test) % len(both)
    black = [cells for _, cells in both]
    chosen = [black[label][torch.randint(len(black[label]), (), generator=generator)] for label in test_labels]
    return Data(
        torch.cat([white for white, _ in both])[order],
        labels[order],
        crop(torch.stack(chosen), generator),
        test_labels,
        classes=len(both),
        augment=crop,
    )


def checkerboard(photograph: Tensor) -> tuple[Tensor, Tensor]:
    """The white and the black cells of a photograph `[C, H, W]`, `[N, C, 32, 32]` each."""
    cells = photograph.unfold(1, CELL, CELL).unfold(2, CELL, CELL).movedim(0, 2)  # [rows, columns, C, 32, 32]
    rows, columns = cells.shape[:2]
    white = (torch.arange(rows)[:, None] + torch.arange(columns)) % 2 == 0
    return cells[white], cells[~white]


def crop(cells: Tensor, generator: torch.Generator) -> Tensor:
    """A patch `[N, C, 16, 16]` from a random place of each cell, mirrored or not."""
    top, left = torch.randint(CELL - PATCH + 1, (2, len(cells)), generator=generator)
    mirrored = torch.randint(2, (len(cells), 1, 1, 1), generator=generator).bool()
    windows = cells.unfold(2, PATCH, 1).unfold(3, PATCH, 1)  # [N, C, 17, 17, 16, 16]
    patches = windows[torch.arange(len(cells)), :, top, left]
    return contrast_normalized(torch.where(mirrored, patches.flip(3), patches))


@lru_cache(maxsize=1)
def _photographs(mode: str) -> list[np.ndarray]:
    missing = [str(path) for path in FILES if not path.exists()]
    if missing:
        raise ci.InputError(
            f"expected the photographs of Debian's wallpaper packages, found no {missing[0]} ({len(missing)} missing); "
            "run: apt-get install --no-install-recommends lomiri-wallpapers-16.04 lomiri-wallpapers-20.04 "
            "mate-backgrounds plasma-workspace-wallpapers"
        )
    from skimage import data as wheel
    from sklearn.datasets import load_sample_images

    in_wheels = [getattr(wheel, name)() for name in IN_SCIKIT_IMAGE] + load_sample_images().images
    images = [*map(Image.fromarray, in_wheels), *map(Image.open, FILES)]
    return [_pixels(image, mode) for image in images]


def _pixels(image: Image.Image, mode: str) -> np.ndarray:
    """A photograph ``[C, H, W]`` from 0 to 1, grey or in colour."""
    width = round(image.width * HEIGHT / image.height)
    resized = image.convert(mode).resize((width, HEIGHT), Image.Resampling.LANCZOS)
    pixels = np.asarray(resized, dtype=np.float32) / 255
    return np.ascontiguousarray(np.atleast_3d(pixels).transpose(2, 0, 1))
