"""`seppo-fast score`: paired media, scores and tables; resumed and shared work gives the same bytes."""

import csv
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from seppo_fast.cli import main
from seppo_fast.commands import demo
from seppo_fast.commands import score as score_command
from seppo_fast.commands.export import export
from seppo_fast.commands.report import report
from seppo_fast.config.load import read_config
from seppo_fast.diffusion import protocols
from seppo_fast.evaluation.generate import PromptBatches
from seppo_fast.evaluation.judged import held_out_prompts, judged_model
from seppo_fast.evaluation.media.batch import halve_batch
from seppo_fast.evaluation.scores import read_scores
from seppo_fast.evaluation.statistics import paired_difference
from seppo_fast.scorers import registry
from seppo_fast.train import train
from tests.helpers.runs import tiny_config
from tests.helpers.tiny import tiny_pipeline

PROMPTS = ["a red fox", "a blue hare", "a red fox", "a green owl", "two cats | dogs", "snow", "rain"]
BRIGHTNESS = (
    f"brightness-{registry.load_scorer('brightness', torch.device('cpu'), torch.float32, None).version}-float32"
)


class Contrast:
    """A scorer of another kind than functions: lower scores are better, and prompts are truncated."""

    name, version, digest, higher_is_better, cut = "contrast", "2.1", "d1", False, 1

    def __call__(self, prompts, pictures):
        return pictures.reshape(len(pictures), -1).std(axis=1)


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """Two finished runs of the same base, with different seeds."""
    folder = tmp_path_factory.mktemp("runs")
    found = []
    for seed in (0, 1):
        config = tiny_config(
            tiny, folder, output=str(folder / f"run-{seed}"), seed=seed, save={"minutes": 0, "keep": 3}
        )
        train(config)
        found.append(Path(config.output))
    return found


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "p.json"
    file.write_text(json.dumps(PROMPTS))
    return file


@pytest.fixture
def scorer(tmp_path, monkeypatch):
    """Writes a scorer of the user's own, a function of `prompts` and `pictures`; returns its name."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(body):
        module = f"own_{tmp_path.name}"  # a module of this name is imported only once
        (tmp_path / f"{module}.py").write_text(f"import numpy as np\ndef score(prompts, pictures):\n    {body}\n")
        return f"{module}:score"

    return write


@pytest.fixture
def contrast(monkeypatch):
    """The name of a scorer that is a `Contrast`."""
    load = registry.load_scorer
    monkeypatch.setattr(registry, "missing_weights", lambda name, folder: None)
    monkeypatch.setattr(registry, "load_scorer", lambda name, *more: Contrast() if name == "own" else load(name, *more))
    return "own"


def scored(runs, prompts, output, *more, scorers="brightness"):
    """Returns the arguments of a command on runs with all options that the tests share."""
    return ["score", *runs, "--prompts", prompts, "--scorers", scorers, "--samples", 2, "--output", output, *more]


def run(*words):
    return main([str(word) for word in words])


def bytes_of(folder):
    """Returns the digest of every published file, by its path in the folder; hidden files are not published."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    shown = [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in shown}


def differs_only_in_media(folder, expected):
    """Returns whether a folder has all files of another, byte for byte, and beyond them at most pictures."""
    found, wanted = bytes_of(folder), bytes_of(expected)
    same = {name: found.get(name) for name in wanted} == wanted
    return same and all(name.startswith("media/") for name in found.keys() - wanted.keys())


@pytest.fixture(scope="module")
def straight(runs, tmp_path_factory):
    """The folder of a command that was not interrupted."""
    folder = tmp_path_factory.mktemp("straight")
    (folder / "p.json").write_text(json.dumps(PROMPTS))
    assert run(*scored(runs, folder / "p.json", folder / "out", "--batch", 3)) == 0
    return folder / "out"


def test_the_files_of_a_command(straight, runs):
    items = json.loads((straight / "items.json").read_text())
    assert list(items["models"]) == ["base", "run-0", "run-1"] and len(set(items["models"].values())) == 3
    assert len(items["items"]) == 2 * len(PROMPTS) and {item["seed"] for item in items["items"]} == {0}
    assert len({item["id"] for item in items["items"]}) == len(items["items"])
    for item in items["items"]:
        for name, file in item["files"].items():
            assert file.startswith(f"media/{items['models'][name]}/")
            with Image.open(straight / file) as picture:
                assert picture.format == "PNG" and picture.size == (16, 16)
    (lines,) = straight.glob("scores/*.jsonl")
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert lines.name == f"{BRIGHTNESS}.jsonl" and len(rows) == 3 * 2 * len(PROMPTS)
    for row in rows:
        content = (straight / row["file"]).read_bytes()
        assert row["sha256"] == hashlib.sha256(content).hexdigest()
        with Image.open(straight / row["file"]) as picture:
            assert row["score"] == pytest.approx(np.asarray(picture, dtype=np.float64).mean() / 255)
    table = list(csv.DictReader((straight / "scores.csv").open(newline="")))
    assert len(table) == len(rows) and table[0].keys() == {"id", "prompt", "sample", "model", BRIGHTNESS}
    by_file = {row["file"]: row["score"] for row in rows}
    wanted = [by_file[item["files"][name]] for item in items["items"] for name in items["models"]]
    assert [float(row[BRIGHTNESS]) for row in table] == wanted
    with Image.open(straight / "grid.png") as grid:
        assert grid.width == 260 + 3 * 128


