"""The world of clips: the judge agrees with the true captions, and the shipped motion adapter follows prompts."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    MotionAdapter,
    UNet2DConditionModel,
)
from transformers import CLIPTokenizer

from benchmarks.shapes_world.pretrain_motion import SCHEDULE, decode_clips, encode_clips, main
from seppo_fast.data.readers.moving import MovingShapesSource
from seppo_fast.models.families.sd15 import StableDiffusion
from seppo_fast.shapes import MOTION_ADAPTER, PIPELINE, SHIPPED, motion, pipeline_folder, world
from seppo_fast.shapes.motion_judge import judge, judge_all, motion_of, score, score_all, track

FOLDER = PIPELINE.parent
HELD_OUT = 7001  # a seed that neither pretraining nor the demo uses
COUNT = 200
FEW = 60  # for tests that need fewer
OPPOSITE = {
    "grows": "shrinks",
    "shrinks": "grows",
    "moves left": "moves right",
    "moves right": "moves left",
    "moves up": "moves down",
    "moves down": "moves up",
}


@pytest.fixture(scope="module")
def scenes() -> list[motion.MovingScene]:
    return [motion.moving_scene(HELD_OUT, index) for index in range(COUNT)]


@pytest.fixture(scope="module")
def clips(scenes) -> np.ndarray:
    return np.stack([motion.render(one) for one in scenes])


@pytest.fixture(scope="module")
def prompts(scenes) -> list[str]:
    return [motion.caption(one) for one in scenes]


def shown(scenes: list[motion.MovingScene], clips: np.ndarray) -> list[str]:
    """Returns the motion that the judge sees in each clip for the scene's colour."""
    return [motion_of(track(clip, one.action.colour)) for clip, one in zip(clips, scenes, strict=True)]


def test_a_scene_is_a_pure_function_of_seed_and_index(scenes, clips):
    np.random.default_rng(1).random(5)
    again = motion.moving_scene(HELD_OUT, 17)
    assert again == scenes[17]
    assert np.array_equal(motion.render(again), clips[17])
    assert motion.moving_scene(HELD_OUT + 1, 17) != again
    shares = [np.mean([one.action.motion == name for one in scenes]) for name in motion.MOTIONS]
    assert min(shares) > 0.04  # 1/7 each; four standard deviations are 0.1


def test_clips_are_what_the_scene_says(scenes, clips):
    assert clips.dtype == np.uint8 and clips.shape == (COUNT, motion.FRAMES, 32, 32, 3)
    ticks = np.arange(32) + 0.5
    for one, clip in zip(scenes[:100], clips, strict=False):
        cover = np.abs(clip.astype(np.float64) - np.array(one.background)).sum(-1)
        cover[cover < 8] = 0  # rounding of the background
        cover /= np.abs(np.array(one.colour) - np.array(one.background)).sum()
        for pose, frame in ((one.first, cover[0]), (one.last, cover[-1])):
            assert frame.sum() == pytest.approx(pose.area, rel=0.06)
            assert (frame.sum(0) @ ticks) / frame.sum() == pytest.approx(pose.x, abs=0.25)
            assert (frame.sum(1) @ ticks) / frame.sum() == pytest.approx(pose.y, abs=0.25)
        edges = np.concatenate([cover[:, 0], cover[:, -1], cover[:, :, 0], cover[:, :, -1]])
        assert edges.max() == 0


def test_motions_are_as_large_as_the_world_says(scenes):
    for one in scenes:
        dx, dy = one.last.x - one.first.x, one.last.y - one.first.y
        way = motion.DIRECTIONS.get(one.action.motion, (0, 0))
        assert np.sign([dx, dy]).tolist() == list(way)
        travel = float(np.hypot(dx, dy))
        assert travel == 0 if way == (0, 0) else motion.TRAVEL[0] <= travel <= motion.TRAVEL[1]
        ratio = one.last.area / one.first.area
        assert {"grows": ratio >= 2, "shrinks": ratio <= 0.5}.get(one.action.motion, ratio == 1)


