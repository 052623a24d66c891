"""The world of shapes: the judge agrees with the true captions, and the shipped pipeline loads and follows prompts."""

import itertools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from seppo_fast.shapes import PIPELINE, world
from seppo_fast.shapes.judge import judge, judge_all, score, score_all

HELD_OUT = 7001  # a seed that neither pretraining nor the demo uses
COUNT = 600


@pytest.fixture(scope="module")
def scenes() -> list[world.Scene]:
    return [world.scene(HELD_OUT, index) for index in range(COUNT)]


@pytest.fixture(scope="module")
def pictures(scenes) -> np.ndarray:
    return np.stack([world.render(one) for one in scenes])


def altered(scene: world.Scene) -> list[tuple[str, str]]:
    """Returns captions of `scene` with one attribute altered, each with the judge's entry that is now wrong."""
    description, wrong = scene.description, []
    used = {thing.colour for thing in description.things}
    for position, thing in enumerate(description.things):
        changes = [
            *((replace(thing, colour=new), new) for new in world.COLOURS if new not in used),
            *((replace(thing, shape=new), f"{thing.colour} {new}") for new in world.SHAPES if new != thing.shape),
            *((replace(thing, size=new), f"{new} {thing.colour}") for new in world.SIZES if new != thing.size),
        ]
        for change, entry in changes:
            things = (*description.things[:position], change, *description.things[position + 1 :])
            wrong.append((world.phrase(replace(description, things=things)), entry))
    if description.relation:
        first, second = description.things
        for relation in set(world.RELATIONS) - {description.relation}:
            entry = f"{first.colour} {relation} {second.colour}"
            wrong.append((world.phrase(replace(description, relation=relation)), entry))
    return wrong


def test_a_scene_is_a_pure_function_of_seed_and_index(scenes, pictures):
    np.random.default_rng(1).random(5)
    again = world.scene(HELD_OUT, 17)
    assert again == scenes[17]
    assert np.array_equal(world.render(again), pictures[17])
    assert world.scene(HELD_OUT + 1, 17) != again
    assert len({world.caption(one) for one in scenes}) > 300


def test_pictures_are_what_the_scene_says(scenes, pictures):
    assert pictures.dtype == np.uint8 and pictures.shape == (COUNT, 32, 32, 3)
    for one, picture in zip(scenes[:100], pictures, strict=False):
        for (x, y), colour in zip(one.centres, one.colours, strict=True):
            assert np.abs(picture[int(y), int(x)] - np.array(colour)).max() <= 1
        assert np.abs(picture[0, 0] - np.array(one.background)).max() <= 1


@pytest.mark.parametrize("shape", world.SHAPES)
@pytest.mark.parametrize("area", [36.0, 93.5])
def test_coverage_has_the_area_and_centroid_that_were_asked_for(shape, area):
    cover = world.coverage(shape, [15.3], [16.8], [area])[0].astype(np.float64)
    ticks = np.arange(32) + 0.5
    assert cover.sum() == pytest.approx(area, rel=0.05)
    assert (cover.sum(0) @ ticks) / cover.sum() == pytest.approx(15.3, abs=0.15)
    assert (cover.sum(1) @ ticks) / cover.sum() == pytest.approx(16.8, abs=0.15)


def test_two_things_never_touch_the_edge_or_each_other(scenes):
    for one in scenes:
        covers = [
            world.coverage(thing.shape, [x], [y], [area])[0]
            for thing, (x, y), area in zip(one.description.things, one.centres, one.areas, strict=True)
        ]
        for cover in covers:
            assert cover[0].max() == cover[-1].max() == cover[:, 0].max() == cover[:, -1].max() == 0
        if len(covers) == 2:
            assert np.minimum(*covers).max() == 0