def test_the_statistics_are_over_distinct_prompts(straight):
    tree = json.loads((straight / "scores.json").read_text())
    table = list(csv.DictReader((straight / "scores.csv").open(newline="")))
    assert tree["schema"] == 2 and tree["prompts"]["count"] == len(PROMPTS)
    by_model = {}
    for row in table:
        by_model.setdefault(row["model"], {}).setdefault(row["prompt"], []).append(float(row[BRIGHTNESS]))
    assert len(by_model["base"]["a red fox"]) == 4  # two records, two samples each
    means = {name: np.array([np.mean(found[text]) for text in sorted(found)]) for name, found in by_model.items()}
    (scorer,) = tree["scorers"].values()
    for name in ("run-0", "run-1"):
        found = scorer["runs"][name]
        paired = paired_difference(means["base"], means[name])
        assert found["difference"] == pytest.approx(paired.difference) and found["low"] == pytest.approx(paired.low)
        assert found["items"] == len(set(PROMPTS)) == found["wins"] + found["ties"] + found["losses"]
        change = means[name] - means["base"]
        listed = found["largest_gains"] + found["largest_losses"]
        assert sorted(row["difference"] for row in listed) == pytest.approx(sorted(change[change != 0]))
        assert found["p"] == found["p_holm"] and 0 < found["p"] <= 1
        assert found["bootstrap_low"] < found["difference"] < found["bootstrap_high"]
    assert scorer["means"]["base"] == pytest.approx(np.mean([float(r[BRIGHTNESS]) for r in table[::3]]))


def test_the_table_has_a_column_per_published_scorer_and_its_notes_in_the_caption(straight):
    text = (straight / "scores.md").read_text()
    published = ("pickscore", "hpsv2.0", "hpsv2.1", "imagereward", "aesthetic")
    labels = {name: registry.SCORERS[name].label if name in registry.SCORERS else name for name in published}
    assert text.splitlines()[0] == f"|  | {' | '.join(labels.values())} | {registry.SCORERS['brightness'].label} |"
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in rows[1:5]] == ["| ---", "| base", "| run-0", "| run-1"]
    assert all(f"{label}: no scores (not requested" in text for label in labels.values())
    assert "14 files per model: 7 prompts of p.json (6 distinct), 2 per prompt, seed 0" in text
    assert "ddim, 2 steps, guidance 3, 16 pixels, fp32 on cpu" in text
    assert "**run-1 against base**, per distinct prompt" in text


@pytest.mark.parametrize("fault", ["media-write@1", "media-write@23", "score-write@3", "statistics-write@1"])
def test_a_killed_command_is_resumed_with_the_same_bytes(forks, runs, prompts, straight, tmp_path, fault):
    words = scored(runs, prompts, tmp_path / "out", "--batch", 3)
    assert forks.run(*words, fault=f"{fault}=kill").code == -9
    ended = forks.run(*words)
    assert ended.code == 0, ended.err
    assert bytes_of(tmp_path / "out") == bytes_of(straight)
    assert list((tmp_path / "out").rglob(".tmp-*")) == []


def test_two_processes_share_the_work_and_give_the_same_bytes(ranks, runs, prompts, straight, tmp_path):
    words = scored(runs, prompts, tmp_path / "out", "--batch", 3)
    ended = ranks.run(2, *words)
    assert [one.code for one in ended] == [0, 0], ended
    assert bytes_of(tmp_path / "out") == bytes_of(straight)
    assert "tables:" in ended[0].out and "tables:" not in ended[1].out


def test_one_process_finishes_what_a_killed_one_began(ranks, runs, prompts, straight, tmp_path):
    words = scored(runs, prompts, tmp_path / "out", "--batch", 3)
    killed, other = ranks.run(2, *words, faults={0: "media-write@2=kill"})
    assert (killed.code, other.code) == (-9, 0)
    assert run(*scored(runs, prompts, tmp_path / "out", "--batch", 3)) == 0
    assert bytes_of(tmp_path / "out") == bytes_of(straight)