def test_a_thing_slows_down_so_that_its_middle_frame_leans_to_its_end(scenes):
    time = np.linspace(0, 1, 9)
    part = motion.slowing(time)
    assert part[0] == 0 and part[-1] == 1 and part[4] == 0.75
    assert np.allclose(np.diff(part, 2), np.diff(part, 2)[0]) and np.all(np.diff(part, 2) < 0)
    for one in scenes[:FEW]:
        if one.action.motion in motion.DIRECTIONS:
            (middle,) = track(motion.render(one, 3)[1:2], one.action.colour).findings
            assert middle.x == pytest.approx(0.25 * one.first.x + 0.75 * one.last.x, abs=0.3)
            assert middle.y == pytest.approx(0.25 * one.first.y + 0.75 * one.last.y, abs=0.3)


def test_a_clip_of_more_frames_shows_the_same_motion(scenes):
    clip = motion.render(scenes[3], 15)
    assert clip.shape == (15, 32, 32, 3)
    assert np.array_equal(clip[::2], motion.render(scenes[3], 8))
    with pytest.raises(ValueError, match="frames must be at least 2"):
        motion.render(scenes[3], 1)


def test_every_caption_parses_back(prompts):
    captions = motion.all_captions()
    assert len(set(captions)) == len(captions) == 288
    assert [motion.phrase(motion.parse(text)) for text in captions] == captions
    assert {"a red circle grows", "a small blue square moves left"} <= set(captions)
    assert set(prompts) <= set(captions)


@pytest.mark.parametrize(
    "text",
    ["", "a red circle", "a small red circle grows", "a red circle moves left", "a large pink cross stays still"],
)
def test_what_is_no_caption_is_refused(text):
    with pytest.raises(ValueError, match="caption must"):
        motion.parse(text)


def test_the_shipped_tokenizer_holds_every_caption():
    tokenizer = CLIPTokenizer.from_pretrained(PIPELINE / "tokenizer", local_files_only=True)
    for text in motion.all_captions():
        ids = tokenizer(text).input_ids
        assert len(ids) <= tokenizer.model_max_length and ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text


def test_noisy_captions_name_another_motion_as_often_as_asked(scenes, prompts):
    assert [motion.noisy_caption(one, 1, i, 0.0) for i, one in enumerate(scenes)] == prompts
    noisy = [motion.noisy_caption(one, 1, index, 0.25) for index, one in enumerate(scenes)]
    assert noisy == [motion.noisy_caption(one, 1, index, 0.25) for index, one in enumerate(scenes)]
    wrong = [motion.parse(text).motion != one.action.motion for text, one in zip(noisy, scenes, strict=True)]
    assert np.mean(wrong) == pytest.approx(0.25, abs=0.12)  # four standard deviations
    for text, one in zip(noisy, scenes, strict=True):
        action = motion.parse(text)
        assert (action.colour, action.shape) == (one.action.colour, one.action.shape)
        assert not (action.size and one.action.size) or action.size == one.action.size
    with pytest.raises(ValueError, match="wrong must lie"):
        motion.noisy_caption(scenes[0], 1, 0, -0.1)


def test_the_judge_agrees_with_the_truth_on_clean_clips(scenes, clips, prompts):
    assert all(all(entries.values()) for entries in judge_all(prompts, clips))
    assert shown(scenes, clips) == [one.action.motion for one in scenes]


@pytest.mark.parametrize("frames", [3, 16])
def test_the_judge_takes_any_number_of_frames(scenes, prompts, frames):
    others = np.stack([motion.render(one, frames) for one in scenes[:FEW]])
    assert score_all(prompts[:FEW], others).mean() == 1


def test_the_judge_agrees_with_the_truth_after_the_autoencoder(clips, prompts):
    vae = AutoencoderKL.from_pretrained(PIPELINE, subfolder="vae", local_files_only=True)
    rebuilt = decode_clips(vae, encode_clips(vae, clips[:FEW]))
    assert not np.array_equal(rebuilt, clips[:FEW])
    entries = judge_all(prompts[:FEW], rebuilt)
    assert np.mean([value for entry in entries for value in entry.values()]) >= 0.98


