"""A scorer from outside the package, selected as `tests.helpers.toy_scorer:named_color`."""

import numpy as np

COLORS = {"red": 0, "green": 1, "blue": 2}


def named_color(prompts, pictures):
    """Returns by how much the color that a prompt names exceeds the two others, averaged over the picture or clip."""
    scores = np.full(len(prompts), np.nan)
    for row, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True)):
        channels = [COLORS[word] for word in prompt.lower().split() if word in COLORS]
        if channels:
            means = picture.reshape(-1, 3).mean(axis=0) / 255
            scores[row] = 1.5 * means[channels[0]] - means.sum() / 2
    return scores
