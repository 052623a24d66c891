"""The scorer made of the embedded worlds' judges."""

import numpy as np
import pytest

from seppo_fast.scorers.scorer import Scorer
from seppo_fast.scorers.shapes import ShapesScorer
from seppo_fast.shapes import judge, motion, motion_judge, world


def test_the_scores_are_the_judges_of_either_world():
    scorer: Scorer = ShapesScorer()
    scenes = [world.scene(5, index) for index in range(4)]
    prompts = [world.caption(scene) for scene in scenes]
    pictures = np.stack([world.render(scene) for scene in scenes])
    moving = [motion.moving_scene(5, index) for index in range(3)]
    captions, clips = [motion.caption(scene) for scene in moving], np.stack([motion.render(scene) for scene in moving])
    for asked, shown, score_all in ((prompts, pictures, judge.score_all), (captions, clips, motion_judge.score_all)):
        swapped = asked[1:] + asked[:1]
        scores = scorer(asked, shown)
        assert scores.dtype == np.float64 and scores.tolist() == [1.0] * len(asked)
        assert np.array_equal(scorer(swapped, shown), score_all(swapped, shown)) and scorer(swapped, shown).min() < 1
    assert (scorer.name, scorer.higher_is_better) == ("shapes", True)
    assert len(scorer.digest) == 64 and scorer.digest == ShapesScorer().digest


@pytest.mark.parametrize("wrong", [np.zeros((2, 8, 8, 3), np.uint8), np.zeros((2, 32, 32, 3)), np.zeros((32, 32, 3))])
def test_other_pictures_are_refused(wrong):
    with pytest.raises(ValueError, match="must be uint8 of shape"):
        ShapesScorer()(["a red circle", "a red circle"], wrong)