def altered(action: motion.Action) -> list[tuple[str, str]]:
    """Returns captions with one attribute altered, each with the judge's entry that is now wrong."""
    colours = [new for new in world.COLOURS if new != action.colour]
    shapes = [new for new in world.SHAPES if new != action.shape]
    sizes = [new for new in world.SIZES if action.size and new != action.size]
    moves = [new for new in motion.MOTIONS if new != action.motion]
    wrong = [
        *((replace(action, colour=new), new) for new in colours),
        *((replace(action, shape=new), f"{action.colour} {new}") for new in shapes),
        *((replace(action, size=new), f"{new} {action.colour}") for new in sizes),
    ]
    for new in moves:
        size = "" if new in motion.RESIZING else action.size or "small"
        wrong.append((replace(action, motion=new, size=size), f"{action.colour} {new}"))
    return [(motion.phrase(other), entry) for other, entry in wrong]


def test_the_judge_refuses_captions_with_one_attribute_altered(scenes, clips):
    cases = [(row, *case) for row, one in enumerate(scenes[:20]) for case in altered(one.action)]
    verdicts = judge_all([text for _, text, _ in cases], clips[[row for row, _, _ in cases]])
    assert not any(verdict[entry] for (_, _, entry), verdict in zip(cases, verdicts, strict=True))


def test_entries_are_named_as_the_prompt_asks(clips):
    assert list(judge("a small red circle moves left", clips[0])) == [
        "red", "red circle", "small red", "red moves left",
    ]  # fmt: skip
    assert list(judge("a red circle grows", clips[0])) == ["red", "red circle", "red grows"]


def test_a_clip_backwards_shows_the_opposite(scenes, clips):
    assert shown(scenes[:FEW], clips[:FEW, ::-1]) == [
        OPPOSITE.get(one.action.motion, one.action.motion) for one in scenes[:FEW]
    ]


def test_a_still_clip_moves_nowhere(scenes, clips, prompts):
    still = np.repeat(clips[:FEW, :1], motion.FRAMES, axis=1)
    assert set(shown(scenes[:FEW], still)) == {"stays still"}
    moving = [row for row, one in enumerate(scenes[:FEW]) if one.action.motion != "stays still"]
    scores = score_all([prompts[row] for row in moving], still[moving])
    assert set(np.round(scores, 2)) == {0.67, 0.75}


def test_a_jump_is_no_motion(scenes, clips):
    half = motion.FRAMES // 2
    ends = [np.repeat(clips[:FEW, frame], half, axis=1) for frame in ([0], [-1])]
    seen = shown(scenes[:FEW], np.concatenate(ends, axis=1))
    for one, name in zip(scenes[:FEW], seen, strict=True):
        assert name == ("stays still" if one.action.motion == "stays still" else "")


def test_two_motions_at_once_are_none(scenes):
    action = motion.Action("", "blue", "square", "grows")
    grown = next(one for one in scenes if one.action.motion == "grows")
    first, last = motion.Pose(9, 16, 40), motion.Pose(22, 16, 95)
    both = motion.MovingScene(action, first, last, grown.background, tuple(map(float, world.COLOURS["blue"])))
    diagonal = replace(both, action=replace(action, size="small"), last=motion.Pose(22, 26, 40))
    assert shown([both, diagonal], np.stack([motion.render(both), motion.render(diagonal)])) == ["", ""]


def test_noise_and_blank_clips_hold_nothing(prompts):
    noise = np.random.default_rng(5).integers(0, 256, (40, motion.FRAMES, 32, 32, 3)).astype(np.uint8)
    assert score_all(prompts[:40], noise).max() == 0
    assert score_all(prompts[:40], np.full_like(noise, 235)).max() == 0


def test_the_score_falls_as_frames_are_lost(clips, prompts):
    scores = []
    for lost in (0, 2, 4, 8):
        broken = clips[:FEW].copy()
        broken[:, :lost] = 235
        scores.append(score_all(prompts[:FEW], broken).mean())
    assert scores[0] == 1 and scores[1] >= 0.7 and scores[2] == scores[3] == 0


