"""The schema of the configuration, which is frozen; YAML files and command-line flags are two spellings of it.

Keys have at most two levels: `section.key`. The descriptions below are the table of docs/configuration.md and the text
of `seppo-fast train CONFIG --help`; the commented recipes in `seppo_fast/config/recipes/` are examples.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from seppo_fast.config.objectives import OBJECTIVES, Objective
from seppo_fast.config.rl import RlConfig
from seppo_fast.config.section import Section
from seppo_fast.config.vocabulary import AttentionChoice, Backend, KeepRule, LoraPlace, TemporalAttention

# Names used by the diffusers and Diffusion-DPO scripts, accepted at the top level of a YAML file and as flags.
ALIASES = {
    "pretrained_model_name_or_path": "model.path",
    "mixed_precision": "model.precision",
    "rank": "model.lora_rank",
    "dataset_name": "data.source",
    "train_data_dir": "data.source",
    "proportion_empty_prompts": "data.prompt_dropout",
    "output_dir": "output",
    "train_batch_size": "train.micro_batch",
    "max_train_steps": "train.updates",
    "lr_scheduler": "train.lr_schedule",
    "lr_warmup_steps": "train.warmup_updates",
    "adam_weight_decay": "train.weight_decay",
    "beta_dpo": "train.beta",
    "validation_prompts": "log.sample_prompts",
}


def _float32_by_its_other_name(value: Any) -> Any:
    """Maps 'no', the diffusers scripts' word for float32, to 'fp32'; YAML reads it as false."""
    return "fp32" if value in ("no", False) else value


class ModelConfig(Section):
    """The model, what of it is trained, and how it computes."""

    path: str = Field(
        "",
        description="pipeline to train: diffusers folder or hub id in the SD-1.5 format, or an embedded one: shapes, "
        "shapes-motion",
    )
    motion_adapter: str = Field(
        "",
        description="folder or hub id of a MotionAdapter, or the embedded one: shapes; if set, AnimateDiff is trained "
        "on clips; leave it empty if model.path is an AnimateDiffPipeline folder, which has its own motion modules",
    )
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] | None = Field(
        None,
        description="noise schedule: linear, scaled_linear or squaredcos_cap_v2; null: the pipeline's own, or linear "
        "with a motion adapter",
    )
    train: Literal["full", "lora"] = Field(
        "lora", description="what is trained: all weights of the network (full), or a LoRA on its attention (lora)"
    )
    lora_on: LoraPlace = Field(
        "both",
        description="attention layers that get the LoRA: those within frames (spatial), those of the motion modules "
        "(motion), or all (both); clips only",
    )
    lora_rank: int = Field(8, ge=1, description="rank of the LoRA; its alpha equals the rank")
    precision: Annotated[Literal["fp32", "bf16", "fp16"], BeforeValidator(_float32_by_its_other_name)] = Field(
        "bf16",
        description="compute dtype (autocast): fp32, bf16 or fp16; denoising errors are always reduced in float32",
    )
    gradient_checkpointing: bool | None = Field(
        None, description="recompute activations in the backward: less memory, slower; null: on if memory = low"
    )
    attention: AttentionChoice = Field(
        "auto",
        description="attention kernel of policy and reference: sdpa or xformers; auto: the one measured to be faster "
        "on a GPU, sdpa on a CPU",
    )
    temporal_attention: TemporalAttention = Field(
        "sdpa",
        description="attention over frames in the motion modules: as set by model.attention (sdpa), or the fused "
        "kernel (triton); clips only",
    )
    compile: bool | None = Field(
        None,
        description="torch.compile the network's repeated blocks; null: on with memory = fast on a GPU, if "
        "reference.errors = ahead",
    )
    deterministic: bool = Field(
        False,
        description="make a run repeat bit for bit on a GPU, as it always does on a CPU; the backward of attention and "
        "convolutions is slower, and xformers is excluded",
    )