def test_every_caption_parses_back():
    things = [world.Thing(*words) for words in itertools.product(world.SIZES, world.COLOURS, world.SHAPES)]
    single = [world.Description((thing,)) for thing in things]
    double = [
        world.Description((first, second), relation)
        for first, second in itertools.permutations(things[::5], 2)
        if first.colour != second.colour
        for relation in world.RELATIONS
    ]
    for description in single + double:
        assert world.parse(world.phrase(description)) == description
    assert world.phrase(double[0]).startswith("a small red circle ")


@pytest.mark.parametrize(
    "text", ["", "a red circle", "a large red circle left of a small red square", "a large pink cross"]
)
def test_what_is_no_caption_is_refused(text):
    with pytest.raises(ValueError, match="caption must"):
        world.parse(text)


def test_the_judge_agrees_with_the_truth_on_clean_pictures(scenes, pictures):
    verdicts = judge_all([world.caption(one) for one in scenes], pictures)
    present = [value for verdict in verdicts for value in verdict.values()]
    assert np.mean(present) >= 0.99
    assert np.mean([all(verdict.values()) for verdict in verdicts]) >= 0.99


def test_the_judge_refuses_captions_with_one_attribute_altered(scenes, pictures):
    cases = [(row, *case) for row, one in enumerate(scenes[:150]) for case in altered(one)]
    verdicts = judge_all([text for _, text, _ in cases], pictures[[row for row, _, _ in cases]])
    kinds: dict[str, list[bool]] = {}
    for (_, _, entry), verdict in zip(cases, verdicts, strict=True):
        kind = f"{len(entry.split())} words, {entry.split()[0] in world.SIZES}"
        kinds.setdefault(kind, []).append(not verdict[entry])
    assert len(kinds) == 5  # colour; shape; size; relations of three and of four words
    assert {kind: np.mean(right) >= 0.99 for kind, right in kinds.items()} == dict.fromkeys(kinds, True)


def test_entries_are_named_as_the_prompt_asks():
    picture = world.render(world.scene(HELD_OUT, 0))
    verdict = judge("a large red circle left of a small blue square", picture)
    assert list(verdict) == [
        "red", "red circle", "large red", "blue", "blue square", "small blue", "red left of blue",
    ]  # fmt: skip
    blank = np.full((32, 32, 3), 235, np.uint8)
    assert not any(judge("a large red circle left of a small blue square", blank).values())


def corrupted(pictures: np.ndarray, kind: str, strength: float) -> np.ndarray:
    rng = np.random.default_rng(3)
    images = pictures.astype(np.float64)
    if kind == "noise":
        images = images + rng.normal(0, 255 * strength, images.shape)
    elif kind == "blur":
        for _ in range(int(strength)):
            padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
            rows = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
            images = (rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]) / 9
    else:
        side = round(32 * strength)
        for image in images:
            top, left = rng.integers(0, 33 - side, 2)
            image[top : top + side, left : left + side] = 235
    return np.clip(np.rint(images), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("kind", "strengths"),
    [("noise", (0, 0.15, 0.3, 0.6)), ("blur", (0, 4, 12, 40)), ("erase", (0, 0.4, 0.7, 1.0))],
)
def test_the_score_falls_with_growing_corruption(scenes, pictures, kind, strengths):
    prompts = [world.caption(one) for one in scenes[:200]]
    scores = [score_all(prompts, corrupted(pictures[:200], kind, strength)).mean() for strength in strengths]
    assert scores[0] >= 0.99 and scores[-1] <= 0.4
    assert all(later < earlier for earlier, later in itertools.pairwise(scores)), scores


def test_score_is_the_share_of_right_attributes(scenes, pictures):
    prompt = world.caption(scenes[3])
    assert score(prompt, pictures[3]) == np.mean(list(judge(prompt, pictures[3]).values()))
    others = score_all([world.caption(one) for one in scenes], np.roll(pictures, 1, axis=0))
    assert 0.05 < others.mean() < 0.4