def test_score_is_the_share_of_right_attributes(clips, prompts):
    assert score(prompts[3], clips[3]) == np.mean(list(judge(prompts[3], clips[3]).values()))
    others = score_all(prompts[:FEW], np.roll(clips[:FEW], 1, axis=0)).mean()
    assert 0.05 < others < 0.4


@pytest.mark.parametrize("shape", [(8, 16, 16, 3), (1, 32, 32, 3), (32, 32, 3)])
def test_the_judge_names_a_wrong_clip(shape):
    with pytest.raises(ValueError, match="clip must be uint8"):
        judge("a red circle grows", np.zeros(shape, np.uint8))
    with pytest.raises(ValueError, match="clip must be uint8"):
        judge("a red circle grows", np.zeros((8, 32, 32, 3), np.float32))


def test_the_source_holds_true_captions_and_clips(prompts, clips):
    source = MovingShapesSource("shapes-motion:5:7001", 5, HELD_OUT)
    assert source.clips and len(source) == 5 and not source.has_losers
    assert [example.prompt for example in source] == prompts[:5]
    assert source[3].id == "shapes-motion-7001-3"
    assert source[3].time_lapse  # the motion fills the whole clip, so no frame may be cut off
    assert np.array_equal(source[3].image.open(), clips[3])
    assert len({example.id for example in source}) == 5
    assert source.digest() == MovingShapesSource("again", 5, HELD_OUT).digest()
    others = [MovingShapesSource("", 4, HELD_OUT), MovingShapesSource("", 5, 0)]
    assert len({source.digest(), *(other.digest() for other in others)}) == 3


