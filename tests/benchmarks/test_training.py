"""The training benchmark's parts: what its numbers rest on."""

import copy
import csv
import importlib
import math
import statistics
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import convsim_init as ci

pytest.importorskip("sklearn")

from benchmarks.training.arms import ARMS, Arm
from benchmarks.training.fit import OPTIMIZERS, batches_of, decayed_apart, fit, points, schedule
from benchmarks.training.networks import NETWORKS
from benchmarks.training.records import Case, Record, Records
from benchmarks.training.snapshot import Snapshot
from benchmarks.training.starts import convolutions, draw_base, natural, signed_permutations, with_norms_of
from benchmarks.training.summary import comparisons, interval, paired, rows_of, steps_to
from benchmarks.training.tasks import TASKS, textures
from benchmarks.training.tasks.cifar import read_cifar
from benchmarks.training.tasks.data import Data

photos, glyphs = (importlib.import_module(f"benchmarks.training.tasks.{name}") for name in ("photos", "glyphs"))

CASE = Case("digits", "vgg", 1.0, "fan_out", "sgd-no-decay", 20)


def record(arm, seed, curve, *, rate=0.1, final=True, case=CASE):
    return Record(case, arm, rate, seed, final, tuple(curve), 1.0)


# The data


@pytest.mark.parametrize("name", ["digits", "patches", "textures"])
def test_tasks_are_drawn_anew_for_each_seed_and_standardized(name):
    if name == "patches":
        pytest.importorskip("skimage")
    data, again, other = (TASKS[name].draw(seed) for seed in (3, 3, 4))
    assert torch.equal(data.images, again.images)
    assert torch.equal(data.test_labels, again.test_labels)
    assert not torch.equal(data.images, other.images)
    torch.testing.assert_close(data.images.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(data.images.std(), torch.tensor(1.0))
    assert set(data.labels.tolist()) == set(data.test_labels.tolist()) == set(range(data.classes))
    seen = {image.numpy().tobytes() for image in data.images}
    repeated = [image for image in data.test_images if image.std() > 1e-3 and image.numpy().tobytes() in seen]
    assert not repeated


def test_a_texture_runs_along_its_orientation():
    data = textures(0, train=240, test=12, noise=0.0)
    across, along = (data.images.diff(dim=d).square().mean((1, 2, 3)) for d in (3, 2))
    assert (along < across)[data.labels == 0].float().mean() > 0.95  # frequencies of class 0 are horizontal
    assert (across < along)[data.labels == 6].float().mean() > 0.95


@pytest.mark.parametrize("labels", [1, 2], ids=["CIFAR-10", "CIFAR-100"])
def test_cifar_is_read_from_its_binary_files(labels, tmp_path):
    training = [f"data_batch_{i}.bin" for i in range(1, 6)] if labels == 1 else ["train.bin"]
    rng = np.random.default_rng(0)
    written = rng.integers(0, 10, (2 * len(training) + 3, labels + 3072), dtype=np.uint8)
    for index, name in enumerate(training):
        written[2 * index : 2 * index + 2].tofile(tmp_path / name)
    written[-3:].tofile(tmp_path / ("test_batch.bin" if labels == 1 else "test.bin"))
    images, targets, test_images, test_targets = read_cifar(tmp_path)
    assert images.shape == (2 * len(training), 3, 32, 32)
    assert images[1, 2, 0, 5] == written[1, labels + 2048 + 5]
    assert targets.tolist() == written[:-3, labels - 1].tolist()
    assert test_targets.tolist() == written[-3:, labels - 1].tolist()
    assert test_images[2, 0, 31, 31] == written[-1, labels + 1023]


def test_what_is_no_cifar_is_refused(tmp_path):
    with pytest.raises(ci.InputError, match="found none of them"):
        read_cifar(tmp_path)
    for name in ("train.bin", "test.bin"):
        (tmp_path / name).write_bytes(bytes(3073))
    with pytest.raises(ci.InputError, match="records of 3074 bytes, got 3073 bytes"):
        read_cifar(tmp_path)


def numbered_photograph(rows, columns):
    """A photograph in colour, no two values of which are alike."""
    values = torch.arange(3 * rows * columns * photos.CELL**2, dtype=torch.float32)
    return values.view(3, rows * photos.CELL, columns * photos.CELL)


def test_no_pixel_of_a_photograph_is_in_training_and_test():
    photograph = numbered_photograph(3, 5)
    white, black = photos.checkerboard(photograph)
    assert (len(white), len(black)) == (8, 7)
    assert torch.equal(torch.cat([white, black]).flatten().sort().values, photograph.flatten())
    assert torch.equal(
        white[1, :, 0, 0], photograph[:, 0, 2 * photos.CELL]
    )  # the second cell of the first row is black


def test_a_crop_is_a_patch_of_its_cell_mirrored_half_of_the_time(monkeypatch):
    monkeypatch.setattr(photos, "contrast_normalized", lambda images: images)
    cells = photos.checkerboard(numbered_photograph(20, 20))[0]
    patches = photos.crop(cells, torch.Generator().manual_seed(0))
    assert patches.shape == (200, 3, 16, 16)
    assert all(torch.isin(patch, cell).all() for patch, cell in zip(patches, cells, strict=True))
    assert (patches.diff(dim=1) == 400 * photos.CELL**2).all()  # of one place, whatever the channel
    steps = patches[:, 0, 0].diff(dim=1)
    assert (steps.abs() == 1).all()
    assert 0.3 < (steps[:, 0] < 0).float().mean() < 0.7
    corners = (patches[:, 0, 0].amin(1) - cells[:, 0, 0, 0]).unique()
    assert len(corners) > 50  # of 17 x 17 places


def test_photographs_give_as_many_test_patches_of_each_and_depend_on_the_seed():
    rng = np.random.default_rng(0)
    sources = [rng.random((1, 64, 96), dtype=np.float32), rng.random((1, 96, 128), dtype=np.float32)]
    data, again, other = (photos.patches_of(sources, seed, test=40) for seed in (0, 0, 1))
    assert data.images.shape == (3 + 6, 1, 32, 32)
    assert torch.bincount(data.labels).tolist() == [3, 6]
    assert torch.bincount(data.test_labels).tolist() == [20, 20]
    assert torch.equal(data.test_images, again.test_images)
    assert torch.equal(data.images, again.images)
    assert not torch.equal(data.test_images, other.test_images)
    whole = torch.from_numpy(sources[1])
    for image, label in zip(data.images, data.labels, strict=True):
        assert torch.isin(image, whole).all() == bool(label)
    torch.testing.assert_close(data.test_images.mean((1, 2, 3)), torch.zeros(40), atol=1e-5, rtol=0)


def test_missing_photographs_are_named_with_their_packages(monkeypatch, tmp_path):
    monkeypatch.setattr(photos, "FILES", (tmp_path / "Dune.jpg",))
    photos._photographs.cache_clear()
    with pytest.raises(ci.InputError, match=r"found no .*Dune\.jpg.* apt-get install .* mate-backgrounds"):
        photos.photos(0)


def test_no_font_package_is_in_training_and_test():
    packages = glyphs.FAMILIES.split()
    train, test = glyphs.division(packages)
    assert not set(train) & set(test)
    assert sorted(train + test) == sorted(packages) == sorted(set(packages))
    assert len(test) > len(packages) / 4


def test_glyphs_are_distorted_anew_and_test_fonts_are_the_test_s():
    """Drawings of one pixel value a character, bright ones for training."""
    fonts = torch.zeros(3, 5, 48, 48, dtype=torch.uint8)
    fonts[:, :, 10:38, 10:38] = torch.arange(10, 60, 10, dtype=torch.uint8)[:, None, None]
    data = glyphs.glyphs_of(fonts[:2] + 100, fonts[2:], 0, test_images=30)
    again, other = (glyphs.glyphs_of(fonts[:2] + 100, fonts[2:], seed, test_images=30) for seed in (0, 1))
    assert data.images.shape == (10, 1, 48, 48)
    assert (data.images.amin((1, 2, 3)) == 100).all()
    assert torch.equal(data.images.amax((1, 2, 3)), (110 + 10 * data.labels).to(torch.uint8))
    assert data.test_images.shape == (30, 1, 16, 16)
    assert torch.equal(data.test_images, again.test_images)
    assert not torch.equal(data.test_images, other.test_images)
    generator = torch.Generator().manual_seed(0)
    first, second = (data.augment(data.images, generator) for _ in range(2))
    assert not torch.equal(first, second)


def test_a_distorted_glyph_is_still_where_it_was():
    drawing = torch.zeros(200, 1, 48, 48)
    drawing[:, :, 16:32, 16:32] = 255
    images = glyphs.distort(drawing, torch.Generator().manual_seed(0))
    assert (images[:, :, 7:9, 7:9].mean((1, 2, 3)) > images[:, :, :2].mean((1, 2, 3))).float().mean() > 0.97


def test_fonts_are_drawn_and_symbols_refused():
    matplotlib = pytest.importorskip("matplotlib")
    folder = glyphs.Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    drawn = glyphs.draw(folder / "DejaVuSans.ttf")
    assert drawn.shape == (47, 48, 48)
    rows = (drawn[glyphs.CHARACTERS.index("H")] > 127).any(1)
    assert abs(int(rows.sum()) - glyphs.CAPITALS) <= 1
    assert glyphs.draw(folder / "STIXSizFourSymReg.ttf") is None
    assert glyphs.draw(folder / "none.ttf") is None


def test_missing_fonts_are_named_with_the_command():
    with pytest.raises(ci.InputError, match=r"package fonts-of-no-one to be installed; run: apt-get install"):
        glyphs._fonts_of("fonts-of-no-one")


# The networks


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "cifar_resnet18"])
def test_networks_classify_and_learn_everywhere(name):
    model = NETWORKS[name](1, 7, 0.5)
    logits = model(torch.randn(4, 1, 16, 16))
    assert logits.shape == (4, 7)
    logits.square().sum().backward()
    unlearned = {name for name, p in model.named_parameters() if p.grad is None}
    assert not unlearned