def test_the_phases_one_by_one(runs, prompts, straight, tmp_path, capsys):
    words = scored(runs, prompts, tmp_path / "out", "--batch", 3)
    assert run(*words, "--only", "statistics") == 2
    assert "generate first" in capsys.readouterr().err
    for phase in ("generate", "score", "statistics"):
        assert run(*words, "--only", phase) == 0
    assert bytes_of(tmp_path / "out") == bytes_of(straight)
    for name in ("scores.json", "scores.md", "scores.csv", "grid.png"):
        (tmp_path / "out" / name).unlink()
    assert run("score", "--only", "statistics", "--output", tmp_path / "out") == 0  # needs neither runs nor prompts
    assert bytes_of(tmp_path / "out") == bytes_of(straight)


def test_a_damaged_or_missing_file_is_made_again_and_scored_again(runs, prompts, straight, tmp_path, capsys):
    shutil.copytree(straight, tmp_path / "out")
    words = scored(runs, prompts, tmp_path / "out", "--batch", 3)
    files = sorted((tmp_path / "out").glob("media/*/*.png"))
    files[3].write_bytes(files[3].read_bytes()[:50])
    files[20].unlink()
    assert run(*words, "--only", "score") == 2
    assert "generate it again" in capsys.readouterr().err
    files[20].write_bytes(b"")
    assert run(*words, "--only", "score") == 3
    assert "not an intact picture" in capsys.readouterr().err
    assert run(*words) == 0
    assert bytes_of(tmp_path / "out") == bytes_of(straight)


def test_more_samples_or_runs_keep_the_media_that_exist(runs, prompts, straight, tmp_path):
    assert run("score", runs[0], "--prompts", prompts, "--scorers", "brightness", "--output", tmp_path / "out") == 0
    few, many = (
        json.loads((tmp_path / "out" / "items.json").read_text()),
        json.loads((straight / "items.json").read_text()),
    )
    assert few["items"][0]["files"]["base"].split("/")[2] == many["items"][0]["files"]["base"].split("/")[2]
    before = bytes_of(tmp_path / "out")
    assert run("score", *runs, "--prompts", prompts, "--scorers", "brightness", "--output", tmp_path / "out") == 0
    after = bytes_of(tmp_path / "out")
    assert {name: after[name] for name in before if name.startswith("media")} == {
        name: value for name, value in before.items() if name.startswith("media")
    }
    assert sum(name.startswith("media") for name in after) == 3 * len(PROMPTS)


def test_other_weights_make_another_media_folder(runs, prompts, tmp_path):
    words = ["score", runs[0], "--prompts", prompts, "--scorers", "brightness", "--output", tmp_path / "out"]
    models = []
    for update in ("2", "3"):
        assert run(*words, "--update", update) == 0
        tree = json.loads((tmp_path / "out" / "scores.json").read_text())
        models.append({name: row["digest"] for name, row in tree["models"].items()})
        assert tree["models"]["run-0"]["update"] == int(update)
    assert models[0]["base"] == models[1]["base"] and models[0]["run-0"] != models[1]["run-0"]
    assert len(list((tmp_path / "out" / "media").iterdir())) == 3


def test_an_update_without_a_state_is_named(runs, prompts, tmp_path, capsys):
    assert run(*scored(runs, prompts, tmp_path / "out", "--update", 9)) == 2
    assert "--update 9" in (said := capsys.readouterr().err) and "saved: 3, 2, 1" in said


@pytest.mark.parametrize(
    ("more", "field"),
    [
        (["--seed", "5"], "seed = 0, not 5"),
        (["--guidance", "2"], "protocol.sampler.guidance = 3.0, not 2.0"),
        (["--samples", "1"], "samples = 2, not 1"),
        (["--batch", "4"], "protocol.sampler.batch = 3, not 4"),
    ],
)
def test_a_folder_with_media_of_other_settings_is_refused(runs, prompts, straight, tmp_path, capsys, more, field):
    shutil.copytree(straight, tmp_path / "out")
    assert run(*scored(runs, prompts, tmp_path / "out", "--batch", 3, *more)) == 2
    assert f"its media were made with {field}; choose another --output" in capsys.readouterr().err
    assert bytes_of(tmp_path / "out") == bytes_of(straight)