class DataConfig(Section):
    """The data set, and how it is prepared."""

    source: str = Field(
        "",
        description="data set: folder, metadata.jsonl or csv, parquet file, tar shards or hub id; or N examples of an "
        "embedded world: shapes:N, shapes-made:N, shapes-motion:N; see docs/data.md",
    )
    split: str = Field("train", description="split of a hub data set")
    resolution: int = Field(
        512, ge=8, description="size in pixels: the shorter side is resized to it, then the centre is cropped"
    )
    frames: int = Field(16, ge=1, description="number of frames taken from each clip (clips only)")
    flip: bool = Field(
        False,
        description="mirror half of the clips, chosen by their ids; leave it off if captions say left or right (clips "
        "only)",
    )
    prompt_dropout: float = Field(0.2, ge=0, le=1, description="share of pairs trained with the empty prompt")
    cache: str = Field("cache", description="folder for the cache of latents and prompt embeddings")


class TrainConfig(Section):
    """The optimization and the loss."""

    updates: int = Field(210, ge=1, description="total number of optimizer updates")
    updates_per_iteration: int = Field(
        30, ge=1, description="updates per iteration; after each iteration a checkpoint joins the past policies"
    )
    pairs_per_update: int = Field(2048, ge=1, description="pairs per optimizer update, over all devices")
    micro_batch: int | None = Field(
        None,
        ge=1,
        description="pairs per forward on one device; gradients are accumulated over an update; null: what fits in "
        "memory",
    )
    learning_rate: float | None = Field(
        None, gt=0, description="learning rate of AdamW; null: 2e-6 for all weights, 5e-5 for a LoRA"
    )
    lr_schedule: Literal["constant", "cosine"] = Field(
        "constant",
        description="learning rate after the warm-up: constant, or cosine, which falls and would reach 0 one update "
        "after the last",
    )
    warmup_updates: int = Field(20, ge=0, description="number of updates of linear learning-rate warm-up")
    weight_decay: float = Field(1e-2, ge=0, description="weight decay of AdamW")
    max_grad_norm: float = Field(1.0, gt=0, description="global norm to which gradients are clipped")
    optimizer: Literal["adamw", "adamw8bit"] = Field(
        "adamw", description="optimizer: adamw, or adamw8bit, which needs bitsandbytes"
    )
    ema_decay: float = Field(
        0.0, ge=0, lt=1, description="decay of a moving average of the weights, which is then exported; 0: none"
    )
    beta: float = Field(
        2000.0,
        gt=0,
        description="strength of the pull towards the reference; multiplies a MEAN over latent elements, see "
        "docs/loss.md",
    )
    sft_weight: float = Field(
        0.0,
        ge=0,
        description="weight of plain fine-tuning: adds this times beta/4 times the winner's error to each pair's loss; "
        "0: as published",
    )
    safeguard: bool = Field(
        False, description="scale each loser's gradient so that, to first order, the winner's error still falls"
    )
    safeguard_mu: float = Field(
        0.9,
        ge=0,
        lt=1,
        description="with train.safeguard, share of the winner's own progress that the loser must leave intact, to "
        "first order",
    )
    share_noise: bool = Field(
        True, description="use the same noise for winner and loser; false: independent noise, as the paper writes it"
    )
    tie_tol: float = Field(
        0.0,
        ge=0,
        description="a pair is a tie if D_w (the policy's error on the winner minus the reference's) is at most this "
        "in absolute value; ties reject the loser",
    )
    backend: Backend = Field(
        "auto", description="implementation of the loss: triton or torch; auto: triton on CUDA if possible, else torch"
    )


