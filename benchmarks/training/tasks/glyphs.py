"""Which character is it? 47 classes, drawn with fonts of Debian's packages: other ones in the test than in training.

    apt-get install --no-install-recommends $(python -m benchmarks.training.tasks.glyphs)

Every third package's fonts are the test's, and no package here is a copy of another's design. A glyph is turned,
sheared, stretched and moved at random, brought to 16 × 16 pixels and covered with noise.
"""

from __future__ import annotations

import subprocess
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import convsim_init as ci
from benchmarks.training.tasks.data import Data, contrast_normalized

# The classes of EMNIST's "balanced" division: lower case only where it looks unlike upper case.
CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghnqrt"
DRAWN, SIZE = 48, 16  # pixels of a side: as drawn, and as an input
CAPITALS = 30  # pixels: their height as drawn
TEST = 10_000
NOISE = (0.1, 0.6)  # standard deviations, of a range of 1
FONTS = 8  # of a package at most, so that no large family outweighs the others

FAMILIES = """
3270 agave allerta anonymous-pro arapey averia-gwf b612 bajaderka beteckna blankenburg breip cabin cabinsketch
campania cantarell cardo century-catalogue cherrybomb clear-sans comfortaa comic-neue courier-prime
dancingscript dkg-handwriting dosis dustin ebgaramond ecolier-court essays1743 eurofurence fantasque-sans
fanwood femkeklaver firacode georgewilliams gfs-artemisia gfs-didot gfs-neohellenic gnutypewriter go
goudybookletter hermit humor-sans inconsolata isabella jetbrains-mono joscelyn junction jura karla
kaushanscript klaudia-berenika kristi lato league-spartan leckerli-one lemonada levien-typoscript lindenhill
linuxlibertine lobster lobstertwo manrope monofur monoid mononoki national-park ocr-a ocr-b okolaks
oldstandard open-sans opendin opendyslexic osifont oxygen paratype play prociono quattrocento quicksand
radisnoir roadgeek roboto-slab routed-gothic rufscript sjfonts sora stix summersby tomsontalks tuffy
ubuntu-title vollkorn yanone-kaffeesatz
"""


def glyphs(seed: int) -> Data:
    """Glyphs of the training fonts, distorted anew in every batch; and distorted glyphs of the test fonts.

    Raises:
        ci.InputError: If a font package is missing; it names them.
    """
    return glyphs_of(*_drawn_fonts(), seed)


def glyphs_of(train: Tensor, test: Tensor, seed: int, test_images: int = TEST) -> Data:
    """The task made of any fonts' drawings, `[fonts, characters, 48, 48]` from 0 to 255."""
    generator = torch.Generator().manual_seed(seed)
    classes = train.shape[1]
    order = torch.randperm(train.shape[0] * classes, generator=generator)
    test_labels = torch.arange(test_images) % classes
    fonts = torch.randint(len(test), (test_images,), generator=generator)
    return Data(
        train.flatten(0, 1)[order, None],
        order % classes,
        distort(test[fonts, test_labels][:, None], generator),
        test_labels,
        classes=classes,
        augment=distort,
    )


def distort(drawings: Tensor, generator: torch.Generator) -> Tensor:
    """Inputs `[N, 1, 16, 16]` of drawings `[N, 1, 48, 48]`: a random affine map each, smaller, with noise."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(drawings), generator=generator)

    angle, shear = uniform(-0.2, 0.2), uniform(-0.2, 0.2)
    wide, high = uniform(-0.15, 0.15).exp(), uniform(-0.15, 0.15).exp()
    across, down = uniform(-0.15, 0.15), uniform(-0.15, 0.15)
    cos, sin = angle.cos(), angle.sin()
    rows = [wide * cos, wide * (shear * cos - sin), across, high * sin, high * (shear * sin + cos), down]
    where = F.affine_grid(
        torch.stack(rows, 1).view(-1, 2, 3), [len(drawings), 1, 2 * SIZE, 2 * SIZE], align_corners=False
    )
    smaller = F.avg_pool2d(F.grid_sample(drawings / 255, where, align_corners=False), 2)
    noise = torch.randn(smaller.shape, generator=generator)
    return contrast_normalized(smaller + uniform(NOISE[0], NOISE[1]).view(-1, 1, 1, 1) * noise)


def draw(path: Path) -> Tensor | None:
    """Every character drawn with a font, uint8 `[characters, 48, 48]`; `None` if it lacks some or draws them alike."""
    try:
        tall = ImageFont.truetype(path, 100).getbbox("HEX")
        font = ImageFont.truetype(path, round(100 * CAPITALS / max(1, tall[3] - tall[1])))
        missing = font.getmask("\uffff")
        drawn = [_centred(font, character) for character in CHARACTERS]
        alike = [font.getmask(c).size == missing.size and bytes(font.getmask(c)) == bytes(missing) for c in CHARACTERS]
    except (OSError, ValueError):  # no font that FreeType draws at this size
        return None
    ink = [(image > 127).mean() for image in drawn]
    different = len({image.tobytes() for image in drawn})
    if any(alike) or min(ink) < 0.005 or max(ink) > 0.5 or different < len(CHARACTERS) - 6:
        return None
    return torch.from_numpy(np.stack(drawn))


def division(packages: list[str]) -> tuple[list[str], list[str]]:
    """Packages for training, and every third one for the test."""
    return [p for i, p in enumerate(packages) if i % 3 != 2], packages[2::3]


@lru_cache(maxsize=1)
def _drawn_fonts() -> tuple[Tensor, Tensor]:
    train, test = (
        torch.stack([font for package in packages for font in _fonts_of(package)])
        for packages in division([f"fonts-{family}" for family in FAMILIES.split()])
    )
    return train, test


def _fonts_of(package: str) -> list[Tensor]:
    try:
        listed = subprocess.run(["dpkg-query", "--listfiles", package], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        raise ci.InputError(
            f"expected Debian's package {package} to be installed; run: apt-get install --no-install-recommends "
            "$(python -m benchmarks.training.tasks.glyphs)"
        ) from None
    paths = sorted(path for path in map(Path, listed.stdout.split("\n")) if path.suffix.lower() in {".ttf", ".otf"})
    found: list[Tensor] = []
    for path in paths:
        drawn = None if path.is_symlink() or len(found) == FONTS else draw(path)
        found += [] if drawn is None else [drawn]
    return found


def _centred(font: ImageFont.FreeTypeFont, character: str) -> np.ndarray:
    left, top, right, bottom = font.getbbox(character)
    image = Image.new("L", (DRAWN, DRAWN))
    ImageDraw.Draw(image).text(((DRAWN - left - right) / 2, (DRAWN - top - bottom) / 2), character, fill=255, font=font)
    return np.asarray(image)


if __name__ == "__main__":
    print(*(f"fonts-{family}" for family in FAMILIES.split()))
