"""`seppo-fast score --real --metrics`: values equal those computed from the files; resumed work, the same bytes."""

import csv
import hashlib
import json
import math
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file
from skimage.metrics import structural_similarity

from seppo_fast.cli import main
from seppo_fast.data.media.images import file_ref, load_image
from seppo_fast.evaluation.media.files import decode_media
from seppo_fast.evaluation.metrics import alexnet, keys
from seppo_fast.evaluation.metrics.features import judge_features
from seppo_fast.evaluation.metrics.inception import features, load_inception
from seppo_fast.evaluation.real import measuring, results
from seppo_fast.evaluation.real.arrays import MetricError
from seppo_fast.shapes import world
from seppo_fast.train import train
from seppo_fast.utils.random import keyed_rng
from tests.helpers.networks import random_weights
from tests.helpers.runs import tiny_config

CAPTIONS = [world.caption(world.scene(77, index)) for index in range(4)]
RECORDS = [{"id": f"p{place}.{place}", "prompt": text} for place, text in enumerate(CAPTIONS)]
METRICS = ["--real", "shapes", "--metrics", "ssim,psnr,frechet,kernel", "--features", "judge"]
CPU = "cpu"


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """A finished run of one update that makes pictures of 32 pixels."""
    config = tiny_config(tiny, tmp_path_factory.mktemp("runs"), train={"updates": 1}, data={"resolution": 32})
    train(config)
    return Path(config.output)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "p.json"
    file.write_text(json.dumps(RECORDS))
    return file


@pytest.fixture(scope="module")
def generated(trained, prompts, tmp_path_factory):
    """A folder with media, two samples per prompt, and scores, but no metrics; must not be changed."""
    folder = tmp_path_factory.mktemp("generated") / "out"
    assert run(*scored(trained, prompts, folder)) == 0
    return folder


@pytest.fixture(scope="module")
def straight(generated, trained, prompts, tmp_path_factory):
    """The folder of a command with metrics that was not interrupted; must not be changed."""
    folder = shutil.copytree(generated, tmp_path_factory.mktemp("straight") / "out")
    assert run(*scored(trained, prompts, folder, *METRICS)) == 0
    return folder


@pytest.fixture
def out(generated, tmp_path):
    """A copy of `generated`."""
    return shutil.copytree(generated, tmp_path / "out")


