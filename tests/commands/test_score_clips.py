"""`seppo-fast score` on clips: metrics against real clips in three forms, and the layout of ChronoMagic-Bench."""

import csv
import hashlib
import io
import json
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from seppo_fast.cli import main
from seppo_fast.evaluation.media.files import decode_media, encode_media
from seppo_fast.evaluation.media.layout import encode_mp4
from seppo_fast.evaluation.metrics.frechet import frechet
from seppo_fast.evaluation.real import measuring
from seppo_fast.shapes import motion
from seppo_fast.train import train
from seppo_fast.utils.random import keyed_rng
from tests.helpers.clips import frame_numbers, numbered_frames, write_clip
from tests.helpers.runs import tiny_config

IDS = ["3d_printing_08", "day2night_13.0", "own"]  # the second one is an official id with a dot
CAPTIONS = [motion.caption(motion.moving_scene(5, index)) for index in range(3)]
FRAMES = 4


@pytest.fixture(scope="module")
def trained(tiny, adapter, tmp_path_factory):
    """A finished run of one update that makes clips of 4 frames of 16 pixels."""
    config = tiny_config(
        tiny, tmp_path_factory.mktemp("runs"), model={"motion_adapter": str(adapter), "train": "lora"},
        train={"updates": 1}, data={"source": "shapes-motion:6:3", "frames": FRAMES},
    )  # fmt: skip
    train(config)
    return Path(config.output)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "p.json"
    file.write_text(json.dumps([{"caption_id": own, "caption": text} for own, text in zip(IDS, CAPTIONS)]))
    return file


@pytest.fixture(scope="module")
def generated(trained, prompts, tmp_path_factory):
    """A folder with media, three samples per prompt, and scores; must not be changed."""
    folder = tmp_path_factory.mktemp("generated") / "out"
    assert run(*scored(trained, prompts, folder)) == 0
    return folder


@pytest.fixture
def out(generated, tmp_path):
    """A copy of `generated`."""
    return shutil.copytree(generated, tmp_path / "out")


def scored(run_folder, prompts, output, *more):
    """Returns the arguments of a command with all options that the tests share."""
    words = ["--scorers", "brightness", "--samples", 3, "--batch", 3, "--output", output]
    return ["score", run_folder, "--prompts", prompts, *words, *more]


def run(*words):
    return main([str(word) for word in words])


def files_of(folder, model, sample):
    """Returns a model's media files by prompt id, for one sample."""
    items = json.loads((folder / "items.json").read_text())["items"]
    return {IDS[item["prompt_index"]]: folder / item["files"][model] for item in items if item["sample"] == sample}


def values_of(folder, name, model):
    """Returns a column of scores.csv by prompt id, of the first samples."""
    rows = csv.DictReader((folder / "scores.csv").open(newline=""))
    return {row["id"]: float(row[name]) for row in rows if row["model"] == model and row["sample"] == "0"}


def as_frames(clip, folder):
    folder.mkdir(parents=True)
    for number, frame in enumerate(clip):
        Image.fromarray(frame).save(folder / f"{number:03}.png")


# Real clips


def test_three_forms_of_real_clips_are_read(trained, prompts, out, tmp_path):
    """The base's own clips as real ones: a file of this command, a folder of frames, and lossless animated WebP."""
    real = tmp_path / "real"
    real.mkdir()
    first, second, third = files_of(out, "base", 0).values()
    shutil.copy(first, real / f"{IDS[0]}.webp")
    as_frames(decode_media(second.read_bytes(), second.name), real / IDS[1])
    # Another program's file has no count of frames in its metadata; frame 0 is stored twice as long.
    clip = decode_media(third.read_bytes(), third.name)
    frames = [Image.fromarray(frame) for frame in clip]
    frames[0].save(real / "own.webp", save_all=True, append_images=frames[1:], duration=[80, 40, 40, 40], lossless=True)
    assert run(*scored(trained, prompts, out, "--real", real, "--metrics", "psnr,ssim")) == 0
    assert values_of(out, "psnr", "base") == dict.fromkeys(IDS, 100.0)
    assert values_of(out, "ssim", "base") == pytest.approx(dict.fromkeys(IDS, 1.0))
    assert max(values_of(out, "psnr", "run").values()) < 100


