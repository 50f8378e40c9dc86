"""Bases and coordinates against the plain discrete Fourier transform."""

import math

import pytest
import torch

from convsim_init.functional.fourier import Fourier, Halves, cuts, real_fourier_basis

KERNEL_SIZES = [(3, 3), (7, 7), (1, 5), (2, 2), (4, 3), (5,), (3, 2, 3), (1, 1)]
CPU = torch.device("cpu")


@pytest.mark.parametrize("kernel_size", KERNEL_SIZES, ids=str)
def test_the_inner_product_of_two_power_spectra_is_the_energy_of_the_cross_correlation(kernel_size):
    a, b = torch.randn(2, *kernel_size, dtype=torch.float64)
    lattice = [2 * k - 1 for k in kernel_size]
    product = torch.fft.fftn(a, s=lattice) * torch.fft.fftn(b, s=lattice).conj()
    energy = torch.fft.ifftn(product).abs().square().sum()
    basis = real_fourier_basis(kernel_size, torch.float64, CPU)
    first = len(basis) // 2 + 1
    spectra = torch.stack([basis @ a.flatten(), basis @ b.flatten()])
    power = spectra[:, :first].square()
    power[:, 1:] += spectra[:, first:].square()
    torch.testing.assert_close(power[0] @ power[1], energy)


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("kernel_size", KERNEL_SIZES, ids=str)
def test_the_coordinates_are_orthogonal_and_split_into_even_and_odd(kernel_size, folded):
    fourier = Fourier(kernel_size, torch.float64, CPU, folded=folded)
    taps = math.prod(kernel_size)
    torch.testing.assert_close(fourier.rotation @ fourier.rotation.T, torch.eye(taps, dtype=torch.float64))
    kernels = torch.randn(taps, 1, 2, 3, dtype=torch.float64)  # [T, g, c, M]
    coordinates = Halves((fourier.rotation @ kernels.flatten(1)).view(kernels.shape))
    for basis, lattice in ((fourier.full, None), (fourier.coarse, [k | 1 for k in kernel_size])):
        whole = real_fourier_basis(kernel_size, torch.float64, CPU, lattice)
        spectrum = Halves(torch.empty(len(whole), 1, 2, 3, dtype=torch.float64))
        basis.forward(coordinates, out=spectrum)
        torch.testing.assert_close(spectrum.whole.flatten(1), whole @ kernels.flatten(1))
        back = Halves(torch.empty_like(kernels))
        basis.twice_adjoint(spectrum, out=back)
        wanted = 2 * fourier.rotation @ whole.T @ spectrum.whole.flatten(1)
        torch.testing.assert_close(back.whole.flatten(1), wanted)


@pytest.mark.parametrize("kernel_size", KERNEL_SIZES, ids=str)
def test_the_identity_gives_twice_the_kernels(kernel_size):
    fourier = Fourier(kernel_size, torch.float64, CPU)
    coordinates = Halves(torch.randn(math.prod(kernel_size), 1, 2, 3, dtype=torch.float64))
    spectrum = Halves(torch.empty(fourier.points, 1, 2, 3, dtype=torch.float64))
    fourier.full.forward(coordinates, out=spectrum)
    spectrum.first.mul_(fourier.identity)
    spectrum.second.mul_(fourier.identity[1:])
    back = Halves(torch.empty_like(coordinates.whole))
    fourier.full.twice_adjoint(spectrum, out=back)
    torch.testing.assert_close(back.whole, 2 * coordinates.whole)


@pytest.mark.parametrize("max_weights", [1, 7, 60, 10**6])
@pytest.mark.parametrize("shape", [(1, 5, 4, 3, 3), (3, 2, 5, 2), (4, 1, 3, 1, 1)], ids=str)
def test_a_bank_is_put_together_from_its_blocks(shape, max_weights):
    bank, scale = torch.randn(shape, dtype=torch.float64), torch.rand(shape[:2], dtype=torch.float64) + 0.5
    fourier = Fourier(shape[3:], torch.float64, CPU)
    blocks = list(fourier.blocks(bank, scale, max_weights))
    assert sum(weights.numel() for *_, weights in blocks) == bank.numel()
    found = fourier.bank(blocks, bank.shape)
    torch.testing.assert_close(found * scale.view(*scale.shape, *[1] * (len(shape) - 2)), bank)


def test_cuts_are_a_power_of_two_of_nearly_equal_size():
    blocks = list(cuts((1, 512, 512, 3, 3), 2**19))
    assert len(blocks) == 8
    assert {part.channels.stop - part.channels.start for part in blocks} == {64}