class ReferenceConfig(Section):
    """Past policies and rollouts; which past policy is drawn is part of the objective."""

    redraw: Literal["iteration", "update"] = Field(
        "iteration", description="how often a past policy is drawn as reference: once per iteration or per update"
    )
    errors: Literal["ahead", "together", "apart"] = Field(
        "ahead",
        description="when the reference's errors are computed: during the rollout (ahead), in one forward with the "
        "policy (together; LoRA only), or in a forward of their own beside it (apart)",
    )
    uses: int = Field(
        1,
        ge=1,
        description="draws of (timestep, noise) per sample, each of which gives a pair; above 1, an update sees fewer "
        "different samples and winners",
    )
    window: int | None = Field(
        None,
        ge=1,
        description="updates rolled out at once, never beyond the next draw of a past policy; null: enough to fill the "
        "sampling batches",
    )
    park: bool | None = Field(
        None,
        description="move optimizer state and policy to host memory during a rollout; null: with memory = low, or if "
        "GPU memory is short",
    )
    keep: int | None = Field(
        None,
        ge=2,
        description="number of past policies kept, including the initial one; null: all (all SD-1.5 weights in bf16: "
        "1.6 GiB each)",
    )
    keep_rule: KeepRule = Field(
        "reservoir",
        description="which past policies stay with reference.keep: reservoir (each is as likely to be drawn as without "
        "a bound), newest, or spread (ages spaced as evenly as possible)",
    )
    gpu_gib: float | None = Field(
        None,
        ge=0,
        description="GiB of GPU memory for past policies; null: what those of the run need, at most 0.15 of what is "
        "free",
    )
    host_gib: float | None = Field(
        None,
        ge=0,
        description="GiB of host memory per machine for past policies that the GPU has no room for; null: half of what "
        "is free",
    )
    disk_gib: float | None = Field(
        None,
        ge=0,
        description="GiB of disk, in data.cache, for past policies that memory has no room for; null: nine tenths of "
        "what is free",
    )
    judge: str | None = Field(
        None,
        description="scorer that compares each sample with its winner, for objective seppo-judged: a name that "
        "`seppo-fast score` knows, or module:function",
    )
    judge_weights: str | None = Field(
        None, description="folder with a subfolder of weights per scorer; null: the hub cache"
    )
    pairs_gib: float | None = Field(
        None,
        ge=0,
        description="GiB of host memory per process for rolled-out samples; if they need more, they go to a file in "
        "data.cache; null: a quarter of what is free, divided by the number of processes",
    )


class SamplerConfig(Section):
    """How references generate samples."""

    name: Literal["ddim", "dpmsolver++"] = Field(
        "ddim",
        description="solver with which references sample: ddim, or dpmsolver++, which samples another distribution",
    )
    steps: int = Field(
        50, ge=1, description="solver steps per sample; timestep spacing and offset are the pipeline's own"
    )
    guidance: float = Field(7.5, ge=1, description="classifier-free guidance scale of samples; 1: off, half the work")
    batch: int | None = Field(
        None, ge=1, description="samples generated at once on one device; null: what fits in memory"
    )
    round_trip: bool = Field(
        False, description="decode samples to 8-bit pixels and encode them again; use it if a model made the winners"
    )


class RpoConfig(Section):
    """The blocks of objective diffusion-rpo."""

    block: int = Field(
        8,
        ge=1,
        description="pairs in a block, in which each winner is compared with every loser; part of the objective, "
        "unlike train.micro_batch, which must be a multiple of it; 1: Diffusion-DPO",
    )
    temperature: float = Field(
        0.1,
        gt=0,
        description="temperature of the weights by which a winner is compared with the losers of its block; the lower "
        "it is, the more only losers with nearly the same prompt count",
    )


class SaveConfig(Section):
    """The states from which a run can resume."""

    minutes: float = Field(10.0, ge=0, description="minutes between two saved states; 0: save after each update")
    keep: int = Field(
        2,
        ge=2,
        description="number of saved states kept; with all SD-1.5 weights trained each takes 10 GB, without past "
        "policies",
    )


class LogConfig(Section):
    """What a run logs and shows."""

    health_every: int = Field(
        10,
        ge=0,
        description="updates between two measurements of the winners' and the losers' gradient, each of which costs "
        "one more backward; 0: none",
    )
    sample_every: int = Field(30, ge=0, description="updates between two sample pictures; 0: none")
    sample_prompts: tuple[str, ...] = Field(
        (), description="prompts of the sample pictures; empty: the first four of the data"
    )
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = Field(
        (),
        description="trackers that get the numbers of log.jsonl too: tensorboard (in the run's folder), wandb (on its "
        "servers)",
    )


class EvaluationConfig(Section):
    """How the demos compare the base with the trained model after a run."""

    guidance: tuple[Annotated[float, Field(ge=1)], ...] = Field(
        (),
        description="guidance scales at which the demos compare base and aligned, the first one also in pictures; "
        "empty: sampler.guidance",
    )


