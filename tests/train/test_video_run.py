"""Real video files, through the command line: checked, trained on, interrupted, resumed, exported, loaded."""

import csv
import json

import numpy as np
import pytest
import torch
from diffusers import AnimateDiffPipeline, MotionAdapter

from seppo_fast.config.load import to_yaml
from tests.helpers.clips import numbered_frames, write_clip
from tests.helpers.runs import tiny_config
from tests.helpers.same_run import assert_same_run
from tests.helpers.tiny import tiny_adapter

FRAMES = 5


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return tiny_adapter(tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def clips(tmp_path):
    """Six clips in the format of MagicTime: a time-lapse, a short one, and others."""
    folder = tmp_path / "clips"
    with_captions = [("sunrise", 40, 0), ("short", 3, 1), *((f"clip{number}", 30, 1) for number in range(4))]
    for name, length, _ in with_captions:
        write_clip(folder / f"{name}.mp4", numbered_frames(length))
    with (folder / "clips.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["videoid", "name", "is_transmit"])
        table.writerows((name, f"a clip, called {name}", transmit) for name, _, transmit in with_captions)
    return folder


def run_file(tiny, adapter, clips, folder, name, **sections):
    config = tiny_config(
        tiny, folder, output=str(folder / name),
        model={"train": "lora", "motion_adapter": str(adapter), "precision": "bf16"},
        data={"source": str(clips), "frames": FRAMES, "flip": True}, save={"minutes": 0},
        train={"updates": 2, "updates_per_iteration": 1, "pairs_per_update": 4, "micro_batch": 2}, **sections,
    )  # fmt: skip
    file = folder / f"{name}.yaml"
    file.write_text(to_yaml(config))
    return config, file


def test_videos_train_through_the_command_line(tiny, adapter, clips, tmp_path, forks):
    config, file = run_file(tiny, adapter, clips, tmp_path, "straight")
    checked = forks.run("check", file)
    assert checked.code == 0, checked.err
    assert "data: 6 examples, 0 bad" in checked.out
    ended = forks.run("train", file)
    assert ended.code == 0, ended.err
    assert f"1 of 6 clips has too few frames to choose {FRAMES} different ones and repeats some: short\n" in ended.out
    stopped, other = run_file(tiny, adapter, clips, tmp_path, "stopped")
    assert forks.run("train", other, fault="micro-batch@3=kill").code < 0
    assert forks.run("train", other).code == 0
    assert_same_run(stopped, config)
    exported = forks.run("export", tmp_path / "straight", "--output", tmp_path / "lora")
    assert exported.code == 0, exported.err
    assert forks.run("export", tmp_path / "straight", "--format", "comfyui").code == 2
    whole = forks.run("export", tmp_path / "straight", "--format", "diffusers", "--output", tmp_path / "whole")
    assert whole.code == 0, whole.err
    refused = forks.run("train", file, "--model.path", tmp_path / "whole", "--output", tmp_path / "again")
    assert refused.code == 2 and "is an AnimateDiffPipeline" in refused.err
    pipe = AnimateDiffPipeline.from_pretrained(tiny, motion_adapter=MotionAdapter.from_pretrained(adapter))
    pipe.load_lora_weights(tmp_path / "lora")
    noise = torch.randn(1, 4, FRAMES, 8, 8, generator=torch.Generator().manual_seed(0))
    made = pipe("a clip", num_frames=FRAMES, num_inference_steps=1, latents=noise, output_type="np").frames
    assert made.shape == (1, FRAMES, 16, 16, 3) and np.isfinite(made).all()
    merged = AnimateDiffPipeline.from_pretrained(tmp_path / "whole")
    pipe.scheduler = merged.scheduler  # the linear one, which the base's folder does not contain
    made = pipe("a clip", num_frames=FRAMES, num_inference_steps=1, latents=noise, output_type="np").frames
    again = merged("a clip", num_frames=FRAMES, num_inference_steps=1, latents=noise, output_type="np").frames
    assert np.abs(again - made).max() < 1e-4
    positions = {name: tensor for name, tensor in merged.unet.state_dict().items() if name.endswith(".pe")}
    assert positions and all(torch.equal(tensor, pipe.unet.state_dict()[name]) for name, tensor in positions.items())
    entries = [json.loads(line) for line in (tmp_path / "straight" / "log.jsonl").read_text().splitlines()]
    assert entries[0]["aaf_rate"] == 1


def test_bad_clips_are_named_and_too_many_of_them_refused(tiny, adapter, clips, tmp_path, forks):
    broken = clips / "clip0.mp4"
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    (clips / "clip1.mp4").write_text("no video")
    _, file = run_file(tiny, adapter, clips, tmp_path, "run")
    for command in ("check", "train"):
        ended = forks.run(command, file)
        assert ended.code == 3
        assert "clip0" in ended.out + ended.err and "clip1" in ended.out + ended.err
    assert not (tmp_path / "run").exists()
