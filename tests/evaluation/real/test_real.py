"""Arrays that processes and commands share, and the order of frames."""

import numpy as np
import pytest
from PIL import Image

from seppo_fast.evaluation.human.media import _read_clip
from seppo_fast.evaluation.media.batch import write_settings
from seppo_fast.evaluation.media.files import encode_media
from seppo_fast.evaluation.media.making import require_disk
from seppo_fast.evaluation.metrics.frechet import Distance, frechet_interval
from seppo_fast.evaluation.real.arrays import Rows, fill, read_array
from seppo_fast.evaluation.real.folder import RealFolder
from seppo_fast.evaluation.real.metrics import METRICS, chosen
from seppo_fast.evaluation.real.sets import Wanted
from seppo_fast.utils.errors import CheckpointError, ConfigError


def rows_of(values):
    return Rows("real", "", [str(value) for value in values], lambda row: (np.full((1,), values[row]),), 2)


def test_chunks_that_another_command_replaced_are_computed_again(tmp_path):
    """While one command computes its last chunk, another one with other files replaces the first."""
    file, calls = tmp_path / "x-real.safetensors", []

    def compute(pictures):
        calls.append([float(one[0]) for (one,) in pictures])
        if len(calls) == 2:
            fill(
                file,
                rows_of([7.0, 8.0, 9.0, 10.0]),
                "digest",
                "files",
                lambda some: np.array([one[0] for (one,) in some]),
            )
            (file.parent / ".parts" / file.stem / "2.safetensors").unlink()
        return np.array([one[0] for (one,) in pictures])

    fill(file, rows_of([1.0, 2.0, 3.0, 4.0]), "digest", "files", compute)
    stamp, values = read_array(file)
    assert values.tolist() == [1.0, 2.0, 3.0, 4.0] and stamp == rows_of([1.0, 2.0, 3.0, 4.0]).stamp("digest")
    assert calls == [[1.0, 2.0], [3.0, 4.0], [1.0, 2.0]]


def test_frames_of_a_folder_are_in_the_order_of_their_numbers(tmp_path):
    for number in range(1, 13):
        (tmp_path / "real" / "0").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (20 * number, 0, 0)).save(tmp_path / "real" / "0" / f"frame{number}.png")
    real = RealFolder(str(tmp_path / "real"), Wanted(prompts=(("0", "a"),), samples=1, resolution=16, frames=12))
    assert real.load(0)[:, 0, 0, 0].tolist() == [20 * number for number in range(1, 13)]


def test_a_clip_that_stays_still_keeps_its_frames_in_a_study(tmp_path):
    still = np.full((8, 16, 16, 3), 90, np.uint8)
    halves = np.concatenate([still[:5], still[:3] + 1])
    for name, clip in {"still": still, "halves": halves}.items():
        file = tmp_path / f"{name}.webp"
        file.write_bytes(encode_media(clip))
        frames, milliseconds = _read_clip(file)
        assert np.array_equal(frames, clip) and milliseconds == 125


def test_media_of_other_models_do_not_count_as_existing(tmp_path, monkeypatch):
    for digest in ("aa", "bb"):
        (tmp_path / "media" / digest).mkdir(parents=True)
        (tmp_path / "media" / digest / "x.png").write_bytes(bytes(300_000))
    usage = type("Usage", (), {"free": 350_000})
    monkeypatch.setattr("seppo_fast.evaluation.media.making.shutil.disk_usage", lambda place: usage)
    require_disk(tmp_path, 20, ["base", "other"], 1, 100)  # 900,000 bytes, of which 600,000 may exist
    write_settings(tmp_path, {"models": {"base": {"digest": "aa"}, "run": {"digest": "bb"}}})
    require_disk(tmp_path, 20, ["base", "run"], 1, 100)
    with pytest.raises(CheckpointError, match="the media need about"):
        require_disk(tmp_path, 20, ["base", "other"], 1, 100)


def test_a_single_prompt_has_no_interval():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="at least 2 are needed"):
        frechet_interval(rng.normal(size=(8, 2)), rng.normal(size=(8, 2)), units=(1, 8))


def test_frames_are_no_samples_in_the_warning():
    numbers = {"value": 1.0, "low": 0.0, "high": 2.0, "floor": 0.5, "floor_items": 8, "dimensions": 10}
    assert Distance(**numbers, real=1600, generated=1600).warning == ""
    assert "99 samples are few" in Distance(**numbers, real=1600, generated=1584, unit=16).warning


def test_features_without_a_source_are_refused_before_anything_runs(tmp_path, monkeypatch):
    (tmp_path / "sourceless.py").write_text("import numpy as np\ndef features(x):\n    return np.zeros((len(x), 2))\n")
    monkeypatch.syspath_prepend(tmp_path)
    import sourceless

    (tmp_path / "sourceless.py").unlink()
    monkeypatch.setattr(sourceless, "__file__", None)
    import linecache

    linecache.clearcache()
    with pytest.raises(ConfigError, match="the source of its module, which its digest needs, is missing"):
        chosen(["frechet"], "sourceless:features", None)


def test_lower_is_better_for_lpips_alone_among_the_metrics_of_pairs():
    pairs = {name: metric.higher_is_better for name, metric in METRICS.items() if metric.kind == "pairs"}
    assert pairs == {"ssim": True, "psnr": True, "lpips": False}