def test_media_of_other_prompts_are_refused(runs, prompts, straight, tmp_path, capsys):
    shutil.copytree(straight, tmp_path / "out")
    prompts.write_text(json.dumps(PROMPTS[:-1]))
    assert run(*scored(runs, prompts, tmp_path / "out", "--batch", 3)) == 2
    assert "its media were made with prompts." in capsys.readouterr().err
    assert run(*scored(runs, prompts, tmp_path / "out", "--only", "score")) == 2
    assert "holds media of other prompts" in capsys.readouterr().err


@pytest.fixture
def device_of(monkeypatch):
    """Returns a function that lets larger batches than a number of prompts run out of memory, and counts the calls."""
    generate, sizes = PromptBatches.generate, []

    def limited(largest):
        def small_device(self, places, sample=0):
            sizes.append(len(places))
            if len(places) > largest:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return generate(self, places, sample)

        monkeypatch.setattr(PromptBatches, "generate", small_device)
        return sizes

    return limited


def test_a_batch_that_does_not_fit_is_halved_for_all_models(runs, prompts, tmp_path, device_of, capsys):
    assert run(*scored(runs, prompts, tmp_path / "small", "--batch", 1)) == 0
    sizes = device_of(1)
    capsys.readouterr()
    assert run(*scored(runs, prompts, tmp_path / "out")) == 0  # the runs' sampler.batch is 4
    said = [line for line in capsys.readouterr().out.splitlines() if "out of memory" in line]
    assert [line.partition("; ")[2] for line in said] == [
        "starting over with batches of 2 instead of 4",
        "starting over with batches of 1 instead of 2",
    ]
    assert sizes[:2] == [4, 2] and set(sizes[2:]) == {1}
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "small")
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings["protocol"]["sampler"]["batch"] == 1 and settings["command"].endswith("--batch 1")


def test_the_folders_batch_is_kept_and_a_given_one_is_not_changed(runs, prompts, straight, tmp_path, device_of, capsys):
    shutil.copytree(straight, tmp_path / "out")
    sizes = device_of(2)
    assert run(*scored(runs, prompts, tmp_path / "out")) == 0  # as if with --batch 3: nothing is left to generate
    assert sizes == [] and bytes_of(tmp_path / "out") == bytes_of(straight)
    capsys.readouterr()
    assert run(*scored(runs, prompts, tmp_path / "new", "--batch", 3)) == 4
    assert "out of memory while generating; set --batch below 3" in capsys.readouterr().err and sizes == [3]


def test_media_that_exist_are_not_made_useless_by_a_smaller_batch(runs, prompts, straight, tmp_path, device_of, capsys):
    shutil.copytree(straight, tmp_path / "out")
    next((tmp_path / "out").glob("media/*/*.png")).unlink()
    before = bytes_of(tmp_path / "out")
    device_of(2)
    assert run(*scored(runs, prompts, tmp_path / "out")) == 4
    said = capsys.readouterr().err
    assert "has media in batches of 3" in said and "choose another --output with --batch 1" in said
    assert bytes_of(tmp_path / "out") == before


def test_a_single_sample_that_does_not_fit_ends_the_command(runs, prompts, tmp_path, device_of, capsys):
    sizes = device_of(0)
    assert run(*scored(runs, prompts, tmp_path / "out")) == 4
    assert "out of memory while generating one sample at a time" in capsys.readouterr().err and sizes == [4, 2, 1]
    assert run(*scored(runs, prompts, tmp_path / "one", "--batch", 1)) == 4
    assert "one sample at a time" in capsys.readouterr().err


@pytest.mark.parametrize("when", [1, 12])
def test_a_batch_that_another_process_halves_is_followed(runs, prompts, tmp_path, monkeypatch, when):
    """The other process is one that records a smaller batch while this one generates its first or its last batch."""
    assert run(*scored(runs, prompts, tmp_path / "small", "--batch", 2)) == 0
    generate, sizes = PromptBatches.generate, []

    def meanwhile(self, places, sample=0):
        sizes.append(len(places))
        if len(sizes) == when:
            file = tmp_path / "out" / "settings.json"
            halve_batch(tmp_path / "out", json.loads(file.read_text()), [])
        return generate(self, places, sample)

    monkeypatch.setattr(PromptBatches, "generate", meanwhile)
    assert run(*scored(runs, prompts, tmp_path / "out")) == 0
    assert sizes[:when] == [4, 3] * (when // 2) + [4] * (when % 2) and max(sizes[when:]) == 2
    assert differs_only_in_media(tmp_path / "out", tmp_path / "small")


def test_a_batch_that_is_halved_while_a_command_starts_is_followed(runs, prompts, tmp_path, monkeypatch):
    """Another process records a batch and halves it after this one has chosen its batch."""
    assert run(*scored(runs, prompts, tmp_path / "small", "--batch", 2, "--only", "generate")) == 0
    subjects_of, batches = score_command.subjects_of, []

    def slow(*arguments):
        found = subjects_of(*arguments)
        batches.append(found[0].config.sampler.batch)
        if len(batches) == 1:
            settings = json.loads((tmp_path / "small" / "settings.json").read_text())
            del settings["models"]
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "settings.json").write_text(json.dumps(settings))
        return found

    monkeypatch.setattr(score_command, "subjects_of", slow)
    assert run(*scored(runs, prompts, tmp_path / "out", "--only", "generate")) == 0
    assert batches == [4, 2] and bytes_of(tmp_path / "out") == bytes_of(tmp_path / "small")