@pytest.mark.parametrize(("name", "layers", "norms"), [
    ("plain", 4, 0),
    ("plain10", 10, 0),
    ("skipinit", 9, 0),
    ("resnet", 9, 9),
    ("vgg", 5, 5),
    ("convmixer", 9, 9),
    ("convnext", 13, 0),
])  # fmt: skip
def test_networks_have_the_layers_that_they_are_named_for(name, layers, norms):
    model = NETWORKS[name](1, 7, 1.0)
    assert len(convolutions(model)) == layers
    assert sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) == norms


def test_skipinit_starts_as_its_shortcuts():
    model = NETWORKS["skipinit"](1, 7, 0.5)
    block, x = model.blocks[1], torch.randn(2, 8, 8, 8)
    assert torch.equal(block(x), F.relu(block.shortcut(x)))


# The arms

ABOUT_NORMS = {"paper", "PyTorch's default", "convsim, PyTorch's default", "fan in", "fan out", "unit variance", "LSUV"}
ABOUT_NORMS |= {f"convsim, {which}unit variance" for which in ("", "matched channels, ", "all channels, ")}


@pytest.mark.parametrize("name", ARMS)
def test_arms_change_filters_and_keep_their_norms(name):
    model = NETWORKS["resnet"](1, 10, 0.5).to(memory_format=torch.channels_last)  # as the trainer has it
    draw_base(model, "fan_out")
    before = [conv.weight.detach().clone() for conv in convolutions(model)]
    ARMS[name].start(model, torch.randn(64, 1, 16, 16))
    after = [conv.weight.detach() for conv in convolutions(model)]
    same = name.startswith(("base", "regularizer", "soft", "SRIP"))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)) == same
    norms, old = ([weight.flatten(1).norm(dim=1) for weight in weights] for weights in (after, before))
    kept = all(torch.allclose(n, o, rtol=1e-4) for n, o in zip(norms, old, strict=True))
    assert kept == (name not in ABOUT_NORMS)


