"""The training benchmark's parts: what its numbers rest on."""

import csv
import math
import statistics
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import convsim_init as ci

pytest.importorskip("sklearn")

from benchmarks.training.arms import ARMS, Arm, convolutions, draw_base
from benchmarks.training.cifar import read_cifar
from benchmarks.training.fit import batches_of, fit, points, schedule
from benchmarks.training.networks import NETWORKS
from benchmarks.training.records import Case, Record, Records
from benchmarks.training.summary import comparisons, interval, paired, rows_of, steps_to
from benchmarks.training.tasks import TASKS, Data, textures

CASE = Case("digits", "vgg", 1.0, 0.9, 20)


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


# The arms

ABOUT_NORMS = {"paper", "PyTorch's default"}


@pytest.mark.parametrize("name", ARMS)
def test_arms_change_filters_and_keep_their_norms(name):
    torch.manual_seed(0)
    model = NETWORKS["resnet"](1, 10, 0.5)
    draw_base(model)
    before = [conv.weight.detach().clone() for conv in convolutions(model)]
    ARMS[name].start(model, torch.randn(64, 1, 16, 16))
    after = [conv.weight.detach() for conv in convolutions(model)]
    same = name == "base" or ARMS[name].penalty
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)) == bool(same)
    norms, old = ([weight.flatten(1).norm(dim=1) for weight in weights] for weights in (after, before))
    kept = all(torch.allclose(n, o, rtol=1e-4) for n, o in zip(norms, old, strict=True))
    assert kept == (name not in ABOUT_NORMS)


def test_patch_whitened_feature_maps_do_not_correlate():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3, bias=False), nn.ReLU(), nn.Conv2d(6, 8, 3, bias=False))
    images = F.avg_pool2d(torch.randn(200, 1, 20, 20), 5, 1)
    correlations = []
    for arm in ("orthogonal", "patch-whitened"):
        ARMS[arm].start(model, images)
        correlations.append(max(ci.measure_feature_correlation(model, images).values()))
    assert correlations[1] < correlations[0] / 2


def test_without_1x1_leaves_just_those():
    torch.manual_seed(0)
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


def run(arm, rate=0.05, seed=0):
    torch.manual_seed(seed)
    model = NETWORKS["vgg"](1, 2, 0.25)
    return fit(tiny(), model, arm, rate=rate, momentum=0.9, steps=20, batch=16, seed=seed)


def test_a_run_learns_and_is_the_same_again():
    curve = run(ARMS["convsim"])
    assert len(curve) == len(points(20))
    assert curve[-1] > 0.9
    assert run(ARMS["convsim"]) == curve


def test_arms_see_the_same_base_draw_and_batches():
    assert run(Arm("draws random numbers", lambda model, images: torch.randn(7))) == run(ARMS["base"])


def test_a_penalty_counts():
    assert run(Arm("", penalty=100.0, normalized=True)) != run(ARMS["base"])


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
        return [1 / (1 + abs(math.log(rate / best[name])))] * len(points(20))

    monkeypatch.setattr(training, "fit", pretend)
    arguments = ["--arms", "base", "convsim", "--seeds", "3", "--steps", "20", "--cases", "digits:vgg"]
    monkeypatch.setattr(sys, "argv", ["training.py", *arguments, "--out", str(tmp_path)])
    pytest.importorskip("matplotlib")
    training.main()
    finals = {name: {rate for n, rate, seed in made if n == name and seed < 1000} for name in best}
    assert finals == {"base": {0.1}, "convsim": {0.9}}
    assert {rate for name, rate, _ in made if name == "convsim"} == {0.03, 0.1, 0.3, 0.9, 3.0}
    count = len(made)
    training.main()
    assert len(made) == count  # nothing is trained twice
    with (tmp_path / "runs.csv").open() as file:
        assert sum(row["final"] == "1" for row in csv.DictReader(file)) == 6
    assert "| convsim | 0.9 | 3 |" in (tmp_path / "training.md").read_text()
    assert (tmp_path / "digits-vgg-w1-m0.9.png").stat().st_size > 10_000


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