def test_a_command_that_is_killed_after_halving_its_batch_keeps_that_batch(forks, runs, prompts, tmp_path):
    assert run(*scored(runs, prompts, tmp_path / "small", "--batch", 2)) == 0
    words = scored(runs, prompts, tmp_path / "out")
    ended = forks.run(*words, fault="generating@1=memory,media-write@3=kill")
    assert ended.code == -9
    ended = forks.run(*words)
    assert ended.code == 0, ended.err
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "small")


def test_two_processes_agree_on_a_batch_if_one_runs_out_of_memory(ranks, runs, prompts, tmp_path):
    """It halves the batch for both, or it ends because the other one has media by then: either way the files agree."""
    words = scored(runs, prompts, tmp_path / "out")
    first, second = ranks.run(2, *words, faults={0: "generating@1=memory"})
    assert (first.code, second.code) in ((0, 0), (4, 0)), (first, second)
    assert run(*words) == 0
    batch = 2 if first.code == 0 else 4
    assert run(*scored(runs, prompts, tmp_path / "other", "--batch", batch)) == 0
    assert differs_only_in_media(tmp_path / "out", tmp_path / "other")


@pytest.mark.parametrize("other", ["base", "steps", "resolution"])
def test_runs_that_cannot_be_compared_are_refused_with_the_field(tiny, runs, prompts, tmp_path, capsys, other):
    sections = {"steps": {"sampler": {"steps": 3}}, "resolution": {"data": {"resolution": 32}}}.get(other, {})
    base = tiny_pipeline(tmp_path / "pipeline", seed=5) if other == "base" else tiny
    train(tiny_config(base, tmp_path, train={"updates": 1}, **sections))
    assert run(*scored([runs[0], tmp_path / "run"], prompts, tmp_path / "out")) == 2
    names = {"base": "the base model's fingerprint", "steps": "sampler.steps: 2 and 3"}
    said = capsys.readouterr().err
    assert f"run-0 and run differ in {names.get(other, 'data.resolution: 16 and 32')}" in said
    assert not (tmp_path / "out").exists()


def test_a_scorer_that_fails_loses_only_itself(runs, prompts, scorer, tmp_path, capsys):
    fails = scorer("raise ValueError('no such picture')")
    words = scored(runs[:1], prompts, tmp_path / "out", scorers=f"brightness,{fails},shapes")
    assert run(*words) == 0
    tree = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert list(tree["scorers"]) == [BRIGHTNESS]
    assert "no such picture" in tree["missing"][fails] and "must be uint8" in tree["missing"]["shapes"]
    said = capsys.readouterr().out
    assert f"scorer {fails}: failed (ValueError: no such picture); it is left out" in said
    assert "no such picture" in (tmp_path / "out" / "scores.md").read_text()
    assert run(*scored(runs[:1], prompts, tmp_path / "out", scorers=fails)) == 3
    assert "every scorer failed" in capsys.readouterr().err


def test_a_scorer_that_runs_out_of_memory_scores_fewer_files_at_once(
    runs, prompts, contrast, monkeypatch, tmp_path, capsys
):
    assert run(*scored(runs, prompts, tmp_path / "all", scorers=contrast)) == 0
    score, sizes, largest = Contrast.__call__, [], 2

    def small_device(self, prompts, pictures):
        sizes.append(len(prompts))
        if len(prompts) > largest:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return score(self, prompts, pictures)

    monkeypatch.setattr(Contrast, "__call__", small_device)
    capsys.readouterr()
    words = scored(runs, prompts, tmp_path / "out", scorers=contrast)
    assert run(*words) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "out of memory" in line]
    assert said == ["scorer own: out of memory with 7 files at once; continuing with fewer"]
    # Seven files per chunk: 7, then 3, are tried once; afterwards nothing larger than 1, the half of 3, is.
    assert sizes == [7, 3] + [1] * 7 * 6
    tables = [tmp_path / name / "scores.csv" for name in ("all", "out")]
    assert tables[0].read_bytes() == tables[1].read_bytes()
    counts = [json.loads((tmp_path / name / "scores.json").read_text())["scorers"] for name in ("all", "out")]
    assert counts[0].keys() == counts[1].keys() and counts[1]["contrast-2.1-float32"]["cut"] == 7
    largest = 0
    monkeypatch.setattr(Contrast, "digest", "d2")
    assert run(*words) == 3
    assert "own: does not fit into memory, even with one file (OutOfMemoryError: CUDA" in capsys.readouterr().err


