"""The settings of objectives that learn from a reward."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from seppo_fast.config.section import Section


class RlConfig(Section):
    """Rewards, and what is learned from them; for ddpo, grpo, nft, d3po and spo."""

    reward: str | None = Field(
        None,
        description="scorer whose score is the reward: a name that `seppo-fast score` knows, or module:function",
    )
    reward_weights: str | None = Field(
        None, description="folder with a subfolder of weights per scorer; null: the hub cache"
    )
    samples_per_prompt: int | None = Field(
        None,
        ge=1,
        description="samples of each prompt in an update, the group whose rewards are compared; null: 8 for grpo and "
        "nft, 2 for d3po, else 1",
    )
    spread: Literal["batch", "group"] = Field(
        "batch",
        description="standard deviation that advantages are divided by: of all rewards of an iteration (batch) or of "
        "the prompt's own (group); grpo and nft",
    )
    prompt_buffer: int = Field(
        16, ge=1, description="latest rewards kept per prompt, from which ddpo takes mean and standard deviation"
    )
    prompt_count: int = Field(
        16, ge=1, description="rewards that a prompt needs for statistics of its own; before, those of all are used"
    )
    eta: float = Field(1.0, gt=0, le=1, description="noise of the sampler's random steps, as a share of DDPM's")
    steps: float = Field(
        1.0, gt=0, le=1, description="share of a sample's random steps that is trained, drawn per sample; ddpo and grpo"
    )
    window: tuple[int, int] | None = Field(
        None,
        description="first and last solver step, counted from 1, that are random and trained; the others are "
        "deterministic; null: all; grpo",
    )
    clip: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="range of the ratio to the old policy, 1 - clip to 1 + clip; null: 1e-4 * sqrt(16384 / N) for "
        "latents of N numbers (ddpo, grpo), 0.1 (d3po, spo)",
    )
    kl: float = Field(0.0, ge=0, description="strength of the pull to the initial policy; grpo and nft")
    mix: float = Field(1.0, gt=0, description="beta of DiffusionNFT, the step from the old to the implicit policies")
    candidates: int = Field(4, ge=2, description="next latents among which spo compares, at each step")
    plain_steps: int = Field(4, ge=0, description="first solver steps of spo without candidates")
    gap: float = Field(
        0.619,
        ge=0,
        description="spo: best and worst candidate become a pair if their scores differ by more than this; 0.619 is "
        "the published threshold of 0.3 for scores like PickScore's",
    )
