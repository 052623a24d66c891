"""The pictures that the embedded pipeline made: the shipped file, how it was made, and its use as a data set."""

import hashlib

import numpy as np
import pytest
import torch

from benchmarks.shapes_world import make_pictures
from seppo_fast import shapes
from seppo_fast.config.load import read_config
from seppo_fast.data.cache.opening import open_or_build
from seppo_fast.data.media.images import load_image
from seppo_fast.data.sources import open_source
from seppo_fast.evaluation.judged import prompt_sets
from seppo_fast.models.registry import load_family
from seppo_fast.scorers.shapes import ShapesScorer
from seppo_fast.shapes import made
from seppo_fast.shapes.world import parse
from seppo_fast.train.preflight import preflight
from seppo_fast.train.trainer import Trainer
from seppo_fast.utils.errors import ConfigError, DataError
from tests.helpers.runs import collected, tiny_config

CPU = torch.device("cpu")
SHA256 = "f9909b1a2d79a9f4cfcc5ae4982b4b67ee68f035a7f50344036834067bb36985"


@pytest.fixture(scope="module")
def family():
    return load_family(read_config("demo.yaml"), CPU)


@pytest.fixture(scope="module")
def shipped():
    return made.load()


def test_what_ships(shipped):
    content = shapes.MADE.read_bytes()
    assert len(content) < 1.2 * 2**20
    assert hashlib.sha256(content).hexdigest() == SHA256
    assert len(set(shipped.prompts)) == made.COUNT == 1024
    assert all(parse(prompt) for prompt in shipped.prompts)
    for role in made.ROLES:
        assert shipped.latents[role].shape == (1024, 4, 8, 8) and shipped.latents[role].dtype == torch.float16
        assert shipped.latents[role].isfinite().all()
        assert ((shipped.scores[role] >= 0) & (shipped.scores[role] <= 1)).all()
    assert (shipped.scores["best"] >= shipped.scores["other"]).all()
    assert (shipped.latents["best"] != shipped.latents["other"]).flatten(1).any(1).all()


def test_no_prompt_is_among_those_that_results_are_judged_on(shipped):
    development, report = prompt_sets(open_source("shapes-made:1024"))
    assert not {*development, *report} & set(shipped.prompts)
    # The judged prompts are the same for any number of winners.
    assert prompt_sets(open_source("shapes-made:1")) == (development, report)


def test_pictures_are_the_familys_and_scores_the_judges(shipped, family):
    """Decoded independently of the data set; on another machine a pixel may round differently, rarely a score."""
    for role in made.ROLES:
        pictures = family.decode(shipped.latents[role][:192].float())
        own = np.stack([made.picture(role, index) for index in range(192)])
        assert own.dtype == np.uint8
        assert (own == pictures).mean() > 0.999 and abs(own.astype(int) - pictures).max() <= 1
        scores = ShapesScorer()(shipped.prompts[:192], own)
        assert (abs(scores - shipped.scores[role][:192]) < 1e-6).mean() > 0.98


def test_the_script_makes_what_ships(shipped, family):
    prompts = make_pictures.prompts_apart(1024)
    assert tuple(prompts) == shipped.prompts
    latents = make_pictures.make_latents(read_config("demo.yaml"), family, prompts[:8]).float()
    assert latents.shape == (8, 4, 4, 8, 8)
    pictures = family.decode(latents.flatten(0, 1))
    scores = ShapesScorer()([prompt for prompt in prompts[:8] for _ in range(4)], pictures).reshape(8, 4)
    for role, takes in zip(made.ROLES, make_pictures.choose(scores), strict=True):
        rows = range(8)
        np.testing.assert_allclose(scores[rows, takes], shipped.scores[role][:8], atol=1e-6)
        torch.testing.assert_close(latents[rows, takes], shipped.latents[role][:8].float(), atol=2e-2, rtol=2e-2)


def test_the_choice_is_the_best_and_any_other():
    scores = np.tile([[0.2, 1.0, 0.4, 1.0], [0.5, 0.5, 0.5, 0.5]], (2000, 1))
    best, other = make_pictures.choose(scores)
    assert (best != other).all() and set(best[::2]) == {1, 3}
    # Ties are broken at random, and the other picture is any of the rest, all with equal probability.
    np.testing.assert_allclose(np.bincount(best[::2], minlength=4) / 2000, [0, 0.5, 0, 0.5], atol=0.05)
    np.testing.assert_allclose(np.bincount(best[1::2]) / 2000, 0.25, atol=0.05)
    np.testing.assert_allclose(np.bincount(other[::2]) / 2000, [1 / 3, 1 / 6, 1 / 3, 1 / 6], atol=0.05)
    assert np.array_equal(make_pictures.choose(scores[:10]), np.stack([best, other])[:, :10])