def test_scores_of_other_weights_of_a_scorer_are_not_reused(runs, prompts, contrast, monkeypatch, tmp_path):
    means = []
    for digest, value in (("d1", 0.5), ("d2", 0.25), ("d2", 0.125)):
        monkeypatch.setattr(Contrast, "digest", digest)
        monkeypatch.setattr(Contrast, "__call__", lambda self, prompts, pictures, value=value: [value] * len(prompts))
        assert run(*scored(runs[:1], prompts, tmp_path / "out", scorers=contrast)) == 0
        (row,) = json.loads((tmp_path / "out" / "scores.json").read_text())["scorers"].values()
        assert row["digest"] == digest and row["cut"] == 1
        means.append(row["means"]["base"])
    assert means == [0.5, 0.25, 0.25]  # the third command found the second's scores


def test_scores_of_another_version_replace_the_older_column(runs, prompts, contrast, monkeypatch, tmp_path):
    for version in ("2.1", "2.2"):
        monkeypatch.setattr(Contrast, "version", version)
        assert run(*scored(runs[:1], prompts, tmp_path / "out", scorers=contrast)) == 0
        tree = json.loads((tmp_path / "out" / "scores.json").read_text())
        assert list(tree["scorers"]) == [f"contrast-{version}-float32"]


@pytest.mark.parametrize("result", [np.zeros((2, 2)), np.zeros(1), "words", None])
def test_a_scorer_that_returns_anything_but_scores_has_failed(runs, prompts, contrast, monkeypatch, tmp_path, result):
    monkeypatch.setattr(Contrast, "__call__", lambda self, prompts, pictures: result)
    assert run(*scored(runs[:1], prompts, tmp_path / "out", scorers=f"{contrast},brightness")) == 0
    tree = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert list(tree["scorers"]) == [BRIGHTNESS] and contrast in tree["missing"]


def test_ties_and_missing_scores(runs, prompts, scorer, tmp_path):
    body = "return np.array([np.nan if prompt == 'snow' else len(prompt) for prompt in prompts])"
    assert run(*scored(runs[:1], prompts, tmp_path / "out", scorers=scorer(body))) == 0
    (row,) = json.loads((tmp_path / "out" / "scores.json").read_text())["scorers"].values()
    found = row["runs"]["run-0"]
    assert (found["wins"], found["ties"], found["losses"], found["items"], found["left_out"]) == (0, 5, 0, 5, 1)
    assert (found["win_rate"], found["win_low"], found["p"], found["difference"]) == (0.5, 0.0, 1.0, 0.0)
    assert found["largest_gains"] == found["largest_losses"] == []
    empty = [line for line in (tmp_path / "out" / "scores.csv").read_text().splitlines() if line.endswith(",")]
    assert len(empty) == 4 and all("snow" in line for line in empty)
    assert "(5 prompts, 1 without a score)" in (tmp_path / "out" / "scores.md").read_text()


def test_a_lower_score_wins_where_lower_is_better(runs, prompts, contrast, tmp_path):
    assert run(*scored(runs[:1], prompts, tmp_path / "out", scorers=contrast)) == 0
    (row,) = json.loads((tmp_path / "out" / "scores.json").read_text())["scorers"].values()
    found = row["runs"]["run-0"]
    sums = {}
    for line in csv.DictReader((tmp_path / "out" / "scores.csv").open(newline="")):
        sign = 1 if line["model"] == "run-0" else -1
        sums[line["prompt"]] = sums.get(line["prompt"], 0.0) + sign * float(line["contrast-2.1-float32"])
    assert found["wins"] == sum(total < 0 for total in sums.values())
    assert found["losses"] == sum(total > 0 for total in sums.values())
    assert {row["prompt"] for row in found["largest_gains"]} == {text for text, total in sums.items() if total < 0}
    text = (tmp_path / "out" / "scores.md").read_text()
    assert "own (lower is better)" in text and "1 prompts truncated" in text