def test_the_judge_names_a_wrong_image():
    with pytest.raises(ValueError, match="image must be uint8"):
        judge("a large red circle", np.zeros((32, 32, 3), np.float32))
    with pytest.raises(ValueError, match="image must be uint8"):
        judge("a large red circle", np.zeros((16, 16, 3), np.uint8))


def test_noisy_captions_are_wrong_as_often_as_asked(scenes):
    assert [world.noisy_caption(one, 1, i, 0.0) for i, one in enumerate(scenes)] == [world.caption(s) for s in scenes]
    noisy = [world.noisy_caption(one, 1, index) for index, one in enumerate(scenes)]
    assert noisy == [world.noisy_caption(one, 1, index) for index, one in enumerate(scenes)]
    # 600 draws at 0.35, minus the few replacements that are true by chance; four standard deviations are 0.08.
    wrong = [text != world.caption(one) for text, one in zip(noisy, scenes, strict=True)]
    assert np.mean(wrong) == pytest.approx(0.35, abs=0.08)
    with pytest.raises(ValueError, match="wrong must lie"):
        world.noisy_caption(scenes[0], 1, 0, 1.5)


def test_the_shipped_pipeline_is_small():
    files = [file for file in PIPELINE.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 15e6
    assert max(file.stat().st_size for file in files) <= 8e6
    weights = {str(file.relative_to(PIPELINE)) for file in files if file.suffix not in (".json", ".txt", ".md")}
    assert weights == {
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    }


def sample(folder: Path, prompts: list[str], steps: int = 12) -> np.ndarray:
    torch = pytest.importorskip("torch")
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        prompts,
        height=32,
        width=32,
        num_inference_steps=steps,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images
    return np.rint(images * 255).astype(np.uint8)


def test_the_shipped_pipeline_follows_prompts(scenes):
    prompts = [world.caption(one) for one in scenes[:64]]
    images = sample(PIPELINE, prompts)
    followed, shuffled = score_all(prompts, images).mean(), score_all(prompts[1:] + prompts[:1], images).mean()
    assert followed >= 0.45
    assert followed > shuffled + 0.2


def test_the_vae_keeps_what_the_judge_looks_for(scenes, pictures):
    torch = pytest.importorskip("torch")
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(PIPELINE, subfolder="vae", local_files_only=True)
    with torch.no_grad():
        images = torch.from_numpy(pictures[:200]).permute(0, 3, 1, 2).float() / 127.5 - 1
        latents = vae.encode(images).latent_dist.mean
        decoded = vae.decode(latents).sample
    assert float((latents * vae.config.scaling_factor).std()) == pytest.approx(1, abs=0.1)
    rebuilt = ((decoded + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert score_all([world.caption(one) for one in scenes[:200]], rebuilt).mean() >= 0.97


def test_the_tokenizer_knows_the_worlds_words_and_any_other_text():
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(PIPELINE / "tokenizer", local_files_only=True)
    prompt = "a large red circle left of a small blue square"
    ids = tokenizer(prompt).input_ids
    assert len(ids) == 12 and ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == prompt
    other = "Ein Türchen, 42!"
    assert len(tokenizer(other).input_ids) > 2 and tokenizer.model_max_length == 16


def test_pretraining_writes_a_pipeline_that_loads(tmp_path):
    settings = {"pictures": 64, "vae-steps": 2, "vae-batch": 4, "steps": 2, "batch": 4, "judged": 4}
    options = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    command = [
        sys.executable,
        "-m",
        "benchmarks.shapes_world.pretrain",
        "--output",
        str(tmp_path / "pipeline"),
        *options,
    ]
    root = Path(world.__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "denoiser 2/2" in done.stdout and "guidance 3: attributes" in done.stdout
    assert sample(tmp_path / "pipeline", ["a large red circle"], steps=2).shape == (1, 32, 32, 3)
    card = (tmp_path / "pipeline" / "README.md").read_text()
    assert "denoiser 2/2" in card and "--pictures 64" in card
