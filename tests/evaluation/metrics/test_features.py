"""Feature functions: the judge's measurements, loading by name, batches."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from seppo_fast.evaluation.metrics import features
from seppo_fast.evaluation.metrics.features import JUDGE_NAMES, judge_features, load_features, read_features
from seppo_fast.evaluation.metrics.frechet import frechet
from seppo_fast.evaluation.metrics.kernel import kernel_distance
from seppo_fast.shapes import motion
from seppo_fast.shapes.world import SIZE, render, scene
from seppo_fast.utils.errors import ConfigError, DataError

CPU = torch.device("cpu")


def world(seed: int, count: int) -> np.ndarray:
    return np.stack([render(scene(seed, index)) for index in range(count)])


def test_features_are_what_the_scenes_contain():
    scenes = [scene(3, index) for index in range(70)]  # more than a batch
    measured = judge_features(np.stack([render(one) for one in scenes]))
    assert measured.shape == (70, len(JUDGE_NAMES)) and measured.dtype == np.float32
    for values, one in zip(measured, scenes):
        named = dict(zip(JUDGE_NAMES, values))
        things = one.description.things
        for key in ("colour", "shape", "size"):
            given = [getattr(thing, key) for thing in things]
            known = {"colour": JUDGE_NAMES[:6], "shape": JUDGE_NAMES[6:10], "size": ("small", "large")}[key]
            assert {name: named[name] for name in known} == {name: given.count(name) for name in known}
        assert named["extent"] == pytest.approx(
            np.mean(np.sqrt(one.areas)) / 10, rel=0.12
        )  # faint pixels at the rim are missing
        x, y = np.mean(one.centres, axis=0) / SIZE - 0.5
        assert named["x"] == pytest.approx(x, abs=0.02) and named["y"] == pytest.approx(y, abs=0.02)
        background = [named[f"background {name}"] for name in ("red", "green", "blue")]
        np.testing.assert_allclose(background, np.array(one.background) / 255, atol=0.003)
        assert named["no shape"] == 0 and named["stray colour"] < 0.01 and named["background noise"] < 0.2
        relations = [name for name in ("left of", "right of", "above", "below") if named[name]]
        if one.description.relation:
            first, second = (thing.colour for thing in things)
            opposite = dict(zip(("left of", "right of", "above", "below"), ("right of", "left of", "below", "above")))
            swapped = JUDGE_NAMES.index(first) > JUDGE_NAMES.index(second)
            expected = opposite[one.description.relation] if swapped else one.description.relation
            assert relations == [expected]
        else:
            assert relations == []


def test_distances_grow_as_pictures_get_worse():
    real, other = judge_features(world(1, 300)), world(2, 300)
    rng = np.random.default_rng(0)
    noise = rng.normal(size=other.shape)
    noisy = [np.clip(other + level * noise, 0, 255).astype(np.uint8) for level in (0, 12, 30, 60)]
    made = [judge_features(pictures) for pictures in noisy]
    by_frechet = [frechet(real, rows) for rows in made]
    by_kernel = [kernel_distance(real, rows)[0] for rows in made]
    for distances in (by_frechet, by_kernel):
        assert sorted(distances) == distances and distances[3] > 5 * abs(distances[0])
    red = made[0][made[0][:, 0] == 1]
    same = made[0][: len(red)]
    assert frechet(real, red) > 3 * frechet(real, same)
    assert kernel_distance(real, red)[0] > 10 * abs(kernel_distance(real, same)[0])


def test_any_picture_has_finite_features():
    rng = np.random.default_rng(1)
    odd = [np.zeros((SIZE, SIZE, 3)), np.full((SIZE, SIZE, 3), 255), rng.integers(0, 256, (SIZE, SIZE, 3))]
    odd += [rng.integers(0, 2, (SIZE, SIZE, 3)) * 255, np.arange(SIZE * SIZE * 3).reshape(SIZE, SIZE, 3) % 256]
    measured = judge_features(np.stack(odd).astype(np.uint8))
    assert np.isfinite(measured).all() and (abs(measured) < 20).all()
    assert np.isfinite(frechet(measured, judge_features(world(1, 5))))


def test_a_clip_is_its_mean_and_its_change():
    clips = np.stack([motion.render(motion.moving_scene(1, index), 5) for index in range(3)])
    measured = judge_features(clips)
    frames = np.stack([judge_features(clip) for clip in clips])
    np.testing.assert_allclose(measured[:, :25], frames.mean(1), rtol=1e-6)
    np.testing.assert_allclose(measured[:, 25:], frames[:, -1] - frames[:, 0], rtol=1e-6)
    backwards = judge_features(clips[:, ::-1])
    np.testing.assert_allclose(backwards[:, :25], measured[:, :25], atol=1e-6)
    np.testing.assert_allclose(backwards[:, 25:], -measured[:, 25:], atol=1e-6)


def test_wrong_pictures_are_refused():
    pictures = world(1, 2)
    for bad in (pictures[:, :31], pictures[0], pictures.astype(float), pictures[None, None]):
        with pytest.raises(ValueError, match="pictures: expected uint8"):
            judge_features(bad)
    with pytest.raises(ValueError, match="at least 2 frames"):
        judge_features(pictures[:, None])


def test_functions_are_loaded_by_name(tmp_path, monkeypatch):
    (tmp_path / "my_features.py").write_text(
        "def means(pictures):\n    return pictures.mean((1, 2))\n"
        "def flat(pictures):\n    return pictures.mean((1, 2, 3))\nnumber = 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_features", raising=False)
    pictures = world(1, 3)
    assert load_features("judge", None, CPU) is judge_features
    means = load_features("my_features:means", None, CPU)(pictures)
    assert means.dtype == np.float32
    np.testing.assert_allclose(means, pictures.mean((1, 2)), rtol=1e-6)
    with pytest.raises(ConfigError, match=r"returned shape \(3,\) for 3 pictures"):
        load_features("my_features:flat", None, CPU)(pictures)
    for name, message in (
        ("my_features:none", "cannot be imported: AttributeError"),
        ("no_such_module:f", "cannot be imported: ModuleNotFoundError"),
        ("my_features:number", "is a int and cannot be called"),
        ("inceptoin", "did you mean 'inception'"),
        ("i3d", "need a file of weights"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_features(name, None, CPU)
    with pytest.raises(ConfigError, match="does not exist"):
        load_features("inception", Path("missing.safetensors"), CPU)


def test_feature_files_are_read_without_pickles(tmp_path):
    rows = np.random.default_rng(2).standard_normal((5, 3)).astype(np.float16)
    np.save(tmp_path / "a.npy", rows)
    save_file({"features": torch.from_numpy(rows)}, tmp_path / "a.safetensors")
    for name in ("a.npy", "a.safetensors"):
        read = read_features(tmp_path / name)
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read, rows)
    torch.save(rows, tmp_path / "a.pt")
    (tmp_path / "a.pt").rename(tmp_path / "pickle.npy")
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object))
    np.save(tmp_path / "flat.npy", rows[0])
    np.save(tmp_path / "nan.npy", rows * np.nan)
    save_file({"a": torch.zeros(1, 2), "b": torch.zeros(1, 2)}, tmp_path / "two.safetensors")
    for name in (
        "missing.npy",
        "pickle.npy",
        "objects.npy",
        "flat.npy",
        "nan.npy",
        "two.safetensors",
        "gt150_feats.pt",
    ):
        with pytest.raises(DataError, match=name):
            read_features(tmp_path / name)


def test_networks_run_in_batches_of_pictures_or_frames(monkeypatch):
    seen = []

    def recorded(network, batch, **options):
        seen.append((network, len(batch), options))
        return batch.reshape(len(batch), -1)[:, :4].astype(np.float32)

    for module, loader in ((features.inception, "load_inception"), (features.i3d, "load_i3d")):
        monkeypatch.setattr(module, loader, lambda file, device: file.stem)
        monkeypatch.setattr(module, "features", recorded)
    pictures = world(1, 7)
    made = load_features("inception-clean", Path("a.safetensors"), CPU, batch=3)(pictures)
    np.testing.assert_array_equal(made, pictures.reshape(7, -1)[:, :4])
    clips = pictures[:6].reshape(3, 2, SIZE, SIZE, 3)
    load_features("i3d", Path("b.safetensors"), CPU, batch=5)(clips)
    load_features("inception", Path("c.safetensors"), CPU, batch=9)(pictures)
    clean, plain = {"clean": True}, {"clean": False}
    assert seen == [("a", 3, clean), ("a", 3, clean), ("a", 1, clean), ("b", 2, {}), ("b", 1, {}), ("c", 7, plain)]