@pytest.mark.parametrize(
    ("name", "channels"), [("plain", "all"), ("skipinit", "all"), ("resnet", "matched"), ("convmixer", "matched")]
)
def test_the_default_is_the_arm_that_measured_it(name, channels):
    def start(arm):
        torch.manual_seed(0)
        model = NETWORKS[name](1, 7, 0.5)
        draw_base(model, "fan_in")
        ARMS[arm].start(model, torch.zeros(1))
        return [conv.weight for conv in convolutions(model)]

    assert all(map(torch.equal, start("convsim"), start(f"convsim, {channels} channels")))


@pytest.mark.parametrize("name", ["convmixer", "convnext"])
def test_every_arm_takes_depthwise_layers(name):
    for arm in ARMS.values():
        torch.manual_seed(0)
        model = NETWORKS[name](1, 7, 0.25)
        draw_base(model, "fan_in")
        arm.start(model, torch.randn(64, 1, 16, 16))
        assert all(conv.weight.isfinite().all() for conv in convolutions(model))


@pytest.mark.parametrize(("fan", "number"), [("fan_in", 8), ("fan_out", 64)])
def test_the_base_is_drawn_over_the_fan_that_is_named(fan, number):
    model = nn.Sequential(nn.Conv2d(8, 64, 3))
    draw_base(model, fan)
    assert model[0].weight.std().item() == pytest.approx((2 / (9 * number)) ** 0.5, rel=0.05)
    assert not model[0].bias.any()


