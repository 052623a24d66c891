"""Tests of suite `video`: what it compares, that it rejects another schedule's values, and what it counts for clips."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import MotionAdapter

from benchmarks import full_size
from benchmarks.harness import counters, models, speed, steps
from benchmarks.harness.measure import Bench, distance
from benchmarks.harness.naive import NaiveLoop
from benchmarks.harness.rows import KEYS, NAIVE
from benchmarks.suites import endtoend, sampling, step, video
from benchmarks.tables import full_size_table
from seppo_fast.config.schema import ModelConfig
from seppo_fast.data.sources import open_source
from seppo_fast.models.families import animatediff
from seppo_fast.models.registry import load_family
from seppo_fast.shapes.motion import FRAMES
from tests.helpers.benchmark import MACHINE

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def place():
    """Yields the embedded pipeline with random motion modules."""
    with models.workplace(MACHINE, FRAMES) as made:
        yield made


@pytest.fixture
def scaled_linear(monkeypatch):
    """Makes the family use the base pipeline's schedule instead of AnimateDiff's."""
    monkeypatch.setitem(animatediff._SCHEDULE, "beta_schedule", "scaled_linear")


def test_samples_of_another_schedule_get_no_ratio(place, scaled_linear, capsys):
    bench = Bench(MACHINE, "video")
    samplers = sampling.Samplers(place, 2)
    assert not samplers.right
    samplers.right = True
    theirs, channels_last, ours = sampling.case_rows(bench, samplers, sampling.Case(1, 2, 1), "1 sample")
    assert (theirs.value_ok, theirs.ratio) == (True, 1) and (ours.value_ok, ours.ratio) == (False, None)
    assert channels_last.value_ok and ours.case == "1 sample" and ours.suite == "video"
    assert capsys.readouterr().out.count("values differ from the baseline's") == 3


def test_steps_of_another_schedule_are_not_right(place, scaled_linear):
    size = step.Size({"lora": (1,)}, 1, ways=("ahead",), checked=2, micro_batch=1)
    assert step.exact_values(place, size, "lora") == {steps.NAIVE_BATCH: True, "ahead": False}


def test_updates_of_another_schedule_are_not_right(place, scaled_linear):
    right = endtoend.weights_agree(place, False, endtoend.Size(2, 2, 1, 1, micro_batch=2, samples=2))
    assert right == endtoend.RightLoops(ours=False, in_batches=True)


def test_what_is_timed_at_each_size_was_compared_at_the_first():
    for sizes in video.SIZES.values():
        first, *others = (size.step for size in sizes.clips)
        assert all(set(other.ways) <= set(first.ways) and set(other.pairs) <= set(first.pairs) for other in others)
    assert [size.resolution for size in video.SIZES["gpu"].clips] == [256, 512] and video.SIZES["gpu"].frames == 16


def test_samplers_of_another_size_share_their_models(place):
    samplers = sampling.Samplers(place, 2)
    samplers.right = False
    other = samplers.at(48)
    assert other.right is False
    assert other.unet is samplers.unet and samplers.noise.shape == (2, 4, FRAMES, 8, 8)
    made = other.ours(1, 1)
    assert made.shape == (1, 4, FRAMES, 12, 12)
    torch.testing.assert_close(made, other.pipeline(1, 1), rtol=1e-3, atol=1e-3)


def test_the_naive_loop_encodes_a_clip_as_the_family_does(place):
    config = place.config(data={"source": place.source(1)})
    (example,) = open_source(config.data.source)
    clip = models.load_pixels(example, config)
    assert (clip == example.image.open()).all()
    family, loop = load_family(config, CPU), NaiveLoop(config, MACHINE)
    twice = torch.tensor(clip).expand(2, *clip.shape)
    torch.testing.assert_close(loop.encode_images([example, example]), family.encode_images(twice))
    theirs = family.encode_prompts([example.prompt])[0]["prompt_embeds"]
    torch.testing.assert_close(loop.encode_prompts([example.prompt]), theirs)


def test_motion_modules_fit_the_pipeline_and_move_something(place):
    adapter = MotionAdapter.from_pretrained(place.motion_adapter)
    assert (adapter.config.motion_num_attention_heads, adapter.config.motion_max_seq_length) == (8, 32)
    assert adapter.config.use_motion_mid_block
    samplers = sampling.Samplers(place, 1)
    unet, timestep = samplers.pipe.unet, torch.tensor(500)
    with torch.no_grad():
        clip = unet(samplers.noise, timestep, samplers.embeds.expand(FRAMES, -1, -1)).sample
        frame = unet(samplers.noise[:, :, :1], timestep, samplers.embeds).sample
    assert distance([clip[:, :, :1]], [frame]) > 0.1  # a frame's prediction depends on the others


def test_flops_of_clips(place):
    forward = {frames: counters.unet_flops("shapes", None, place.motion_adapter, frames, 32) for frames in (4, 8)}
    picture = counters.unet_flops("shapes", resolution=32)
    assert picture == counters.unet_flops("shapes")
    assert 8 * picture < forward[8] < 16 * picture
    assert 2 * forward[4] < forward[8] < 2.1 * forward[4]  # attention over frames grows with their square
    assert place.flops() == forward[8]
    trained = place.flops(place.config().model)
    assert 1.9 * forward[8] < trained < 2.3 * forward[8]  # a LoRA: one more forward, for gradients of inputs
    assert place.flops(place.config(model={"gradient_checkpointing": True}).model) == trained


def test_the_update_at_true_size_takes_clips_that_fit_and_says_which():
    clips = full_size.parsed(["--clips"])
    assert (clips.frames, clips.resolution, clips.pairs, clips.gradient_checkpointing) == (16, 256, 1, True)
    chosen = full_size.parsed(["--clips", "--frames", "8", "--no-gradient-checkpointing", "--resolution", "128"])
    assert (chosen.frames, chosen.resolution, chosen.gradient_checkpointing) == (8, 128, False)
    config = full_size.update_config(ROOT, chosen)
    assert (config.data.frames, config.data.resolution, config.data.source) == (8, 128, "shapes-motion:1")
    assert config.model.motion_adapter and config.model.train == "lora"
    pictures = full_size.parsed([])
    assert (pictures.pairs, pictures.resolution, pictures.gradient_checkpointing) == (2, 512, False)
    assert full_size.update_config(ROOT, pictures).model == ModelConfig(
        path=str(ROOT / "pipeline"), gradient_checkpointing=False
    )
    assert full_size.parsed(["--quick", "--clips"]).resolution == 64


def test_frames_are_refused_where_there_are_none(capsys):
    with pytest.raises(SystemExit):
        full_size.parsed(["--frames", "8"])
    assert "--frames applies to clips only" in capsys.readouterr().err


def test_the_table_of_an_update_says_what_it_was_made_of():
    result = json.loads((ROOT / "benchmarks" / "results" / "full-size.json").read_text())
    assert "2 pairs, 4 guided DDIM steps, 512 x 512, bf16, CPU" in full_size_table(result)
    clips = result | {"pairs": 1, "resolution": 256, "frames": 16, "gradient_checkpointing": True}
    assert "1 pair, 4 guided DDIM steps, 16 x 256 x 256, bf16, activations recomputed, CPU" in full_size_table(clips)


def test_the_table_of_the_suite():
    case = "sampling of 16 x 256 x 256, 1 sample, 10 DDIM steps"
    stamp = {"suite": "video", "device": "NVIDIA H200", "versions": {"torch": "2.13.0"}, "commit": "abc1234"}
    row = dict.fromkeys(KEYS) | {"case": case, "provider": NAIVE, "value_ok": True, "p50_ms": 2.0, "gb_per_s": 12.0}
    row |= {"ratio": 1.0}
    lines = speed.speed_table([row | stamp]).splitlines()
    assert lines[0] == "| video | | ms | x baseline | GB/s |"
    assert lines[2] == f"| {case} | {NAIVE} | 2 | 1.00 | 12 |"