@pytest.fixture
def real(tmp_path):
    """A folder of real pictures of several sizes and formats, named like the prompts, and one more."""
    folder = tmp_path / "real"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for place, (record, suffix) in enumerate(zip(RECORDS, ("png", "jpg", "webp", "png"))):
        pixels = rng.integers(0, 256, (40 + 9 * place, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{record['id']}.{suffix}")
    Image.fromarray(pixels[:33, :33]).save(folder / "more.png")
    return folder


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Writes a function of the user's own that returns features of `pictures`; returns its name."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(body):
        module = f"own_{tmp_path.name}"  # a module of this name is imported only once
        (tmp_path / f"{module}.py").write_text(f"import numpy as np\ndef of(pictures):\n    {body}\n")
        return f"{module}:of"

    return write


def scored(run_folder, prompts, output, *more):
    """Returns the arguments of a command with all options that the tests share."""
    words = ["--scorers", "brightness", "--samples", 2, "--batch", 4, "--output", output]
    return ["score", run_folder, "--prompts", prompts, *words, *more]


def run(*words):
    return main([str(word) for word in words])


def bytes_of(folder):
    """Returns the digest of every published file, by its path in the folder; hidden files are not published."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    shown = [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in shown}


def tree_of(folder):
    return json.loads((folder / "scores.json").read_text())


def pictures_of(folder, model):
    """Returns the items, and a model's pictures `(N, H, W, 3)` or clips in their order."""
    items = json.loads((folder / "items.json").read_text())["items"]
    files = [folder / item["files"][model] for item in items]
    return items, np.stack([decode_media(file.read_bytes(), file.name) for file in files])


def drawn(place, draw):
    rng = keyed_rng(0, "real shapes", place, draw)
    return world.render(world.arrange(world.parse(CAPTIONS[place]), rng))


def decibels(x, y):
    return -10 * math.log10(np.mean((x / 255 - y / 255) ** 2))


def by_eigenvalues(x, y):
    x, y = x.astype(np.float64), y.astype(np.float64)
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = np.sqrt(np.linalg.eigvals(a @ b).real.clip(0)).sum()  # the trace of the square root; a and b are singular
    return float(np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(a + b) - 2 * root)


def by_double_sum(x, y, p, q):
    """Means over pairs of rows that belong to different prompts `p` and `q`."""
    kernel = np.array([[(float(a.astype(np.float64) @ b) / x.shape[1] + 1) ** 3 for b in (*x, *y)] for a in (*x, *y)])
    n, apart = len(x), np.not_equal.outer([*p, *q], [*p, *q])
    corners = [(slice(n), slice(n)), (slice(n, None), slice(n, None)), (slice(n), slice(n, None))]
    means = [kernel[corner][apart[corner]].mean() for corner in corners]
    return means[0] + means[1] - 2 * means[2]


OF_REAL, OF_ITEMS = [place // 4 for place in range(16)], [0, 1, 2, 3] * 2  # the prompts of four real files, two samples


# Values


def test_pairs_equal_independent_formulas(straight):
    table = list(csv.DictReader((straight / "scores.csv").open(newline="")))
    section = tree_of(straight)["metrics"]["values"]
    for model in ("base", "run"):
        items, pictures = pictures_of(straight, model)
        rows = [row for row in table if row["model"] == model]
        pairs = [(picture, drawn(item["prompt_index"], 0)) for item, picture in zip(items, pictures, strict=True)]
        settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "channel_axis": 2}
        ssim = [structural_similarity(x / 255, y / 255, data_range=1, **settings) for x, y in pairs]
        assert [float(row["ssim"]) for row in rows] == pytest.approx(ssim, rel=1e-9)
        assert [float(row["psnr"]) for row in rows] == pytest.approx([decibels(x, y) for x, y in pairs], rel=1e-9)
        assert section["ssim"]["means"][model] == pytest.approx(np.mean(ssim), rel=1e-9)
    change = section["psnr"]["runs"]["run"]
    assert change["difference"] == pytest.approx(section["psnr"]["means"]["run"] - section["psnr"]["means"]["base"])
    assert change["items"] == len(CAPTIONS) and change["low"] < change["difference"] < change["high"]
    assert section["psnr"]["real"]["count"] == 4 * len(CAPTIONS) and not section["psnr"]["unverified"]


def test_distances_equal_independent_formulas(straight):
    real = judge_features(np.stack([drawn(place, draw) for place in range(4) for draw in range(4)]))
    section = tree_of(straight)["metrics"]["values"]
    frechet, kernel = section["frechet"], section["kernel"]
    made = {model: judge_features(pictures_of(straight, model)[1]) for model in ("base", "run")}
    for model, rows in made.items():
        assert frechet["models"][model]["value"] == pytest.approx(by_eigenvalues(real, rows), rel=1e-4)
        assert kernel["models"][model]["value"] == pytest.approx(by_double_sum(real, rows, OF_REAL, OF_ITEMS), rel=1e-6)
        for metric in (frechet, kernel):
            found = metric["models"][model]
            assert (found["low"] + found["high"]) / 2 == pytest.approx(found["value"])
        assert frechet["models"][model]["warning"].startswith("8 samples are few for 25 features")
    order = keyed_rng(0, "real floor").permutation(16)
    assert frechet["floor"] == pytest.approx(by_eigenvalues(real[order[:8]], real[order[8:]]), rel=1e-4)
    pairs = partial(by_double_sum, p=OF_REAL, q=OF_ITEMS)
    for metric, distance in ((frechet, by_eigenvalues), (kernel, pairs)):
        change = metric["runs"]["run"]
        expected = distance(real, made["run"]) - distance(real, made["base"])
        assert change["difference"] == pytest.approx(expected, abs=1e-4 * abs(distance(real, made["base"])))
        assert change["low"] < change["difference"] < change["high"]
        counts = [metric[name] for name in ("n_real", "n_generated", "dimensions", "frames", "resamples")]
        assert counts == [16, 8, 25, 1, 100] and metric["features"] == "judge"
    assert frechet["floor_items"] == 8


def test_intervals_draw_the_samples_of_a_prompt_together(straight):
    real = judge_features(np.stack([drawn(place, draw) for place in range(4) for draw in range(4)]))
    _, base = pictures_of(straight, "base")
    by_prompt = judge_features(base)[[0, 4, 1, 5, 2, 6, 3, 7]]  # the items are sample by sample
    values = []
    for number in range(100):
        rng = keyed_rng(0, "bootstrap of a kernel distance", number)
        first, units = rng.integers(16, size=16), rng.integers(4, size=4)
        units[0] += (units == units[0]).all() * (1 - 4 * (units[0] == 3))  # never only one prompt
        rows = np.repeat(units, 2) * 2 + np.tile([0, 1], 4)
        values.append(by_double_sum(real[first], by_prompt[rows], first // 4, rows // 2))
    found = tree_of(straight)["metrics"]["values"]["kernel"]["models"]["base"]
    half = 1.959963984540054 * np.std(values, ddof=1)
    assert (found["high"] - found["low"]) / 2 == pytest.approx(half, rel=1e-6)


def test_the_tables_and_their_notes(straight):
    text = (straight / "scores.md").read_text()
    after = text.split("**Against real pictures or clips**")[1]
    head = [cell.strip() for cell in after.splitlines()[2].split("|")]
    labels = ["SSIM (higher is closer)", "PSNR (dB) (higher is closer)", "Fréchet distance (lower is closer)"]
    assert head[2:5] == labels
    section = tree_of(straight)["metrics"]["values"]
    found = section["frechet"]["models"]["base"]
    assert f"| {found['value']:.4g} [{found['low']:.4g}, {found['high']:.4g}] |" in after
    assert "25 features of judge; n = 16 real (16 real files of shapes), 8 generated per model; floor" in after
    floor = f"floor, 8 real against 8 other real samples: {section['frechet']['floor']:.4g}"
    assert f"{floor}; 95 % intervals from 100 resamples" in after
    assert "Real pictures: the centre square, resized to the generated size (Lanczos)" in after
    assert "8 samples are few for 25 features" in after and "similarity to it, not quality" in after
    assert f"| Fréchet distance | {section['frechet']['runs']['run']['difference']:+.4g} | [" in after
    assert "adjusted for the number of metrics (Holm)" in after and "unverified" not in after


def test_what_is_printed_about_distances(straight, tmp_path, capsys):
    out = shutil.copytree(straight, tmp_path / "out")
    assert run("score", "--only", "statistics", "--output", out) == 0
    said, floor = capsys.readouterr().out, tree_of(out)["metrics"]["values"]["frechet"]["floor"]
    sizes = "n = 16 real, 8 generated; "
    assert f"frechet: {sizes}floor, 8 real against 8 other real samples: {floor:.4g}\n" in said
    assert f"kernel: {sizes}its expectation for equal distributions is 0\n" in said


def test_one_prompt_has_no_intervals(trained, tmp_path):
    prompts, out = tmp_path / "one.json", tmp_path / "out"
    prompts.write_text(json.dumps(RECORDS[:1]))
    assert run(*scored(trained, prompts, out, *METRICS)) == 0
    section = tree_of(out)["metrics"]
    found = section["values"]["frechet"]
    assert [found["models"]["run"][end] for end in ("low", "high")] == [None, None]
    assert [found["runs"]["run"][end] for end in ("low", "high")] == [None, None] and found["models"]["run"][
        "value"
    ] > 0
    assert "at least two prompts" in section["missing"]["kernel"]
    assert "no intervals, because all generated files belong to one prompt" in (out / "scores.md").read_text()


def test_large_sets_are_compared_in_subsets_of_the_size_that_is_printed(straight, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "LARGEST", 10)
    out = shutil.copytree(straight, tmp_path / "out")
    assert run("score", "--only", "statistics", "--output", out) == 0
    found = tree_of(out)["metrics"]["values"]["kernel"]
    assert found["subset"] == 8 and found["models"]["run"]["low"] is None
    assert "means over 100 subsets of 8, with a standard deviation" in (out / "scores.md").read_text()


# Resumed and shared work


@pytest.mark.parametrize("fault", ["metric-write@1", "metric-write@6"])
def test_a_killed_command_is_resumed_with_the_same_bytes(forks, trained, prompts, straight, out, fault):
    words = scored(trained, prompts, out, *METRICS)
    assert forks.run(*words, fault=f"{fault}=kill").code == -9
    ended = forks.run(*words)
    assert ended.code == 0, ended.err
    assert bytes_of(out) == bytes_of(straight)
    assert list(out.rglob(".tmp-*")) == []


def test_two_processes_share_the_work_and_give_the_same_bytes(ranks, trained, prompts, straight, out):
    ended = ranks.run(2, *scored(trained, prompts, out, *METRICS))
    assert [one.code for one in ended] == [0, 0], ended
    assert bytes_of(out) == bytes_of(straight)


def test_the_statistics_need_files_alone(straight, tmp_path, capsys):
    out = shutil.copytree(straight, tmp_path / "out")
    for name in ("scores.json", "scores.md", "scores.csv"):
        (out / name).unlink()
    shutil.rmtree(out / "metrics" / ".parts")
    assert run("score", "--only", "statistics", "--output", out) == 0
    assert bytes_of(out) == bytes_of(straight)
    assert run("score", "--only", "statistics", "--output", out, "--metrics", "psnr,lpips") == 0
    section = tree_of(out)["metrics"]
    assert list(section["values"]) == ["psnr"] and "not measured" in section["missing"]["lpips"]
    assert "lpips: no value (it was not measured" in (out / "scores.md").read_text()
    assert run("score", "--only", "statistics", "--output", out, "--metrics", "pnsr") == 2
    assert "did you mean 'psnr'?" in capsys.readouterr().err


def test_a_changed_real_picture_is_measured_again(trained, prompts, real, out):
    words = scored(trained, prompts, out, "--real", real, "--metrics", "psnr,kernel", "--features", "judge")
    values = []
    for _ in range(2):
        assert run(*words) == 0
        values.append(tree_of(out)["metrics"]["values"])
        Image.new("RGB", (48, 40), "red").save(real / "p0.0.png")
    assert values[0]["psnr"]["means"] != values[1]["psnr"]["means"]
    assert values[0]["kernel"]["models"] != values[1]["kernel"]["models"]
    assert values[0]["psnr"]["real"]["digest"] != values[1]["psnr"]["real"]["digest"]


def test_arrays_that_another_command_replaced_are_not_used(straight, trained, prompts, real, tmp_path):
    """The second command replaces the features of the real pictures, which both distances use."""
    out = shutil.copytree(straight, tmp_path / "out")
    assert run(*scored(trained, prompts, out, "--real", real, "--metrics", "kernel", "--features", "judge")) == 0
    assert run("score", "--only", "statistics", "--output", out) == 0
    section = tree_of(out)["metrics"]
    assert list(section["values"]) == ["ssim", "psnr", "kernel"] and section["values"]["kernel"]["n_real"] == 5
    assert "other real files" in section["missing"]["frechet"]


def test_metrics_of_other_media_are_not_shown(straight, trained, prompts, tmp_path):
    out = shutil.copytree(straight, tmp_path / "out")
    copy = shutil.copytree(trained, tmp_path / "other")
    assert run(*scored(copy, prompts, out)) == 0
    items = json.loads((out / "items.json").read_text())
    items["items"] = items["items"][:4]
    (out / "items.json").write_text(json.dumps(items))
    assert run("score", "--only", "statistics", "--output", out) == 0
    section = tree_of(out)["metrics"]
    assert section["values"] == {} and "has not measured all media" in section["missing"]["psnr"]


# A folder of real pictures


def test_a_real_picture_is_cropped_and_resized_by_the_rule_of_training(trained, prompts, real, out):
    assert run(*scored(trained, prompts, out, "--real", real, "--metrics", "psnr")) == 0
    rows = list(csv.DictReader((out / "scores.csv").open(newline="")))
    items, pictures = pictures_of(out, "base")
    found = [float(row["psnr"]) for row in rows if row["model"] == "base"]
    for item, picture, value in zip(items, pictures, found, strict=True):
        (file,) = real.glob(f"{RECORDS[item['prompt_index']]['id']}.*")
        assert value == pytest.approx(decibels(picture, load_image(file_ref(file), 32)), rel=1e-9)


def test_every_real_picture_counts_in_a_distance(trained, prompts, real, out, own):
    name = own("return pictures.reshape(len(pictures), -1, 3).mean(1)")
    words = ["--real", real, "--metrics", "frechet", "--features", name]
    assert run(*scored(trained, prompts, out, *words)) == 0
    fitted = np.stack([load_image(file_ref(file), 32) for file in sorted(real.iterdir())])
    x, y = (rows.reshape(len(rows), -1, 3).mean(1) for rows in (fitted, pictures_of(out, "run")[1]))
    found = tree_of(out)["metrics"]["values"]["frechet"]
    assert found["n_real"] == 5 and found["dimensions"] == 3 and found["features"] == name
    assert found["models"]["run"]["value"] == pytest.approx(by_eigenvalues(x, y), rel=1e-4)


def test_networks_read_weights_by_name(trained, real, tmp_path, capsys):
    prompts, out = tmp_path / "few.json", tmp_path / "out"
    prompts.write_text(json.dumps(RECORDS[:2]))  # few, because Inception takes half a second per picture
    (real / "more.png").unlink()
    place = tmp_path / "weights" / "metrics"
    place.mkdir(parents=True)
    shapes = {f"{name}.weight": shape for name, shape in keys.ALEXNET.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in keys.ALEXNET.items()}
    save_file(random_weights(shapes, 3), place / "alexnet-owt-7be5be79.safetensors")
    words = scored(trained, prompts, out, "--samples", 1, "--real", real, "--weights", place.parent, "--metrics")
    assert run(*words, "lpips,fid,kid") == 2
    said = capsys.readouterr().err
    assert "missing alex.pth of richzhang/PerceptualSimilarity (6 KB)" in said and "91 MB" in said
    assert "alexnet-owt" not in said
    heads = random_weights({f"{name}.weight": shape for name, shape in keys.HEADS.items()}, 4)
    save_file({name: values.abs() for name, values in heads.items()}, place / "alex.safetensors")
    inception = place / "pt_inception-2015-12-05-6726825d.safetensors"
    save_file(random_weights(keys.normalised(keys.INCEPTION, "conv"), 1), inception)
    assert run(*words, "lpips,fid,kid") == 0
    section = tree_of(out)["metrics"]["values"]
    files = sorted(real.iterdir())
    network = load_inception(inception, CPU)
    x = np.concatenate([features(network, np.array(Image.open(file).convert("RGB"))[None]) for file in files])
    items, base = pictures_of(out, "base")
    y = features(network, base)
    assert section["kid"]["models"]["base"]["value"] == pytest.approx(by_double_sum(x, y, range(4), range(2)), rel=1e-3)
    assert section["fid"]["dimensions"] == 2048 and section["fid"]["unverified"]
    own = np.stack([load_image(file_ref(files[item["prompt_index"]]), 32) for item in items])
    distances = alexnet.lpips(alexnet.load_lpips(*sorted(place.glob("alex*"))[::-1], CPU), base, own)
    assert section["lpips"]["means"]["base"] == pytest.approx(distances.mean(), rel=1e-6)
    text = (out / "scores.md").read_text()
    assert text.count("unverified on the true weights") == 3 and "own resolutions (spatial=False" in text
    assert "2 samples are few for 2048 features" in text


# What is refused


def write_bad_real(folder, kind):
    folder.mkdir()
    for record in RECORDS:
        Image.new("RGB", (32, 32), "blue").save(folder / f"{record['id']}.png")
    if kind == "empty":
        shutil.rmtree(folder)
        folder.mkdir()
    if kind == "text":
        (folder / "p1.1.png").write_text("no picture")
        (folder / "p2.2.png").write_bytes((folder / "p2.2.png").read_bytes()[:60])
    if kind == "unnamed":
        (folder / "p3.3.png").rename(folder / "else.png")
    if kind == "twice":
        (folder / "sub").mkdir()
        shutil.copy(folder / "p3.3.png", folder / "sub")
    if kind == "clip":
        (folder / "p.mp4").write_bytes(b"x")
    if kind == "few":
        (folder / "p3.3.png").unlink()


@pytest.mark.parametrize(
    ("kind", "metrics", "code", "says"),
    [
        ("none", "psnr", 2, "not a folder"),
        ("empty", "psnr", 3, "holds no file .png"),
        ("text", "psnr", 3, "2 of 4 files cannot be used"),
        ("text", "kernel --features judge", 3, "p1.1.png: not an image"),
        ("unnamed", "psnr", 3, "1 of 4 prompts have no real counterpart"),
        ("twice", "ssim", 3, "several files are named like the id 'p3.3'"),
        ("clip", "psnr", 3, "p.mp4 is a clip, but these models make pictures"),
        ("few", "frechet --features judge", 3, "at least 4 files, found 3"),
        ("good", "psnrr", 2, "did you mean 'psnr'?"),
        ("good", "psnr,psnr", 2, "name each metric only once"),
        ("good", "fvd", 2, "i3d_pretrained_400.pt of wilson1yan/VideoGPT (50 MB)"),
        ("good", "fid,psnr", 2, "seppo-fast score --convert"),
        ("good", "frechet", 2, "add --features judge"),
        ("good", "psnr --features judge", 2, "only the metrics frechet and kernel"),
        ("good", "kernel --features juge", 2, "did you mean 'judge'?"),
        ("good", "kernel --features no.such:function", 2, "cannot be imported"),
        ("good", "kernel --features math:sqrt", 2, "the module math has no source in Python"),
    ],
)
def test_bad_input_ends_before_anything_is_generated(trained, prompts, tmp_path, capsys, kind, metrics, code, says):
    if kind != "none":
        write_bad_real(tmp_path / "real", kind)
    words = ["--real", tmp_path / "real", "--metrics", *metrics.split()]
    assert run(*scored(trained, prompts, tmp_path / "out", *words)) == code
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out" / "media").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--metrics", "psnr"], "--real FOLDER"),
        (["--features", "judge"], "--real FOLDER"),
        (["--real", "shapes"], "--metrics ssim,psnr"),
    ],
)
def test_options_that_belong_together(trained, prompts, tmp_path, capsys, words, says):
    assert run(*scored(trained, prompts, tmp_path / "out", *words)) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_prompts_that_are_no_captions_have_no_embedded_pictures(trained, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a red fox\n")
    assert run(*scored(trained, tmp_path / "p.txt", tmp_path / "out", "--real", "shapes", "--metrics", "psnr")) == 3
    assert "prompt 0 is no caption of the embedded world" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("raise ValueError('no such picture')", "failed (ValueError: no such picture)"),
        ("return pictures.mean((1, 2, 3))", "returned shape (16,) for 16 pictures"),
        ("return np.full((len(pictures), 2), np.nan)", "returned non-finite values for 32 of 32 numbers"),
        ("return None", "failed ("),
    ],
)
def test_features_that_fail_lose_only_themselves(trained, prompts, out, own, capsys, body, says):
    words = scored(trained, prompts, out, "--real", "shapes", "--features", own(body), "--metrics")
    assert run(*words, "frechet,psnr") == 0
    section = tree_of(out)["metrics"]
    assert list(section["values"]) == ["psnr"] and says in section["missing"]["frechet"]
    assert f"metric frechet: {section['missing']['frechet']}; it is left out" in capsys.readouterr().out
    assert says in (out / "scores.md").read_text()
    assert run(*words, "frechet") == 3
    assert "every metric failed" in capsys.readouterr().err


def test_a_failure_does_not_replace_what_another_process_has_measured(trained, prompts, out, monkeypatch):
    """This process fails after another one has finished the last array."""
    fill, files = measuring.fill, []

    def late(file, *arguments):
        fill(file, *arguments)
        files.append(file)
        if len(files) == 2:
            raise MetricError("no memory")

    monkeypatch.setattr(measuring, "fill", late)
    assert run(*scored(trained, prompts, out, "--real", "shapes", "--metrics", "psnr")) == 0
    section = tree_of(out)["metrics"]
    assert list(section["values"]) == ["psnr"] and section["missing"] == {} and len(files) == 2


def test_running_out_of_memory_ends_the_command_and_it_resumes(trained, prompts, out, own, capsys):
    words = scored(trained, prompts, out, "--real", "shapes", "--metrics", "kernel", "--features")
    assert run(*words, own("raise MemoryError")) == 4
    assert "rerun the same command to resume" in capsys.readouterr().err
    assert run(*words, "judge") == 0