@pytest.mark.parametrize("name", ["unit variance", "LSUV", "convsim, unit variance"])
def test_every_layer_s_output_has_unit_variance(name):
    model, images = NETWORKS["plain10"](1, 7, 0.5), torch.randn(64, 1, 16, 16)
    draw_base(model, "fan_in")
    ARMS[name].start(model, images)
    for layer in model[:20]:
        images = layer(images)
        if isinstance(layer, nn.Conv2d):
            assert images.std().item() == pytest.approx(1, rel=1e-3)


def test_fixed_kernel_norms_lower_the_similarity_and_fix_them():
    model = NETWORKS["plain"](1, 7, 0.5)
    draw_base(model, "fan_in")
    before = [conv.weight.detach().clone() for conv in convolutions(model)]
    ARMS["convsim, fixed kernel norms"].start(model, torch.zeros(1))
    for old, conv in zip(before, convolutions(model), strict=True):
        new = conv.weight.detach()
        torch.testing.assert_close(new.flatten(2).norm(dim=2), old.flatten(2).norm(dim=2), rtol=1e-4, atol=0)
        assert ci.convolutional_similarity(new) < 0.95 * ci.convolutional_similarity(old)


def test_signed_permutations_use_every_channel_before_any_twice():
    kept = signed_permutations(torch.randn(10, 4, 1, 1)).flatten(1) != 0
    assert (kept.sum(1) == 1).all()
    assert set(kept.sum(0).tolist()) == {2, 3}
    weight = torch.randn(10, 4, 3, 3)
    assert torch.equal(signed_permutations(weight), weight)


def test_patch_whitened_feature_maps_do_not_correlate():
    model = nn.Sequential(nn.Conv2d(1, 6, 3, bias=False), nn.ReLU(), nn.Conv2d(6, 8, 3, bias=False))
    images = F.avg_pool2d(torch.randn(200, 1, 20, 20), 5, 1)
    correlations = []
    for arm in ("orthogonal", "patch-whitened"):
        ARMS[arm].start(model, images)
        correlations.append(max(ci.measure_feature_correlation(model, images).values()))
    assert correlations[1] < correlations[0] / 2


def test_without_1x1_leaves_just_those():
    model = NETWORKS["resnet"](1, 10, 0.5)
    before = {name: conv.weight.detach().clone() for name, conv in model.named_modules() if isinstance(conv, nn.Conv2d)}
    ARMS["convsim, not 1x1"].start(model, torch.zeros(1))
    for name, weight in before.items():
        assert torch.equal(model.get_submodule(name).weight, weight) == (weight.shape[2:] == (1, 1))


# A run


def tiny() -> Data:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(96, 1, 8, 8, generator=generator)
    labels = torch.arange(96) % 2
    images[labels == 1] += 1
    return Data(images[:64], labels[:64], images[64:], labels[64:], 2)


def run(arm, rate=0.05, seed=0, optimizer="sgd-no-decay", data=None, snapshot=None):
    torch.manual_seed(seed)
    model, data = NETWORKS["vgg"](1, 2, 0.25), data or tiny()
    how = {"draw": "fan_out", "optimizer": optimizer, "rate": rate, "steps": 20, "batch": 16, "seed": seed}
    return fit(data, model, arm, **how, snapshot=snapshot)


def test_a_run_learns_and_is_the_same_again():
    curve = run(ARMS["convsim"])
    assert len(curve) == len(points(20))
    assert curve[-1] > 0.9
    assert run(ARMS["convsim"]) == curve


