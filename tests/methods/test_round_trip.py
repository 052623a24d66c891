"""Losers through pixels equal, bit for bit, what the data cache would hold for the samples' pictures."""

import numpy as np
import pytest
import torch
from PIL import Image

from seppo_fast.data.cache.opening import open_or_build
from seppo_fast.data.sources import open_source
from seppo_fast.models.denoiser import Denoiser
from seppo_fast.models.families.animatediff import AnimateDiff
from seppo_fast.train.trainer import Trainer
from seppo_fast.utils.errors import ConfigError, NonFiniteError
from tests.helpers.runs import collected, tiny_config

CPU = torch.device("cpu")


def started(tiny, tmp_path, round_trip=True, **sections):
    sections["sampler"] = {"round_trip": round_trip} | sections.get("sampler", {})
    made = Trainer(tiny_config(tiny, tmp_path, **sections))
    made.add_checkpoint()
    return made


def test_losers_are_what_the_cache_holds_of_their_pictures(tiny, tmp_path):
    sizes = {"train": {"pairs_per_update": 20}, "sampler": {"batch": 16}, "reference": {"window": 1}}
    plain, through = (started(tiny, tmp_path, on, **sizes) for on in (False, True))
    samples, losers = collected(plain, 0).losers, collected(through, 0).losers
    folder = tmp_path / "pictures"
    folder.mkdir()
    pictures = np.concatenate([plain.family.decode(batch) for batch in samples.split(8)])
    for row, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{row:02}.png")
        (folder / f"{row:02}.txt").write_text("a picture")
    cache = open_or_build(open_source(str(folder)), plain.family, resolution=16, folder=tmp_path / "other")
    assert len(cache) == 20 and losers.dtype == torch.float32
    assert torch.equal(losers, cache.winners(range(20)).float())
    assert not torch.equal(losers, samples)


def test_without_the_key_nothing_goes_through_pixels(tiny, tmp_path, monkeypatch):
    trainer = started(tiny, tmp_path, round_trip=False)
    monkeypatch.setattr(trainer.denoiser, "through_pixels", lambda latents: pytest.fail("decoded"))
    noise, *prompts = trainer.method.rollout.maker.generation(
        [(0, sample) for sample in collected(trainer, 0).sample_ids]
    )
    made = [
        trainer.denoiser.sample(trainer.policy, trainer.sampler, noise[rows], prompts[0].take(rows), prompts[1])
        for rows in (slice(0, 4), slice(4, 6))
    ]
    trainer.method.rollout.waiting.clear()
    trainer.method.rollout.window = lambda update: range(1)
    assert torch.equal(collected(trainer, 0).losers, torch.cat(made))


def test_a_run_that_resumes_within_a_window_has_the_same_losers(tiny, tmp_path):
    sizes = {"sampler": {"batch": 5}, "reference": {"window": 2}}
    straight = started(tiny, tmp_path, **sizes)
    collected(straight, 0)
    assert torch.equal(collected(started(tiny, tmp_path, **sizes), 1).losers, collected(straight, 1).losers)


def test_clips_go_through_pixels_frame_by_frame(tiny, adapter):
    family = AnimateDiff.load(str(tiny), CPU, motion_adapter=str(adapter), frames=5)
    latents = torch.randn(3, *family.latent_shape(16), generator=torch.Generator().manual_seed(0))
    made = Denoiser(family, torch.float32).through_pixels(latents)
    assert made.shape == (3, 4, 5, 8, 8)
    for clip, own in zip(latents, made, strict=True):
        with torch.no_grad():
            pixels = family.pipe.vae.decode(clip.transpose(0, 1) / family.pipe.vae.config.scaling_factor).sample
            pixels = ((pixels.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
            encoded = family.pipe.vae.encode(pixels).latent_dist.mean * family.pipe.vae.config.scaling_factor
        torch.testing.assert_close(own.transpose(0, 1), encoded, rtol=1e-4, atol=1e-5)


def test_decoding_that_does_not_fit_halves_the_batch_and_parks_the_encoders(tiny, tmp_path, monkeypatch, capsys):
    expected = collected(started(tiny, tmp_path), 0).losers
    trainer = started(tiny, tmp_path, sampler={"batch": 6})
    decode, park, parked = trainer.family.decode, trainer.family.park_encoders, []

    def small_device(latents):
        if len(latents) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(latents)

    monkeypatch.setattr(trainer.family, "decode", small_device)
    monkeypatch.setattr(trainer.family, "park_encoders", lambda: parked.append(park()))
    torch.testing.assert_close(collected(trainer, 0).losers, expected, rtol=1e-3, atol=1e-3)
    assert "sampler.batch = 3" in capsys.readouterr().out
    assert len(parked) == 1 + len(trainer.method.rollout.window(0)) * 6 / 3


@pytest.mark.parametrize("part", ["sample", "encode_images"])
def test_what_is_not_finite_stops_the_run(tiny, tmp_path, monkeypatch, part):
    trainer = started(tiny, tmp_path)
    owner = trainer.denoiser if part == "sample" else trainer.family
    monkeypatch.setattr(owner, part, lambda *inputs: torch.full((4, 4, 8, 8), torch.nan))
    monkeypatch.setattr(trainer.family, "decode", lambda latents: np.zeros((len(latents), 16, 16, 3), np.uint8))
    with pytest.raises(NonFiniteError, match=r"sampler\.round_trip"):
        collected(trainer, 0)


def test_an_objective_without_samples_refuses_it(tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"set sampler\.round_trip = false"):
        tiny_config(tiny, tmp_path, objective="sft", sampler={"round_trip": True})