def test_one_prompt_has_a_difference_and_no_interval(runs, tmp_path):
    (tmp_path / "p.txt").write_text("a red fox\n")
    assert (
        run("score", runs[0], "--prompts", tmp_path / "p.txt", "--scorers", "brightness", "--output", tmp_path / "o")
        == 0
    )
    (row,) = json.loads((tmp_path / "o" / "scores.json").read_text())["scorers"].values()
    found = row["runs"]["run-0"]
    assert found["difference"] == pytest.approx(row["means"]["run-0"] - row["means"]["base"])
    assert (found["low"], found["bootstrap_low"], found["items"], found["p"]) == (None, None, 1, 1.0)
    assert read_scores_in(tmp_path / "o", runs[0]) is None


def read_scores_in(folder, run_folder):
    """Reads scores as if a command had written them into a run's folder."""
    place = folder / run_folder.name
    shutil.copytree(folder, place / "score", ignore=shutil.ignore_patterns(run_folder.name))
    return read_scores(place)


def test_report_and_model_card_quote_the_scores(runs, prompts, tmp_path):
    copy = tmp_path / "run-0"
    shutil.copytree(runs[0], copy)
    assert run("score", copy, "--prompts", prompts, "--scorers", "brightness") == 0
    scores = read_scores(copy)
    tree = json.loads((copy / "score" / "scores.json").read_text())
    found = tree["scorers"][BRIGHTNESS]["runs"]["run-0"]
    assert scores.paired[BRIGHTNESS].low == found["low"] and scores.update == 3 and not scores.average
    quoted = f"{BRIGHTNESS} {found['base']:.3f} -> {found['other']:.3f}, difference"
    assert quoted in str(scores) and quoted.replace(">", "&gt;") in report(copy).read_text()
    card = (export(copy) / "README.md").read_text()
    assert f"Scores: {scores}." in card and "other weights" not in card
    (copy / "score" / "scores.json").write_text(json.dumps(tree | {"schema": 3}))
    assert run("report", copy) == 2


def test_the_demos_figures_to_the_digit(tmp_path, monkeypatch):
    prompts = held_out_prompts(5, 9, ())
    monkeypatch.setattr(demo, "prompt_sets", lambda source: (prompts[:2], [*prompts, prompts[0]]))
    config = read_config("demo.yaml")
    changes = {
        "output": str(tmp_path / "run"),
        "data": config.data.model_copy(update={"source": "shapes:8:11", "cache": str(tmp_path / "cache")}),
        "train": config.train.model_copy(update={"updates": 2, "pairs_per_update": 8, "learning_rate": 1e-3}),
        "reference": config.reference.model_copy(update={"uses": 1}),
        "sampler": config.sampler.model_copy(update={"steps": 3, "batch": 4}),
    }
    config = config.model_copy(update=changes)
    demo.demo(config)
    folder = tmp_path / "run"
    words = ["--prompts", folder / "prompts.json", "--scorers", "shapes,brightness", "--seed", 2002, "--guidance", 3]
    assert run("score", folder, *words) == 0
    result = json.loads((folder / "result.json").read_text())["comparisons"][0]
    tree = json.loads((folder / "score" / "scores.json").read_text())
    found = tree["scorers"]["shapes-1-float32"]["runs"]["run"]
    assert result["guidance"] == 3 and result["items"] == 9
    for name in ("base", "other", "difference", "low", "high", "items", "left_out"):
        assert found[name] == result[name], name
    items = json.loads((folder / "score" / "items.json").read_text())["items"]
    for name, weights in {"base": None, "run": folder / "weights"}.items():
        pictures, _ = judged_model(config, [*prompts, prompts[0]], demo.REPORT, weights, guidance=3)
        for item, picture in zip(items, pictures, strict=True):
            with Image.open(folder / "score" / item["files"][name]) as made:
                assert np.array_equal(np.asarray(made), picture)
    assert set(tree["spearman"]["run"]) == {f"shapes-1-float32 | {BRIGHTNESS}"}


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--prompts", "none.txt"], 2, "does not exist"),
        (["--prompts", "empty.txt"], 3, "holds no prompt"),
        (["--prompts", "p.json", "--scorers", "brightnes"], 2, "did you mean 'brightness'?"),
        (["--prompts", "p.json", "--scorers", "brightness,brightness"], 2, "each only once"),
        (["--prompts", "p.json", "--scorers", "no.such:scorer"], 2, "no.such"),
        (["--prompts", "p.json", "--samples", "0"], 2, "--samples 0: must be at least 1"),
        (["--prompts", "p.json", "--seed", "-1"], 2, "--seed -1"),
        (["--prompts", "p.json", "--guidance", "nan"], 2, "--guidance nan"),
        (["--prompts", "p.json", "--batch", "0"], 2, "--batch 0"),
        (["--prompts", "p.json", "--protocol", "papr"], 2, "did you mean 'paper'?"),
        ([], 2, "--prompts FILE"),
    ],
)
def test_what_is_typed_in_wrongly_ends_before_anything_is_generated(
    runs, prompts, tmp_path, monkeypatch, capsys, words, code, says
):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n")
    known = [] if "--scorers" in words else ["--scorers", "brightness"]
    assert run("score", runs[0], *words, *known, "--output", tmp_path / "out") == code
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_a_run_or_with_another_folder(prompts, tmp_path, capsys):
    assert run("score", "--prompts", prompts, "--scorers", "brightness") == 2
    assert "at least one RUN" in capsys.readouterr().err
    assert run("score", tmp_path, "--prompts", prompts, "--scorers", "brightness") == 2
    assert "not the folder of a run with a saved state" in capsys.readouterr().err