class Noisy:
    """Augments by noise, and is interrupted in one of the steps."""

    def __init__(self, end: int | None = None) -> None:
        self.step, self.end = -1, end  # the first call is for statistics

    def __call__(self, images, generator):
        if self.step == self.end:
            raise KeyboardInterrupt
        self.step += 1
        return images + torch.randn(images.shape, generator=generator) + torch.randn(images.shape)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("end", [0, 10, 19])
def test_a_run_that_was_interrupted_goes_on_from_its_last_test(end, optimizer, tmp_path):
    path, arm = tmp_path / "unfinished.pt", ARMS["convsim"]
    whole = run(arm, optimizer=optimizer, data=replace(tiny(), augment=Noisy()))
    with pytest.raises(KeyboardInterrupt):
        run(arm, optimizer=optimizer, data=replace(tiny(), augment=Noisy(end)), snapshot=Snapshot(path, "a run"))
    rest = Noisy()
    snapshot = Snapshot(path, "a run")
    assert run(arm, optimizer=optimizer, data=replace(tiny(), augment=rest), snapshot=snapshot) == whole
    assert rest.step == 20 - max([step for step in points(20) if step <= end], default=0)


def test_the_snapshot_of_another_run_is_passed_over(tmp_path):
    path, augment = tmp_path / "unfinished.pt", Noisy()
    run(ARMS["base"], snapshot=Snapshot(path, "a run"))
    run(ARMS["base"], data=replace(tiny(), augment=augment), snapshot=Snapshot(path, "another run"))
    assert augment.step == 20


