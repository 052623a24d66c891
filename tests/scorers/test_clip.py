"""PickScore, HPSv2, CLIP score and aesthetic score of tiny networks, against formulas in float64."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel

from seppo_fast.scorers import clip as clip_module
from seppo_fast.scorers.convert import convert, sha256
from seppo_fast.scorers.registry import SCORERS, load_scorer
from seppo_fast.utils.errors import ConfigError
from tests.helpers.tiny_scorers import CLIP, END, SIDE, clip_ids, clip_words, head_state, open_clip_state, tiny_clip

CPU = torch.device("cpu")
PROMPTS = ["red", "A cat on the mat edge", "x" * 198]  # 5, some, and 200 tokens
MEAN, STD = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
HEAD = "sac+logos+ava1-l14-linearMSE"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the tiny files of all scorers on CLIP, converted where they are published as pickles."""
    folder = tmp_path_factory.mktemp("scorers")
    tiny_clip(folder / "pickscore")
    tiny_clip(folder / "clip", seed=1)
    state = open_clip_state(folder / "pickscore")
    for name, stem in (("hpsv2.0", "HPS_v2_compressed"), ("hpsv2.1", "HPS_v2.1_compressed")):
        clip_words(folder / name)
        torch.save({"state_dict": state, "name": "tiny"}, folder / name / f"{stem}.pt")
        convert(folder / name / f"{stem}.pt")
        state = {key: tensor * 1.01 for key, tensor in state.items()}
    (folder / "aesthetic").mkdir()
    torch.save(head_state(24), folder / "aesthetic" / f"{HEAD}.pth")
    convert(folder / "aesthetic" / f"{HEAD}.pth")
    return folder


@pytest.fixture(autouse=True)
def tiny_vit(monkeypatch):
    monkeypatch.setattr(clip_module, "VIT_H_14", CLIP)


@pytest.fixture
def pictures():
    return np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), dtype=np.uint8)


def embeddings(folder, pictures, prompts):
    """Returns unit image and text embeddings in float64, from pictures that need no resizing and hand-made tokens."""
    config = CLIPConfig.from_pretrained(folder)
    model = CLIPModel(config).double().eval()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    pixels = torch.from_numpy((pictures / 255 - MEAN) / STD).permute(0, 3, 1, 2)
    with torch.no_grad():
        image = model.get_image_features(pixel_values=pixels).pooler_output.numpy()
        text = []
        for prompt in prompts:
            ids = clip_ids(prompt)
            ids = ids if len(ids) <= 77 else [*ids[:76], END]
            text.append(model.get_text_features(input_ids=torch.tensor([ids])).pooler_output[0].numpy())
    units = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (image, np.stack(text))]
    return units[0], units[1], float(np.exp(np.float64(np.float32(4.3))))


def test_tokens_are_those_that_the_test_makes_by_hand():
    assert [len(clip_ids(prompt)) for prompt in PROMPTS] == [5, 18, 200]


def test_pickscore_is_the_scaled_cosine(folder, pictures):
    image, text, scale = embeddings(folder / "pickscore", pictures, PROMPTS)
    scorer = load_scorer("pickscore", CPU, torch.float32, folder)
    scores = scorer(PROMPTS, pictures)
    assert scores.dtype == np.float64 and scores.shape == (3,)
    assert scores == pytest.approx(scale * (image * text).sum(axis=1), abs=2e-5 * scale)
    assert scorer.cut == 1 and scorer.name == "pickscore" and scorer.higher_is_better
    assert scorer.digest == sha256(folder / "pickscore" / "model.safetensors")
    assert np.ptp(scores) > 1  # the formula is not compared on equal rows


def test_the_clip_score_is_a_hundred_cosines(folder, pictures):
    image, text, _ = embeddings(folder / "clip", pictures, PROMPTS)
    scores = load_scorer("clip", CPU, torch.float32, folder)(PROMPTS, pictures)
    assert scores == pytest.approx(100 * (image * text).sum(axis=1), abs=2e-3)
    assert scores.min() < 0  # not cut off at 0