def animate(folder: Path, prompts: list[str], steps: int, guidance: float = 3.0) -> np.ndarray:
    """Returns clips uint8 (n, FRAMES, 32, 32, 3) made by the pipeline and the motion adapter in `folder`."""
    adapter = MotionAdapter.from_pretrained(folder / "motion_adapter", local_files_only=True)
    own = DDIMScheduler.from_pretrained(folder / "motion_pipeline", subfolder="scheduler", local_files_only=True)
    # As in AnimateDiff: its own noise schedule, everything else from the folder.
    scheduler = DDIMScheduler.from_config(own.config, beta_schedule="linear", timestep_spacing="linspace")
    assert {name: scheduler.config[name] for name in SCHEDULE} == SCHEDULE
    pipeline = AnimateDiffPipeline.from_pretrained(
        folder / "motion_pipeline", motion_adapter=adapter, scheduler=scheduler, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    frames = pipeline(
        prompts,
        num_frames=motion.FRAMES,
        height=32,
        width=32,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).frames
    return np.rint(frames * 255).astype(np.uint8)


@pytest.fixture(scope="module")
def shipped_clips(tmp_path_factory):
    """Prompts that name a motion, and the clips that the shipped adapter makes for them."""
    moving = [text for text in motion.all_captions() if motion.parse(text).motion != "stays still"]
    prompts = [moving[number] for number in np.random.default_rng(1).permutation(len(moving))[:48]]
    folder = tmp_path_factory.mktemp("shipped")
    pipeline_folder(folder / "motion_pipeline", "shapes-motion")
    (folder / "motion_adapter").symlink_to(MOTION_ADAPTER)
    return prompts, np.concatenate([animate(folder, prompts[at : at + 24], steps=10) for at in range(0, 48, 24)])


def test_the_shipped_adapter_moves_what_it_is_told_to(shipped_clips):
    prompts, clips = shipped_clips
    followed = np.mean([list(entry.values())[-1] for entry in judge_all(prompts, clips)])
    # A still clip never shows one of these motions; a random motion of the seven is right one time in seven.
    assert followed >= 0.3


def test_the_shipped_adapter_tells_a_motion_from_its_opposite(shipped_clips):
    """The named motion is three times as frequent; a model that knew only the axis would show both equally often."""
    prompts, clips = shipped_clips
    actions = [motion.parse(prompt) for prompt in prompts]
    seen = [motion_of(track(clip, action.colour)) for clip, action in zip(clips, actions, strict=True)]
    asked = sum(name == action.motion for name, action in zip(seen, actions, strict=True))
    opposite = sum(name == OPPOSITE[action.motion] for name, action in zip(seen, actions, strict=True))
    assert asked > 3 * opposite


def test_the_shipped_adapter_beats_its_own_first_frames(shipped_clips):
    prompts, clips = shipped_clips
    still = score_all(prompts, np.repeat(clips[:, :1], motion.FRAMES, axis=1)).mean()
    assert score_all(prompts, clips).mean() > still


def test_what_is_shipped_is_small_and_fits():
    adapter, base = FOLDER / "motion_adapter", FOLDER / "motion_pipeline"
    files = {file.name: file.stat().st_size for file in adapter.iterdir()}
    assert set(files) == {"README.md", "config.json", "diffusion_pytorch_model.safetensors"}
    assert sum(files.values()) <= 4e6
    assert sum(file.stat().st_size for file in base.rglob("*") if file.is_file()) <= 13e6
    assert (base / "unet" / "config.json").read_bytes() == (PIPELINE / "unet" / "config.json").read_bytes()
    assert sorted(part.name for part in base.iterdir() if part.is_dir()) == ["scheduler", "text_encoder", "unet"]


@pytest.mark.parametrize("name", ["shapes", "shapes-motion"])
def test_a_written_pipeline_has_all_its_parts_and_loads_by_itself(name, tmp_path):
    folder = pipeline_folder(tmp_path / "pipeline", name)
    pipeline = DiffusionPipeline.from_pretrained(folder, safety_checker=None, local_files_only=True)
    assert pipeline.scheduler.config.prediction_type == {"shapes": "epsilon", "shapes-motion": "v_prediction"}[name]
    written, embedded = load_shipped(str(folder)), load_shipped(name)
    assert written.identity() == embedded.identity() and written.fingerprint() == embedded.fingerprint()
    assert (folder / "README.md").read_bytes() == (SHIPPED[name] / "README.md").read_bytes()
    assert pipeline_folder(str(folder), name) == folder  # overwriting itself


def test_the_embedded_models_are_the_ones_that_runs_were_begun_with():
    """Saved states store these identities; recorded before the two pipelines shared VAE and tokenizer."""
    assert load_shipped("shapes").identity().startswith("9f8ab6b937bec864")
    assert load_shipped("shapes-motion").identity().startswith("e6dba673e5573383")
    parts = load_shipped("shapes-motion").fingerprint()
    assert parts == load_shipped("shapes").fingerprint() | {"text_encoder": parts["text_encoder"]}


def test_only_shipped_pipelines_are_written(tmp_path):
    with pytest.raises(ValueError, match="name must be one of shapes, shapes-motion, got 'shape'"):
        pipeline_folder(tmp_path, "shape")


def load_shipped(path: str) -> StableDiffusion:
    return StableDiffusion.load(path, torch.device("cpu"))


def test_pretraining_writes_an_adapter_and_a_pipeline_that_have_learned(tmp_path, monkeypatch):
    settings = {"clips": 4, "stills": 2, "steps": 2, "batch": 2, "judged": 2, "sampler-steps": 2}
    options = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["pretrain_motion", "--output", str(tmp_path), *options])
    main()
    adapter = MotionAdapter.from_pretrained(tmp_path / "motion_adapter", local_files_only=True)
    ends = [parameter for name, parameter in adapter.named_parameters() if name.endswith("proj_out.weight")]
    assert len(ends) == 7 and all(bool(end.any()) for end in ends)  # they start at zero
    before, after = (
        UNet2DConditionModel.from_pretrained(folder, subfolder="unet", local_files_only=True).state_dict()
        for folder in (PIPELINE, tmp_path / "motion_pipeline")
    )
    assert before.keys() == after.keys()
    assert not any(torch.equal(value, after[name]) for name, value in before.items())
    card = (tmp_path / "motion_adapter" / "README.md").read_text()
    assert "stills 2/2" in card and "clips 2/2" in card and "--steps 2" in card and "guidance 5: attributes" in card
    assert animate(tmp_path, ["a red circle grows"], steps=2).shape == (1, 8, 32, 32, 3)