def test_missing_weights_end_the_command_before_anything_is_generated(runs, prompts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(registry, "missing_weights", lambda name, folder: f"{name}: get 2 GB" if folder else None)
    words = scored(runs, prompts, tmp_path / "out", "--weights", tmp_path, scorers="brightness,shapes")
    assert run(*words) == 2
    assert "files are missing\n  brightness: get 2 GB\n  shapes: get 2 GB\n" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_disk_that_is_too_small_is_refused_before_anything_is_generated(runs, prompts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    assert run(*scored(runs, prompts, tmp_path / "out")) == 6
    assert "the media need about" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_media_of_other_models_are_no_space_that_exists(runs, prompts, straight, tmp_path, monkeypatch, capsys):
    out = shutil.copytree(straight, tmp_path / "out")
    models = json.loads((out / "settings.json").read_text())["models"]
    for name in set(models) - {"base"}:
        (out / "media" / models[name]["digest"] / "large.png").write_bytes(bytes(10**7))
    other = shutil.copytree(runs[0], tmp_path / "other")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    assert run(*scored(runs, prompts, out, "--batch", 3, "--only", "generate")) == 0  # its own files exist
    assert run(*scored([other], prompts, out, "--batch", 3, "--only", "generate")) == 6
    assert "the media need about" in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["media-write@4", "score-write@2", "statistics-write@1"])
def test_a_full_disk_ends_the_command_and_it_resumes(forks, runs, prompts, straight, tmp_path, fault):
    words = scored(runs, prompts, tmp_path / "out", "--batch", 3)
    ended = forks.run(*words, fault=f"{fault}=full")
    assert ended.code == 6 and "no space left" in ended.err
    assert forks.run(*words).code == 0
    assert bytes_of(tmp_path / "out") == bytes_of(straight)


def test_clips_are_lossless_and_scored(tiny, adapter, tmp_path, prompts):
    config = tiny_config(
        tiny, tmp_path, model={"motion_adapter": str(adapter), "train": "lora"}, train={"updates": 1},
        data={"source": "shapes-motion:6:3", "frames": 4},
    )  # fmt: skip
    train(config)
    assert run(*scored([tmp_path / "run"], prompts, tmp_path / "out")) == 0
    files = list((tmp_path / "out").glob("media/*/*.webp"))
    assert len(files) == 2 * 2 * len(PROMPTS)
    (row,) = json.loads((tmp_path / "out" / "scores.json").read_text())["scorers"].values()
    assert row["runs"]["run"]["items"] == len(set(PROMPTS))


@pytest.mark.parametrize("protocol", ["paper", "sdpo", "spo"])
def test_protocols_sample_with_their_own_solvers(runs, tmp_path, protocol, monkeypatch):
    known = protocols.PROTOCOLS[protocol]
    small = protocols.SamplingProtocol(known.source, {**known.sampler, "steps": 3}, known.resolution and 24, "fp32")
    monkeypatch.setitem(protocols.PROTOCOLS, protocol, small)
    (tmp_path / "p.txt").write_text("a red fox\n")
    words = ["--scorers", "brightness", "--protocol", protocol, "--output", tmp_path / "out"]
    assert run("score", runs[0], "--prompts", tmp_path / "p.txt", *words) == 0
    tree = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert tree["protocol"]["sampler"]["name"] == {"paper": "pndm", "sdpo": "euler", "spo": "ddim"}[protocol]
    assert tree["protocol"]["resolution"] == (24 if protocol == "paper" else 16)


def test_a_pickle_is_converted_without_a_run(tmp_path):
    pytest.importorskip("seppo_fast.scorers.convert")
    torch.save({"state_dict": {"a": torch.arange(3.0)}}, tmp_path / "w.pt")
    assert run("score", "--convert", tmp_path / "w.pt") == 0
    assert load_file(tmp_path / "w.safetensors")["a"].tolist() == [0, 1, 2]