def test_frames_are_spread_over_a_whole_video(trained, prompts, out, tmp_path, monkeypatch):
    real = tmp_path / "real"
    real.mkdir()
    clip = numbered_frames(10, 64, 64)
    for own, suffix in zip(IDS, ("mp4", "mkv", "webm")):
        write_clip(real / f"{own}.{suffix}", clip, codec="libvpx-vp9" if suffix == "webm" else "mpeg4")
    as_frames(clip, real / "a folder")
    (tmp_path / "seen.py").write_text(
        "import numpy as np\nSEEN = []\ndef features(pictures):\n    SEEN.append(pictures)\n"
        "    return pictures.mean((1, 2, 3))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    words = ["--real", real, "--metrics", "frechet", "--features", "seen:features"]
    assert run(*scored(trained, prompts, out, *words)) == 0
    import seen

    assert seen.SEEN[0].shape == (4, FRAMES, 16, 16, 3)
    assert [frame_numbers(pixels) for pixels in seen.SEEN[0]] == [[0, 3, 6, 9]] * 4
    assert json.loads((out / "scores.json").read_text())["metrics"]["values"]["frechet"]["n_real"] == 4


def test_a_network_of_pictures_measures_every_frame(trained, prompts, out, tmp_path, monkeypatch):
    """Inception is replaced by a picture's mean colour; the real clips are drawn for the same prompts."""
    monkeypatch.setattr(measuring, "load_features", lambda name, file, device: lambda frames: frames.mean((1, 2)))
    (tmp_path / "weights" / "metrics").mkdir(parents=True)
    (tmp_path / "weights" / "metrics" / "pt_inception-2015-12-05-6726825d.safetensors").write_bytes(b"replaced")
    words = ["--real", "shapes", "--metrics", "fid", "--weights", tmp_path / "weights"]
    assert run(*scored(trained, prompts, out, *words)) == 0
    found = json.loads((out / "scores.json").read_text())["metrics"]["values"]["fid"]
    assert (found["n_real"], found["n_generated"], found["frames"]) == (3 * 6 * FRAMES, 3 * 3 * FRAMES, FRAMES)
    generated = [
        decode_media(file.read_bytes(), "") for sample in range(3) for file in files_of(out, "run", sample).values()
    ]
    real = [drawn(place, draw) for place in range(3) for draw in range(6)]
    means = [np.stack(clips).mean((2, 3)).reshape(-1, 3) for clips in (real, generated)]
    assert found["models"]["run"]["value"] == pytest.approx(frechet(*means), rel=1e-4)


def drawn(place, draw):
    """Returns a real clip of the embedded world, as `--real shapes` draws it for 16 pixels."""
    rng = keyed_rng(0, "real shapes", place, draw)
    clip = motion.render(motion.arrange(motion.parse(CAPTIONS[place]), rng), FRAMES)
    return np.stack([np.asarray(Image.fromarray(frame).resize((16, 16), Image.Resampling.LANCZOS)) for frame in clip])


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("short folder", "has 3 frames, fewer than the 4"),
        ("short video", "has fewer than 4 frames"),
        ("picture", "flat.png is a picture, but these models make clips"),
        ("still", "still.webp is a picture, but these models make clips"),
        ("damaged", "a.webp: truncated, damaged or too large"),
    ],
)
def test_real_clips_that_cannot_be_used(trained, prompts, tmp_path, capsys, kind, says):
    real = tmp_path / "real"
    real.mkdir()
    clip = numbered_frames(3 if kind.startswith("short") else 5, 32, 32)
    if kind == "short video":
        write_clip(real / "a.mp4", clip)
    elif kind == "damaged":
        (real / "a.webp").write_bytes(encode_media(clip)[:-40])
    else:
        as_frames(clip, real / "a")
    if kind in ("picture", "still"):
        Image.new("RGB", (16, 16)).save(real / ("flat.png" if kind == "picture" else "still.webp"))
    for number in range(3):
        write_clip(real / f"b{number}.mp4", numbered_frames(5, 32, 32))
    words = ["--real", real, "--metrics", "kernel", "--features", "numpy:mean"]  # the real files are read before it
    assert run(*scored(trained, prompts, tmp_path / "out", *words)) == 3
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out" / "media").exists()


@pytest.mark.parametrize(
    ("metrics", "says"),
    [
        (["fvd"], "needs clips of at least 10 frames, but these models make 4"),
        (["lpips"], "needs pictures of at least 31 x 31 pixels, but these models make 16 x 16"),
        (["frechet", "--features", "judge"], "measures pictures of 32 x 32 pixels"),
    ],
)
def test_metrics_that_do_not_fit_the_clips(trained, prompts, tmp_path, capsys, metrics, says):
    place = tmp_path / "weights" / "metrics"
    place.mkdir(parents=True)
    for name in ("i3d_pretrained_400", "alexnet-owt-7be5be79", "alex"):
        (place / f"{name}.safetensors").touch()
    words = ["--real", "shapes", "--weights", tmp_path / "weights", "--metrics", *metrics]
    assert run(*scored(trained, prompts, tmp_path / "out", *words)) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out" / "media").exists()


# The layout of ChronoMagic-Bench