def test_hps_under_open_clips_names_agrees_with_pickscore(folder, pictures):
    """On a picture that is not resized exactly; on a larger square one up to the difference of the two resizings."""
    image, text, scale = embeddings(folder / "pickscore", pictures, PROMPTS)
    scorer = load_scorer("hpsv2.0", CPU, torch.float32, folder)
    assert scorer(PROMPTS, pictures) == pytest.approx(100 * (image * text).sum(axis=1), abs=2e-3)
    assert scorer.cut == 1 and scorer.name == "hpsv2.0"
    smooth = np.kron(pictures[:, :7, :7], np.ones((1, 8, 8, 1), np.uint8))
    pick = load_scorer("pickscore", CPU, torch.float32, folder)
    # PIL rounds to whole values of 0 to 255 and clips; the tensor's resizing does neither.
    assert scorer(PROMPTS, smooth) / 100 == pytest.approx(pick(PROMPTS, smooth) / scale, abs=0.05)


def test_hps_pads_what_pickscore_crops(folder):
    wide = np.random.default_rng(4).integers(0, 256, (1, 14, SIDE, 3), dtype=np.uint8)
    padded = np.pad(wide, ((0, 0), (7, 7), (0, 0), (0, 0)))
    scores = {
        name: [load_scorer(name, CPU, torch.float32, folder)(["red"], shown)[0] for shown in (wide, padded)]
        for name in ("hpsv2.0", "hpsv2.1", "pickscore")
    }
    for name in ("hpsv2.0", "hpsv2.1"):
        assert scores[name][0] == pytest.approx(scores[name][1], abs=1e-4)
    assert abs(np.subtract(*scores["pickscore"])) > 0.1


def test_the_two_versions_of_hps_are_different_scorers(folder, pictures):
    old, new = (load_scorer(name, CPU, torch.float32, folder) for name in ("hpsv2.0", "hpsv2.1"))
    assert old.name != new.name and old.digest != new.digest
    assert not np.allclose(old(PROMPTS, pictures), new(PROMPTS, pictures), atol=1e-3)
    assert SCORERS["hpsv2.0"].label.startswith("HPSv2.0") and SCORERS["hpsv2.1"].label.startswith("HPSv2.1")


def test_the_aesthetic_score_is_one_affine_map(folder, pictures):
    """Without activations the five layers are the product of their matrices."""
    matrix, offset = np.eye(24), np.zeros(24)
    state = {name: tensor.double().numpy() for name, tensor in head_state(24).items()}
    for place in (0, 2, 4, 6, 7):
        weight, bias = state[f"layers.{place}.weight"], state[f"layers.{place}.bias"]
        matrix, offset = weight @ matrix, weight @ offset + bias
    image, _, _ = embeddings(folder / "clip", pictures, ["red"])
    scorer = load_scorer("aesthetic", CPU, torch.float32, folder)
    assert scorer(PROMPTS, pictures) == pytest.approx((image @ matrix.T + offset)[:, 0], abs=1e-5)
    assert scorer.cut == 0 and len(scorer.digest) == 64
    assert np.ptp(scorer(PROMPTS, pictures)) > 0.01


@pytest.mark.parametrize("name", ["pickscore", "hpsv2.1", "aesthetic"])
def test_the_score_of_a_clip_is_the_mean_of_its_frames(folder, name):
    clips = np.random.default_rng(1).integers(0, 256, (2, 3, 40, 33, 3), dtype=np.uint8)
    scorer = load_scorer(name, CPU, torch.float32, folder)
    frames = [scorer([prompt] * 3, clip) for prompt, clip in zip(PROMPTS, clips, strict=False)]
    assert scorer(PROMPTS[:2], clips) == pytest.approx([rows.mean() for rows in frames], abs=1e-4)