def test_arms_see_the_same_base_draw_and_batches():
    assert run(Arm("draws random numbers", lambda model, images: torch.randn(7))) == run(ARMS["base"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns(name):
    assert run(ARMS["base"], optimizer=name, rate=0.1)[-1] > 0.8


def test_weights_decay_and_nothing_else():
    model = NETWORKS["resnet"](1, 7, 0.5)
    optimizer = OPTIMIZERS["adamw"](decayed_apart(model), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 1 - 0.1 * 0.05 if parameter.ndim > 1 else 1
        torch.testing.assert_close(parameter.detach(), factor * before[name])


def test_inputs_are_made_anew_for_every_batch_and_alike_for_every_arm():
    seen = []

    def noisy(images, generator):
        noise = torch.randn(images.shape, generator=generator)
        seen.append(noise)
        return images + noise

    data = replace(tiny(), augment=noisy)
    first = run(ARMS["base"], data=data)
    assert [len(noise) for noise in seen] == [64] + [16] * 20
    assert len({noise.sum().item() for noise in seen}) == 21
    made = [noise.sum().item() for noise in seen]
    seen.clear()
    assert run(Arm("draws random numbers", lambda model, images: torch.randn(7)), data=data) == first
    assert [noise.sum().item() for noise in seen] == made


@pytest.mark.parametrize("name", ["regularizer", "regularizer, first third", "soft orthogonality, 0.01", "SRIP, 0.01"])
def test_a_term_of_the_loss_counts(name):
    assert run(replace(ARMS[name], weight=100.0)) != run(ARMS["base"])


def test_a_term_counts_only_as_long_as_it_is_wanted():
    assert run(replace(ARMS["regularizer"], weight=100.0, until=0.0)) == run(ARMS["base"])


def test_orthogonality_is_lost_by_its_definition():
    model = nn.Sequential(nn.Conv2d(2, 3, 2, bias=False), nn.Conv2d(3, 3, 1, bias=False))
    excesses = [conv.weight.flatten(1) @ conv.weight.flatten(1).T - torch.eye(3) for conv in model]
    soft = ARMS["soft orthogonality, 0.01"].term(model)
    torch.testing.assert_close(soft(), sum(excess.square().sum() for excess in excesses))
    spectral = sum(torch.linalg.matrix_norm(excess, 2) for excess in excesses)
    assert 0.5 * spectral < ARMS["SRIP, 0.01"].term(model)() <= 1.001 * spectral
    for conv in model:
        nn.init.orthogonal_(conv.weight)
    assert soft() < 1e-8


def test_an_assignment_is_the_least_similarity_of_a_1x1_layer():
    for filters, channels in [(8, 8), (4, 9), (12, 4)]:
        model = nn.Conv2d(channels, filters, 1)
        with torch.no_grad():
            model.weight.copy_(with_norms_of(torch.ones_like(model.weight), model.weight))  # norms of one value
        before = model.weight.detach().clone()
        norms = before.flatten(1).norm(dim=1)
        ARMS["convsim, assigned 1x1"].start(nn.Sequential(model), torch.empty(0))
        assert ((model.weight != 0).flatten(1).sum(1) == 1).all()
        torch.testing.assert_close(model.weight.flatten(1).norm(dim=1), norms)
        found, lowered = (float(ci.convolutional_similarity(w)) for w in (model.weight.detach(), ci.convsim_(before)))
        assert found <= lowered + 1e-5
        load = filters / channels
        assert found == pytest.approx(max(0.0, filters * (load - 1)) / 2 * float(norms[0]) ** 4, abs=1e-4)


def test_a_scrambled_kernel_keeps_its_values():
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    lowered = copy.deepcopy(model)
    ci.initialize_(lowered)
    ARMS["convsim, scrambled"].start(model, torch.empty(0))
    kernels, other = model[0].weight.flatten(2), lowered[0].weight.flatten(2)
    assert not torch.equal(kernels, other)
    assert torch.equal(kernels.sort(2).values, other.sort(2).values)


def test_similarity_for_natural_inputs_falls_by_its_own_measure():
    weight = torch.randn(6, 2, 3, 3)
    frequency = torch.fft.fftfreq(6)
    power = 1 / (frequency[:, None] ** 2 + frequency**2).clamp_min((0.5 / 6) ** 2)

    def measured(filters):
        maps = torch.fft.fft2(filters, s=(6, 6))
        pairs = torch.einsum("ichw,jchw->ijchw", maps, maps.conj()).abs() * power
        return float(pairs.square().sum() - pairs.diagonal().square().sum())

    found = natural(weight)
    found = with_norms_of(weight, found)
    assert measured(found) < 0.6 * measured(weight)
    assert measured(found) < measured(ci.convsim_(weight.clone(), settings=ci.Settings(channels="matched")))


def test_a_run_that_diverges_counts_as_guessing():
    assert run(ARMS["base"], rate=1e30)[-1] == 0.5


def test_points_schedule_and_batches():
    assert points(200)[-1] == 200
    assert len(set(points(200))) == len(points(200))
    assert schedule(0.1) == 1
    assert 0 < schedule(0.999) < 1e-4
    drawn = batches_of(10, 4, torch.Generator().manual_seed(0))
    epoch = torch.cat([next(drawn), next(drawn)])
    assert len(set(epoch.tolist())) == 8


# The records


def test_records_survive_being_cut_off(tmp_path):
    path = tmp_path / "runs.csv"
    records = Records(path)
    kept, cut = record("base", 0, [0.5, 0.75]), record("convsim, 10 steps", 1, [0.25])
    records.add(kept)
    records.add(cut)
    path.write_text(path.read_text()[:-5])
    again = Records(path)
    assert list(again) == [kept]
    assert again.find(CASE, "base", 0.1, 0) == kept
    again.add(cut)
    assert list(Records(path)) == [kept, cut]


def test_records_of_another_kind_are_refused(tmp_path):
    (tmp_path / "runs.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ci.InputError, match="to have the columns"):
        Records(tmp_path / "runs.csv")
    assert (tmp_path / "runs.csv").read_text() == "a,b\n1,2\n"


def test_the_tuned_rate_is_the_best_and_the_grid_grows(tmp_path, monkeypatch):
    from benchmarks.training import __main__ as training

    best = {"base": 0.1, "convsim": 0.9}
    made = []

    def pretend(data, model, arm, *, rate, seed, **options):
        (name,) = [name for name, one in ARMS.items() if one is arm]
        made.append((name, rate, seed))
        (tmp_path / "unfinished.pt").touch()
        return [1 / (1 + abs(math.log(rate / best[name])))] * len(points(20))

    monkeypatch.setattr(training, "fit", pretend)
    arguments = ["--arms", "base", "convsim", "--seeds", "3", "--steps", "20", "--cases", "digits:vgg"]
    monkeypatch.setattr(sys, "argv", ["training.py", *arguments, "--out", str(tmp_path)])
    pytest.importorskip("matplotlib")
    training.main()
    finals = {name: {rate for n, rate, seed in made if n == name and seed < 1000} for name in best}
    assert finals == {"base": {0.1}, "convsim": {0.9}}
    assert {rate for name, rate, _ in made if name == "convsim"} == {0.03, 0.1, 0.3, 0.9, 3.0}
    finals = [(name, seed) for name, _, seed in made if seed < 1000]
    assert finals == [(name, seed) for seed in range(3) for name in best]  # pairs are whole wherever it is stopped
    count = len(made)
    training.main()
    assert len(made) == count  # nothing is trained twice
    with (tmp_path / "runs.csv").open() as file:
        assert sum(row["final"] == "1" for row in csv.DictReader(file)) == 6
    text = (tmp_path / "training.md").read_text(encoding="utf-8")
    assert "| convsim | 0.9 | 3 |" in text
    assert " 1 arms are compared with a base" in text
    assert (tmp_path / "digits-vgg-w1-fan_out-sgd-no-decay-20.png").stat().st_size > 10_000
    assert not (tmp_path / "unfinished.pt").exists()


def test_unknown_cases_are_refused(monkeypatch, capsys, tmp_path):
    from benchmarks.training import __main__ as training

    monkeypatch.setattr(sys, "argv", ["training.py", "--cases", "cifar:vgg", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        training.main()
    assert "the task cifar needs --data" in capsys.readouterr().err


# The statistics


def test_intervals_are_student_s():
    values = [1.0, 2.0, 4.0, 5.0]
    half = 3.182446 * statistics.stdev(values) / 2  # 97.5 % of Student's t with 3 degrees of freedom
    assert interval(values).mean == 3
    assert interval(values).half == pytest.approx(half, rel=1e-6)
    assert math.isnan(interval([1.0]).half)


@pytest.mark.parametrize(
    ("values", "shown"), [([], "no pair"), ([1.26], "+1.3 (one pair)"), ([1.26, 1.26], "+1.3 ± 0.0")], ids=len
)
def test_one_pair_has_no_interval(values, shown):
    assert f"{interval(values):.1f}" == shown


def test_pairs_are_of_equal_seeds():
    base = [record("base", seed, [seed / 10]) for seed in (0, 1, 2)]
    arm = [record("convsim", seed, [seed / 10 + 0.05]) for seed in (2, 0)]
    difference = paired(arm, base, lambda run: run.accuracy)
    assert difference.mean == pytest.approx(0.05)
    assert difference.half == pytest.approx(0, abs=1e-12)


def test_steps_to_a_threshold_are_interpolated():
    curve = [0.0] * 5 + [0.2] + [0.6] * (len(points(20)) - 6)
    run, tested = record("base", 0, curve), points(20)
    assert steps_to(0.4, run) == (pytest.approx((tested[5] + tested[6]) / 2), True)
    assert steps_to(0.0, run) == (tested[0], True)
    assert steps_to(0.7, run) == (20, False)


def test_rows_take_the_final_round_at_the_tuned_rate():
    size = len(points(20))
    runs = [record("base", seed, [0.8] * size) for seed in range(3)]
    runs += [record("convsim", seed, [0.8 + 0.01 * seed] * size) for seed in range(3)]
    runs += [record("convsim", 7, [1.0] * size, rate=0.3), record("base", 7, [0.5] * size, rate=0.3)]
    for rate, accuracy in ((0.1, 0.8), (0.3, 0.7)):
        runs += [record(arm, 1000, [accuracy] * size, rate=rate, final=False) for arm in ("convsim", "base")]
    threshold, (base, ours) = rows_of(runs[::-1], CASE)
    assert threshold == pytest.approx(0.72)
    assert base.gain is None
    assert (ours.rate, len(ours.runs)) == (0.1, 3)
    assert ours.gain.mean == pytest.approx(1.0)
    assert ours.saved.mean == 0
    assert ours.missed == 0
    _, (base, ours) = rows_of(runs, CASE, rate=0.3)
    assert ours.gain.mean == pytest.approx(50)
    assert ours.rate == base.rate == 0.3


def test_comparisons_are_with_each_arm_and_ten_seeds_at_a_time():
    runs = [record("base", seed, [0.5] * len(points(20))) for seed in range(12)]
    runs += [record("convsim", seed, [0.51 if seed < 10 else 0.53] * len(points(20))) for seed in range(12)]
    lines = comparisons(runs, CASE)
    assert "- over base, seeds 0 to 9: +1.00 ± 0.00" in lines
    assert "- over base, seeds 10 to 11: +3.00 ± 0.00" in lines
    assert comparisons(runs[:12], CASE) == []