def decoded(file):
    with av.open(str(file)) as container:
        assert container.streams.video[0].average_rate == 8
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_the_layout_has_every_clip_under_its_official_name(trained, prompts, out):
    assert run(*scored(trained, prompts, out, "--layout", "chronomagic", "--only", "generate")) == 0
    files = {file.relative_to(out / "chronomagic").as_posix(): file for file in out.glob("chronomagic/**/*.mp4")}
    assert files.keys() == {f"{model}/{part}/{own}.mp4" for model in ("base", "run") for part in "123" for own in IDS}
    for model in ("base", "run"):
        clips = {(sample, own): file for sample in range(3) for own, file in files_of(out, model, sample).items()}
        pixels = {key: decode_media(file.read_bytes(), file.name).astype(int) for key, file in clips.items()}
        for (sample, own), file in clips.items():
            copy = files[f"{model}/{sample + 1}/{own}.mp4"]
            shown = decoded(copy)
            errors = {key: np.abs(shown - clip).mean() for key, clip in pixels.items()}
            assert min(errors, key=errors.get) == (sample, own)
            with av.open(str(copy)) as container:
                digest = hashlib.sha256(file.read_bytes()).hexdigest()
                assert container.metadata["comment"] == f"seppo_fast {digest}"


def test_a_smooth_clip_survives_its_encoding():
    ramp = np.linspace(40, 200, 64)
    clip = np.stack([np.broadcast_to((ramp + 5 * number)[:, None, None], (64, 64, 3)) for number in range(5)])
    clip = clip.round().astype(np.uint8)
    with av.open(io.BytesIO(encode_mp4(clip))) as container:
        copy = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert np.abs(copy.astype(int) - clip).max() <= 4
    assert encode_mp4(clip) == encode_mp4(clip) != encode_mp4(clip[::-1])


def test_a_killed_export_is_resumed_and_other_clips_replace_the_exported_ones(forks, trained, prompts, out, tmp_path):
    words = scored(trained, prompts, out, "--layout", "chronomagic", "--only", "generate")
    assert forks.run(*words, fault="layout-write@5=kill").code == -9
    assert len(list(out.glob("chronomagic/**/*.mp4"))) == 4
    assert forks.run(*words).code == 0
    before = {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in out.glob("chronomagic/**/*.mp4")}
    assert len(before) == 18 and list(out.rglob(".tmp-*")) == []
    times = {file: file.stat().st_mtime_ns for file in before}
    changed = files_of(out, "base", 0)["own"]
    clip = decode_media(changed.read_bytes(), "")
    changed.write_bytes(encode_media(255 - clip))  # intact, so it is kept
    assert run(*words) == 0
    rewritten = [file for file in before if file.stat().st_mtime_ns != times[file]]
    assert rewritten == [out / "chronomagic" / "base" / "1" / "own.mp4"]
    changed.write_bytes(encode_media(clip))
    assert run(*words) == 0
    assert {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in before} == before


@pytest.mark.parametrize(
    ("records", "more", "says"),
    [
        (CAPTIONS, ["--samples", 2], "needs --samples 3, or 1, got 2"),
        ([{"id": "a/b", "prompt": CAPTIONS[0]}], [], "video_id must be a plain file name without the suffix .mp4"),
        ([{"id": "a.mp4", "prompt": CAPTIONS[0]}], [], "got 'a.mp4'"),
        ([{"id": "a", "prompt": CAPTIONS[0]}, {"id": "a", "prompt": CAPTIONS[1]}], [], "two prompts have the id 'a'"),
        (CAPTIONS, ["--layout", "chronomagik"], "did you mean 'chronomagic'?"),
        (CAPTIONS, ["--only", "score"], "belongs to the phase generate"),
    ],
)
def test_what_the_layout_cannot_hold_is_refused(trained, tmp_path, capsys, records, more, says):
    (tmp_path / "p.json").write_text(json.dumps(records))
    words = scored(trained, tmp_path / "p.json", tmp_path / "out", "--layout", "chronomagic", *more)
    assert run(*words) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out" / "media").exists()


def test_pictures_have_no_layout(tiny, tmp_path, capsys):
    train(tiny_config(tiny, tmp_path, train={"updates": 1}))
    (tmp_path / "p.txt").write_text("a red fox\n")
    assert run(*scored(tmp_path / "run", tmp_path / "p.txt", tmp_path / "out", "--layout", "chronomagic")) == 2
    assert "these models make pictures" in capsys.readouterr().err


def test_one_sample_lies_directly_in_the_models_folder(trained, prompts, tmp_path):
    words = scored(trained, prompts, tmp_path / "out", "--samples", 1, "--layout", "chronomagic", "--only", "generate")
    assert run(*words) == 0
    names = {file.relative_to(tmp_path / "out" / "chronomagic").as_posix() for file in tmp_path.glob("out/**/*.mp4")}
    assert names == {f"{model}/{own}.mp4" for model in ("base", "run") for own in IDS}


def test_without_an_encoder_nothing_is_generated(trained, prompts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(av, "codecs_available", av.codecs_available - {"libx264"})
    assert run(*scored(trained, prompts, tmp_path / "out", "--layout", "chronomagic")) == 2
    assert "without the H.264 encoder libx264" in capsys.readouterr().err
    assert not (tmp_path / "out" / "media").exists()