def test_scores_do_not_depend_on_the_batch(folder, monkeypatch):
    pictures = np.random.default_rng(2).integers(0, 256, (7, 30, 41, 3), dtype=np.uint8)
    scorer = load_scorer("pickscore", CPU, torch.float32, folder)
    whole = scorer(["red"] * 7, pictures)
    monkeypatch.setattr(clip_module, "BATCH", 3)
    assert scorer(["red"] * 7, pictures) == pytest.approx(whole, abs=1e-4)
    assert scorer([], pictures[:0]).shape == (0,)


def test_towers_in_half_precision_are_normalized_in_float32(folder, pictures):
    full = load_scorer("clip", CPU, torch.float32, folder)(PROMPTS, pictures)
    halved = load_scorer("clip", CPU, torch.bfloat16, folder)(PROMPTS, pictures)
    assert 0 < np.abs(full - halved).max() < 5
    with torch.inference_mode():
        towers = clip_module.hub_towers(
            {name: folder / "clip" / name for name in ("config.json", "model.safetensors", "vocab.json")},
            clip_module.shorter_side, CPU, torch.bfloat16,
        )  # fmt: skip
        unit = towers.image(pictures)
    assert unit.dtype == torch.float32 and unit.norm(dim=1).numpy() == pytest.approx(np.ones(3), abs=1e-6)
    assert towers.scale == pytest.approx(np.exp(4.3), rel=1e-6)  # 4.3 in bfloat16 would be off by .02


def test_a_zero_embedding_stays_zero(folder, pictures, tmp_path):
    state = load_file(tiny_clip(tmp_path / "clip") / "model.safetensors")
    save_file(state | {"visual_projection.weight": torch.zeros(24, 40)}, tmp_path / "clip" / "model.safetensors")
    assert load_scorer("clip", CPU, torch.float32, tmp_path)(PROMPTS, pictures).tolist() == [0, 0, 0]


def test_rows_without_a_finite_score_are_named(folder, tmp_path, pictures):
    state = load_file(tiny_clip(tmp_path / "clip") / "model.safetensors")
    state["text_model.embeddings.token_embedding.weight"][clip_ids("q")[1]] = float("nan")
    save_file(state, tmp_path / "clip" / "model.safetensors")
    scorer = load_scorer("clip", CPU, torch.float32, tmp_path)
    with pytest.raises(ValueError, match=r"clip: the score of row 0, 2 is non-finite"):
        scorer(["q", "red", "q"], pictures)


@pytest.mark.parametrize(
    ("prompts", "wrong", "message"),
    [
        (["a"] * 2, np.zeros((2, 28, 28, 3), np.float32), "uint8"),
        (["a"] * 2, np.zeros((2, 3, 28, 28), np.uint8), "shape"),
        (["a"], np.zeros((28, 28, 3), np.uint8), "shape"),
        (["a"], np.zeros((1, 0, 28, 28, 3), np.uint8), "shape"),
        (["a"], np.zeros((2, 28, 28, 3), np.uint8), "one per picture"),
        ("ab", np.zeros((2, 28, 28, 3), np.uint8), "sequence of strings"),
    ],
)
def test_wrong_arguments_are_refused(folder, prompts, wrong, message):
    with pytest.raises(ValueError, match=message):
        load_scorer("pickscore", CPU, torch.float32, folder)(prompts, wrong)


# Weights that do not fit


