"""The command line as a user types it: what works, and the message and exit code of each mistake."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from seppo_fast.cli import main
from seppo_fast.config.load import read_config, to_yaml
from tests.helpers.runs import tiny_config

ROOT = Path(__file__).parents[2]


def run(*arguments, cwd, module="seppo_fast.cli"):
    """Runs the real command in a separate process; returns its exit code and output."""
    words = [sys.executable, "-c", f"import sys; from {module} import main; sys.exit(main())", *map(str, arguments)]
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


@pytest.fixture
def forked(forks):
    """Runs commands in processes forked from one that has imported everything."""
    return forks.run


@pytest.fixture
def config(tiny, tmp_path):
    """A configuration file of a run with two updates that writes everything below `tmp_path`."""
    made = tiny_config(tiny, tmp_path, train={"updates": 2})
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(made))
    return file


def pictures(folder, count=3):
    folder.mkdir()
    for index in range(count):
        Image.new("RGB", (40, 30), (index * 60, 90, 200)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"picture {index}")
    return folder


def left_behind(folder):
    """Returns what a failed run must not leave behind: its folder, and half-written files."""
    return [str(path) for path in folder.rglob("*") if path.name == "run" or path.name.startswith(".tmp")]


def test_train_prints_one_line_an_update_and_nothing_else(config, tmp_path):
    done = run("train", config, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    start, warning, *updates, end = done.stdout.splitlines()
    assert [line.split("  ")[0] for line in updates] == ["update 1/2", "update 2/2"]
    assert "(ref " in updates[0] and "reject 1.00" in updates[0] and "pairs/s" in updates[0]
    assert start.startswith("shapes:11:3") and end.startswith("weights: ")
    # Each letter is a token.
    assert warning.startswith("10 of 10 prompts have more tokens than the text encoder accepts")
    entries = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [entry["update"] for entry in entries] == [1, 2]
    given, stored = (read_config(file).model_dump() for file in (config, tmp_path / "run" / "config.yaml"))
    given["model"] |= {"attention": "sdpa", "compile": False, "gradient_checkpointing": False}  # were null
    given["reference"] |= {"park": False}
    assert stored == given


def test_python_m_is_the_same_program(config, tmp_path):
    command = [sys.executable, "-m", "seppo_fast.train", str(config), "--train.updates", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "update 1/1" in done.stdout


def test_a_folder_of_pictures_trains(forked, config, tmp_path):
    folder = pictures(tmp_path / "pictures")
    done = forked("train", config, "--data.source", folder)
    assert done.code == 0, done.err
    assert "update 2/2" in done.out


def test_check_prints_config_scan_and_estimate(forked, config, tmp_path):
    folder = pictures(tmp_path / "pictures")
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:60])
    done = forked("check", config, "--data.source", folder, "--train.beta", "17")
    assert done.code == 3
    assert "beta: 17.0" in done.out and "1.png" in done.out
    assert "data: 3 examples, 1 bad" in done.out and "device memory" in done.out
    assert not left_behind(tmp_path)
    (folder / "1.png").unlink()
    (folder / "1.txt").unlink()
    done = forked("check", config, "--data.source", folder)
    assert done.code == 0, done.err
    assert "data: 2 examples, 0 bad" in done.out


def missing_image(folder):
    (folder / "2.png").unlink()
    return folder


def unreadable_image(folder):
    (folder / "2.png").write_bytes(b"not a picture")
    return folder


def no_caption(folder):
    (folder / "2.txt").unlink()
    return folder


def empty_folder(folder):
    shutil.rmtree(folder)
    folder.mkdir()
    return folder


def metadata_names_a_missing_file(folder):
    (folder / "metadata.jsonl").write_text('{"file_name": "nowhere.png", "text": "a fox"}\n')
    return folder


@pytest.mark.parametrize(
    ("damage", "names"),
    [
        (missing_image, "2.txt"),
        (unreadable_image, "2.png"),
        (no_caption, "2.png"),
        (empty_folder, "no images"),
        (metadata_names_a_missing_file, "nowhere.png"),
        (lambda folder: folder / "nowhere", "nowhere"),
    ],
    ids=["missing image", "unreadable image", "no caption", "empty", "metadata", "no folder"],
)
def test_bad_data_exits_3_and_names_it(forked, config, tmp_path, damage, names):
    source = damage(pictures(tmp_path / "pictures"))
    done = forked("train", config, "--data.source", source)
    assert done.code == 3, done.out + done.err
    assert names in done.err and "Traceback" not in done.err
    assert not left_behind(tmp_path)
    cache = tmp_path / "cache"
    assert not cache.exists() or not any(cache.iterdir())


def pickled_unet(folder, tiny):
    pipeline = shutil.copytree(tiny, folder / "pickled")
    (pipeline / "unet" / "diffusion_pytorch_model.safetensors").rename(
        pipeline / "unet" / "diffusion_pytorch_model.bin"
    )
    return pipeline


def single_file(folder, tiny):
    (folder / "model.ckpt").write_bytes(b"pickle")
    return folder / "model.ckpt"


def damaged_weights(folder, tiny):
    pipeline = shutil.copytree(tiny, folder / "damaged")
    weights = pipeline / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    return pipeline


def no_pipeline(folder, tiny):
    return pictures(folder / "no-pipeline")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (pickled_unet, "diffusion_pytorch_model.bin"),
        (single_file, "single file"),
        (damaged_weights, "could not be loaded"),
        (no_pipeline, "model_index.json"),
        (lambda folder, tiny: folder / "nowhere", "does not exist"),
        (lambda folder, tiny: "nobody/no-such-model", "nobody/no-such-model"),
    ],
    ids=["bin weights", "ckpt file", "damaged", "not a pipeline", "no folder", "unknown hub id"],
)
def test_bad_models_exit_2_and_say_why(forked, config, tmp_path, tiny, make, says):
    done = forked("train", config, "--model.path", make(tmp_path, tiny))
    assert done.code == 2, done.out + done.err
    assert says in done.err and "Traceback" not in done.err
    assert not left_behind(tmp_path)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--train.learning-rat", "1"], "--train.learning-rate"),
        (["--train.beta", "much"], "much"),
        (["--train.beta", "-5"], "greater than 0"),
        (["--objective", "sepo"], "did you mean 'seppo'"),
        (["--data.resolution", "18"], "multiple of"),
        (["--data.source", ""], "data.source is empty"),
        (["--objective", "diffusion-dpo"], "two images per prompt"),
        (["--train.backend", "triton"], "needs a GPU"),
        (["--train.optimizer", "adamw8bit"], "pip install 'seppo_fast[8bit]'"),
        (["--reference.errors", "together"], "seppo-fast: reference.errors = together needs model.train = lora"),
        (["--reference.uses", "4"], "seppo-fast: reference.uses = 4 must divide"),
        (["--sampler.steps", "1001"], "sampler.steps = 1001"),
        (["--model.attention", "xformers"], "pip install 'seppo_fast[xformers]'"),
    ],
    ids=lambda value: value[0] + " " + value[1] if isinstance(value, list) else "",
)
def test_bad_settings_exit_2_and_say_why(forked, config, tmp_path, flags, says):
    for command in ("train", "check"):
        done = forked(command, config, *flags)
        assert done.code == 2, done.out + done.err
        assert says in " ".join(done.err.split()) and "Traceback" not in done.err
        assert not left_behind(tmp_path)


def test_unknown_key_in_the_file_exits_2_with_a_suggestion(forked, config, tmp_path):
    config.write_text(config.read_text().replace("  beta:", "  bta:"))
    done = forked("train", config)
    assert done.code == 2
    assert "unknown key 'train.bta', did you mean 'train.beta'?" in done.err


def test_no_space_left(config, tmp_path, tiny):
    """On a real file system of 300 KiB: first too small for the cache, then for the weights."""
    small = tmp_path / "small"
    small.mkdir()
    command = (
        "mount -t tmpfs -o size=300k none {small} && {python} -c {code} train {config} {key} {small}/x; "
        "code=$?; ls -A {small} {small}/x >&2; exit $code"
    )
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no user namespaces here: a small file system cannot be mounted")
    for key, source, code in (("--data.cache", "shapes:4000", 3), ("--output", "shapes:11:3", 6)):
        line = command.format(
            small=small, python=sys.executable, config=f"{config} --data.source {source}", key=key,
            code="'import sys; from seppo_fast.cli import main; sys.exit(main())'",
        )  # fmt: skip
        done = subprocess.run(
            ["unshare", "-rm", "sh", "-c", line], cwd=tmp_path, capture_output=True, text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        assert "no space left" in done.stderr.lower() and "Traceback" not in done.stderr
        assert not [line for line in done.stderr.splitlines() if line.startswith(".tmp")]
        shutil.rmtree(tmp_path / "run", ignore_errors=True)


def test_a_run_that_diverges_exits_5_and_writes_no_weights(forked, config, tmp_path):
    done = forked("train", config, "--learning-rate", "1e30", "--train.updates", "9")
    assert done.code == 5, done.out + done.err
    assert "non-finite 3 times in a row" in done.err and "SKIPPED" in done.out
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        ".lock",
        "config.yaml",
        "log.jsonl",
        "samples",
        "skipped.jsonl",
    ]


def test_a_run_of_which_no_update_was_applied_exits_5_and_writes_no_weights(forked, config, tmp_path, tiny):
    pipeline = shutil.copytree(tiny, tmp_path / "broken")
    weights = pipeline / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_out.bias"].fill_(float("nan"))
    save_file(tensors, weights, metadata={"format": "pt"})
    for _ in range(2):  # the second run finds all updates done
        done = forked("train", config, "--model.path", pipeline)
        assert done.code == 5, done.out + done.err
        assert "none of the run's 2 updates changed the weights" in done.err and "all 2 were skipped" in done.err
        assert not (tmp_path / "run" / "weights").exists()
    refused = forked("export", tmp_path / "run", "--model", pipeline)
    assert refused.code == 2 and "all of its 2 updates were skipped, so there is nothing to export" in refused.err
    done = forked("train", config, "--model.path", pipeline, "--train.updates", 3)
    assert done.code == 5 and "update 3: the gradient was non-finite 3 times in a row" in done.err
    assert done.out.count("SKIPPED") == 1 or "update 3/3" not in done.out


def test_a_run_with_one_applied_update_is_finished(forked, config, tmp_path):
    """At this learning rate the first update is applied and makes the weights useless."""
    for _ in range(2):
        done = forked("train", config, "--learning-rate", "1e30", "--train.updates", 3)
        assert done.code == 0, done.out + done.err
        assert (tmp_path / "run" / "weights").is_dir()


def scheduler_without_signal(folder, tiny):
    pipeline = shutil.copytree(tiny, folder / "no-signal")
    file = pipeline / "scheduler" / "scheduler_config.json"
    settings = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return pipeline


@pytest.mark.parametrize("command", ["train", "check"])
def test_epsilon_without_signal_at_the_last_timestep_is_refused(forked, config, tmp_path, tiny, command):
    done = forked(command, config, "--model.path", scheduler_without_signal(tmp_path, tiny))
    assert done.code == 2 and "predicts epsilon, but its last timestep keeps no signal" in done.err
    assert not left_behind(tmp_path)


def test_a_tokenizer_without_its_limit_checks_and_trains(forked, config, tmp_path, tiny):
    pipeline = shutil.copytree(tiny, tmp_path / "no-limit")
    file = pipeline / "tokenizer" / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    lines = []
    for limit in ({"model_max_length": settings.pop("model_max_length")}, {}, {"model_max_length": 512}):
        file.write_text(json.dumps(settings | limit))
        checked = forked("check", config, "--model.path", pipeline)
        assert checked.code == 0, checked.err
        lines.append([line for line in checked.out.splitlines() if line.startswith(("disk:", "data:"))])
        done = forked("train", config, "--model.path", pipeline, "--output", tmp_path / f"{len(lines)}")
        assert done.code == 0, done.err
    assert lines[0] == lines[1] == lines[2] != []


def test_interrupt_exits_130_and_writes_no_weights(config, tmp_path):
    words = [sys.executable, "-m", "seppo_fast.train", str(config), "--train.updates", "500"]
    with subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs of a shell ignore SIGINT
    ) as process:  # fmt: skip
        for line in process.stdout:
            if line.startswith("update 2/"):
                process.send_signal(signal.SIGINT)
                break
        _, errors = process.communicate()
    assert process.returncode == 130
    assert re.fullmatch(r"seppo-fast: interrupted after update \d+; rerun the same command to resume", errors.strip())
    assert not (tmp_path / "run" / "weights").exists()


def test_out_of_memory_exits_4_with_what_takes_less(config, monkeypatch, capsys):
    import torch

    import seppo_fast.train.loop
    from seppo_fast.cli import main

    def exhausted(config):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(seppo_fast.train, "train", exhausted)
    assert main(["train", str(config)]) == 4
    said = capsys.readouterr().err
    assert "Tried to allocate 2 GiB" in said and "train.micro_batch" in said


def test_parquet_in_the_pick_a_pic_schema_trains(forked, config, tmp_path):
    """Real JPEGs, including ties; DPO uses the labelled losers, SePPO-r a random one of the two images."""
    import io

    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    def jpeg(seed):
        pixels = np.random.default_rng(seed).integers(0, 255, (37, 52, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG")
        return buffer.getvalue()

    labels = [1.0, 0.0, 0.5, 1.0, 0.5]
    table = pa.table(
        {
            "jpg_0": [jpeg(2 * row) for row in range(5)],
            "jpg_1": [jpeg(2 * row + 1) for row in range(5)],
            "label_0": labels,
            "label_1": [1 - label for label in labels],
            "caption": [f"caption {row}" for row in range(5)],
        }
    )
    pq.write_table(table, tmp_path / "pairs.parquet")
    for objective in ("diffusion-dpo", "seppo-r", "seppo"):
        output = tmp_path / objective
        flags = ["--data.source", tmp_path / "pairs.parquet", "--objective", objective, "--output", output]
        done = forked("train", config, *flags)
        assert done.code == 0, done.err
        entries = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
        assert len(entries) == 2 and all(entry["loss"] > 0 for entry in entries)
    checked = forked("check", config, "--data.source", tmp_path / "pairs.parquet")
    assert "data: 3 examples, 0 bad, 2 ties dropped" in checked.out


@pytest.mark.parametrize(
    ("flag", "value", "code"),
    [
        ("--model.path", "~nobody-here/x", 2),
        ("--data.source", "~nobody-here/x", 3),
        ("--data.source", "~nobody-here/{0..1}.tar", 3),
    ],
)
def test_the_home_of_a_user_who_is_not_there(tiny, tmp_path, capsys, flag, value, code):
    (tmp_path / "run.yaml").write_text(to_yaml(tiny_config(tiny, tmp_path)))
    assert main(["check", str(tmp_path / "run.yaml"), flag, value]) == code
    assert "Could not determine home directory" in capsys.readouterr().err