def test_winners_alone_and_labelled_pairs(shipped):
    source = open_source("shapes-made:100")
    wins = shipped.scores["best"][:100] > shipped.scores["other"][:100]
    assert len(source) == 100 and not source.has_losers and source.ties == 0 and not source.notes
    assert [example.prompt for example in source] == list(shipped.prompts[:100])
    assert [example.loser is not None for example in source] == wins.tolist()
    pairs = source.labelled()
    assert pairs.has_losers and len(pairs) == wins.sum() and pairs.ties == 100 - wins.sum() > 0
    assert pairs.notes == [f"{pairs.ties} of 100 pairs are ties and are not used"]
    assert [example.id for example in pairs] == [f"shapes-made-{row}" for row in np.flatnonzero(wins)]
    for example in [*source, *pairs][::20]:
        row = int(example.id.rpartition("-")[2])
        np.testing.assert_array_equal(load_image(example.image, 32), made.picture("best", row))
        assert example.prompt == shipped.prompts[row]
        if example.loser is not None:
            np.testing.assert_array_equal(load_image(example.loser, 32), made.picture("other", row))


def test_pictures_at_random_are_a_quarter_of_the_time_the_best():
    source = open_source("shapes-made:1024:random")
    assert len(source) == 1024 and source.labelled() is source
    assert not source.has_losers and all(example.loser is None for example in source)
    taken = [example.image.name.rpartition(" ")[2] for example in source]
    assert taken.count("best") / 1024 == pytest.approx(0.25, abs=0.05) and set(taken) == set(made.ROLES)
    few = open_source("shapes-made:7:random")
    assert [example.image.name for example in few] == [example.image.name for example in source][:7]
    row = taken.index("other")
    np.testing.assert_array_equal(load_image(source[row].image, 32), made.picture("other", row))


def test_digests_tell_sources_apart():
    specs = ("shapes-made:20", "shapes-made:21", "shapes-made:20:random")
    sources = [open_source(spec) for spec in specs]
    assert len({source.digest() for source in [*sources, sources[0].labelled()]}) == 4
    assert open_source(specs[0]).digest() == sources[0].digest()


@pytest.mark.parametrize("count", ["", "many", "-3", "4:5", "4:best", "4:random:1", "4:"])
def test_what_is_no_number_of_prompts(count):
    with pytest.raises(DataError, match=r"expected shapes-made:N or shapes-made:N:random .* such as shapes-made:1024"):
        open_source(f"shapes-made:{count}")


@pytest.mark.parametrize("count", [0, 1025, 10**9])
def test_more_prompts_than_ship_or_none(count):
    with pytest.raises(DataError, match=rf"shapes-made:{count}: N must be from 1 to 1024"):
        open_source(f"shapes-made:{count}")


def test_the_cache_encodes_the_pictures(family, tmp_path):
    source = open_source("shapes-made:12").labelled()
    cache = open_or_build(source, family, resolution=32, folder=tmp_path)
    losers = torch.from_numpy(np.stack([load_image(example.loser, 32) for example in source]))
    torch.testing.assert_close(cache.losers(range(len(source))), family.encode_images(losers), rtol=1e-4, atol=1e-4)


def test_pairs_train_where_the_objective_needs_them(tiny, tmp_path):
    config = tiny_config(tiny, tmp_path, objective="diffusion-dpo", data={"source": "shapes-made:20"})
    trainer = Trainer(config)
    trainer.add_checkpoint()
    pairs = collected(trainer, 0)
    assert len(trainer.cache) == len(open_source("shapes-made:20").labelled()) < 20
    rows = trainer.method.rollout.maker.examples(pairs.sample_ids)
    assert torch.equal(pairs.losers, trainer.cache.losers(rows).float())
    winners = tiny_config(tiny, tmp_path / "winners", data={"source": "shapes-made:20"})
    assert len(preflight(winners, CPU, 1)) == 20
    control = tiny_config(tiny, tmp_path, objective="diffusion-dpo", data={"source": "shapes-made:20:random"})
    with pytest.raises(ConfigError, match="needs two images per prompt"):
        preflight(control, CPU, 1)


def test_the_recipe_trains_on_them():
    config = read_config("pick-a-pic-toy.yaml")
    assert config.sampler.round_trip and config.evaluation.guidance == (3.0, 1.5)
    assert len(open_source(config.data.source)) == 1024