def test_old_position_ids_are_accepted(folder, tmp_path, pictures):
    """Older versions of transformers saved them; and the end token was recorded as 2, which means the largest id."""
    place = tiny_clip(tmp_path / "clip", seed=1, eos_token_id=2)
    state = load_file(place / "model.safetensors")
    for tower in ("text", "vision"):
        state[f"{tower}_model.embeddings.position_ids"] = torch.arange(5)[None]
    save_file(state, place / "model.safetensors")
    older = load_scorer("clip", CPU, torch.float32, tmp_path)(PROMPTS, pictures)
    assert np.array_equal(older, load_scorer("clip", CPU, torch.float32, folder)(PROMPTS, pictures))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"visual_projection.weight": None}, r"lacks 1 of its weights, such as visual_projection\.weight"),
        ({"extra.weight": torch.ones(2)}, r"has 1 unknown ones, such as extra\.weight"),
        ({"logit_scale": None, "extra": torch.ones(2)}, "lacks 1 .* and has 1 unknown"),
        ({"visual_projection.weight": torch.ones(24, 41)}, r"has shape \(24, 41\) instead of \(24, 40\)"),
    ],
)
def test_missing_surplus_and_misshapen_weights_are_refused(tmp_path, change, message):
    file = tiny_clip(tmp_path / "clip") / "model.safetensors"
    state = load_file(file) | change
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, file)
    with pytest.raises(ConfigError, match=message):
        load_scorer("clip", CPU, torch.float32, tmp_path)


def test_weights_of_another_scorer_are_refused(folder, tmp_path):
    place = clip_words(tmp_path / "hpsv2.1")
    (place / "HPS_v2.1_compressed.safetensors").write_bytes((folder / "aesthetic" / f"{HEAD}.safetensors").read_bytes())
    with pytest.raises(ConfigError, match="is not a CLIPModel: it lacks .* is it the file of another scorer"):
        load_scorer("hpsv2.1", CPU, torch.float32, tmp_path)


def test_damaged_files_are_refused(tmp_path):
    place = tiny_clip(tmp_path / "clip")
    whole = (place / "model.safetensors").read_bytes()
    (place / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match="cannot be read as safetensors"):
        load_scorer("clip", CPU, torch.float32, tmp_path)
    (place / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not a CLIP configuration"):
        load_scorer("clip", CPU, torch.float32, tmp_path)


def test_the_configuration_of_hps_is_that_of_vit_h_14(monkeypatch):
    monkeypatch.undo()
    config = CLIPConfig(**clip_module.VIT_H_14)
    with torch.device("meta"):
        model = CLIPModel(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 986_109_441
    assert config.vision_config.hidden_size // config.vision_config.num_attention_heads == 80
    assert {config.text_config.hidden_act, config.vision_config.hidden_act} == {"gelu"}
    assert (config.text_config.eos_token_id, config.text_config.max_position_embeddings) == (49407, 77)


# What open_clip does to a prompt


@pytest.mark.parametrize(
    ("prompt", "cleaned"),
    [
        ("  A Red\tcar,\n on  the ROAD ", "a red car, on the road"),
        ("salt & pepper <b>", "salt & pepper <b>"),
    ],
)
def test_plain_prompts_are_cleaned_without_ftfy(prompt, cleaned, monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    assert clip_module.open_clip_cleaned(prompt) == cleaned


def test_other_prompts_need_ftfy(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "ftfy", None)
        for prompt in ("a “red” car", "Tom &amp;amp; Jerry", "bell \x07"):
            with pytest.raises(ConfigError, match="pip install ftfy"):
                clip_module.open_clip_cleaned(prompt)
    assert clip_module.open_clip_cleaned("a “red” car’s") == 'a "red" car\'s'
    assert clip_module.open_clip_cleaned("Tom &amp;amp; Jerry &lt;3") == "tom & jerry <3"


def test_text_that_ftfy_would_not_change_is_recognized():
    import ftfy

    letters = [chr(code) for code in range(32, 127)] + ["&", "lt;", "amp", "#39;", "<", ">"]
    rng = np.random.default_rng(3)
    plain = ["".join(rng.choice(letters, 12)) for _ in range(3000)]
    plain = [text for text in plain if clip_module._PLAIN.fullmatch(text)]
    assert len(plain) > 1000 and [text for text in plain if ftfy.fix_text(text) != text] == []