class Config(Section):
    """The configuration of a run."""

    objective: str = Field("seppo", description="training objective, see docs/methods.md: " + ", ".join(OBJECTIVES))
    seed: int = Field(
        0,
        ge=0,
        description="seed of data order, timesteps, noise, prompt dropout, reference draws and LoRA initialization",
    )
    output: str = Field(
        "runs/seppo", description="folder of the run; rerun the same command to resume the run that is in it"
    )
    memory: Literal["low", "balanced", "fast"] = Field(
        "balanced",
        description="preset (low, balanced or fast) for batch sizes, reference.park, activation recomputation and "
        "compilation, where their own keys are null; see docs/performance.md",
    )
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    reference: ReferenceConfig = ReferenceConfig()
    rl: RlConfig = RlConfig()
    sampler: SamplerConfig = SamplerConfig()
    rpo: RpoConfig = RpoConfig()
    save: SaveConfig = SaveConfig()
    log: LogConfig = LogConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _known_objective(self) -> Config:
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective {self.objective!r} is unknown{did_you_mean(self.objective, OBJECTIVES)}")
        return self

    @property
    def row(self) -> Objective:
        """The objective's row in the table; the only place where an objective is looked up."""
        return OBJECTIVES[self.objective]

    @property
    def samples_per_prompt(self) -> int:
        """Samples of each prompt in an update; 1 for objectives without a reward."""
        return self.rl.samples_per_prompt or self.row.samples_per_prompt

    @property
    def prompts_per_update(self) -> int:
        """Different sample ids in an update, over all processes."""
        return self.train.pairs_per_update // self.reference.uses // self.samples_per_prompt

    @property
    def scorer(self) -> tuple[str, str, str | None] | None:
        """The key that names the scorer a run calls, the scorer, and its folder of weights; None without a scorer."""
        if self.rl.reward is not None:
            return "rl.reward", self.rl.reward, self.rl.reward_weights
        judge = self.reference.judge
        return None if judge is None else ("reference.judge", judge, self.reference.judge_weights)

    @property
    def block(self) -> int:
        """The number of consecutive pairs that a loss compares with each other; no micro-batch may split them."""
        return self.rpo.block if self.row.loss == "rpo" else 1

    @property
    def learning_rate(self) -> float:
        """The effective learning rate, with the default filled in."""
        default = 2e-6 if self.model.train == "full" else 5e-5
        return default if self.train.learning_rate is None else self.train.learning_rate


def keys() -> dict[str, str]:
    """Returns all spellings of all keys: `section.key`, the key alone if it is unique, and the aliases."""
    full = []
    for name, field in Config.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Section):
            full += [f"{name}.{key}" for key in section.model_fields]
        else:
            full.append(name)
    bare = [key.rpartition(".")[2] for key in full]
    spellings = {name: key for name, key in zip(bare, full, strict=True) if bare.count(name) == 1}
    return spellings | {key: key for key in full} | ALIASES


def closest(word: str, known: Iterable[str]) -> str | None:
    """Returns the known word that is most similar to an unknown one; None if none is similar.

    Args:
        word: the unknown word. If it has the form `section.key`, a known word may also be similar to its key alone, or
            have its initials (`train.learning_rate` for `train.lr`).
        known: the known words.
    """
    names, (section, dot, key) = list(known), word.rpartition(".")
    short = [name for name in names if dot and name.startswith(section) and _initials(name[len(section) + 1 :]) == key]
    if key in names or short:
        return key if key in names else short[0]
    likes = [name for name in names if "." in name] if dot else names
    close = difflib.get_close_matches(word, likes, n=1) or difflib.get_close_matches(key, names, n=1)
    return close[0] if close else None


def _initials(key: str) -> str:
    return "".join(part[:1] for part in key.split("_"))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns the end of a message about an unknown word: the most similar known one, or all known ones."""
    close = closest(word, known)
    return f", did you mean {close!r}?" if close else f"; known: {', '.join(sorted(known))}"
