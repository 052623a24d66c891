"""One frozen configuration. YAML files and the command line are two spellings of it.

Two levels: `section.key`. The commented recipes in `seppo_fast/config/recipes/` are its documentation for users; the
descriptions below are what `seppo-fast train CONFIG --help` prints.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from seppo_fast.config.objectives import OBJECTIVES, Objective
from seppo_fast.config.vocabulary import AttentionChoice, Backend, KeepRule, LoraPlace, TemporalAttention

# Names that the diffusers and Diffusion-DPO scripts use, accepted at the top level of a YAML file and as flags.
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


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_numpy(cls, values: Any) -> Any:
        """Numbers of numpy as Python's."""
        if not isinstance(values, dict):
            return values
        return {name: value.item() if isinstance(value, np.generic) else value for name, value in values.items()}


def _float32_by_its_other_name(value: Any) -> Any:
    """The diffusers scripts call float32 'no', which YAML reads as false."""
    return "fp32" if value in ("no", False) else value


class ModelConfig(_Section):
    """What is trained."""

    path: str = Field(
        "", description="diffusers folder or hub id in the SD-1.5 format, or embedded: shapes, shapes-motion"
    )
    motion_adapter: str = Field(
        "",
        description="folder or hub id of a MotionAdapter, or 'shapes': with one, AnimateDiff is trained on clips; "
        "empty too where model.path is the folder of an AnimateDiffPipeline, which has its own",
    )
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] | None = Field(
        None, description="of the noise; null: the pipeline's own, or linear with a motion adapter"
    )
    train: Literal["full", "lora"] = Field("lora", description="all weights of the network, or a LoRA on its attention")
    lora_on: LoraPlace = Field(
        "both", description="which attention gets the LoRA: within frames, in motion modules, all (clips only)"
    )
    lora_rank: int = Field(8, ge=1, description="rank of the LoRA; its alpha equals it")
    precision: Annotated[Literal["fp32", "bf16", "fp16"], BeforeValidator(_float32_by_its_other_name)] = Field(
        "bf16", description="compute dtype (autocast); errors are reduced in float32 always"
    )
    gradient_checkpointing: bool | None = Field(
        None, description="recompute activations: less memory, slower; null: with memory = low"
    )
    attention: AttentionChoice = Field(
        "auto", description="of policy and reference alike; auto: the faster on a GPU, by measurement; sdpa on a CPU"
    )
    temporal_attention: TemporalAttention = Field(
        "sdpa", description="of the motion modules: as the rest, or the fused kernel (clips only)"
    )
    compile: bool | None = Field(
        None, description="torch.compile of the repeated blocks; null: with memory = fast, on a GPU"
    )
    deterministic: bool = Field(
        False,
        description="repeat a run bit for bit on a GPU too (on a CPU it always does): slower backward of attention and "
        "convolutions, no xformers",
    )


class DataConfig(_Section):
    """Where winners come from."""

    source: str = Field(
        "", description="folder, parquet, tar shards, hub id, or of the embedded world shapes:N, shapes-made:N"
    )
    split: str = Field("train", description="split of a hub data set")
    resolution: int = Field(512, ge=8, description="pixels; the shorter side is resized to it, then a centre crop")
    frames: int = Field(16, ge=1, description="of a clip (clips only)")
    flip: bool = Field(
        False, description="mirror half of the clips, by their ids; not where captions say left or right (clips only)"
    )
    prompt_dropout: float = Field(0.2, ge=0, le=1, description="share of pairs trained with the empty prompt")
    cache: str = Field("cache", description="folder of the latent and prompt cache")


class TrainConfig(_Section):
    """How it is trained."""

    updates: int = Field(210, ge=1, description="optimizer updates in all")
    updates_per_iteration: int = Field(30, ge=1, description="updates between two checkpoints added as references")
    pairs_per_update: int = Field(2048, ge=1, description="pairs in one optimizer update, over all devices")
    micro_batch: int | None = Field(
        None, ge=1, description="pairs in one forward on one device, the rest is accumulated; null: what fits in memory"
    )
    learning_rate: float | None = Field(None, gt=0, description="AdamW; null: 2e-6 for full weights, 5e-5 for LoRA")
    lr_schedule: Literal["constant", "cosine"] = Field(
        "constant",
        description="of the learning rate after the warm-up; cosine: falls, to reach 0 one update after the last",
    )
    warmup_updates: int = Field(20, ge=0, description="linear warm-up of the learning rate")
    weight_decay: float = Field(1e-2, ge=0, description="AdamW")
    max_grad_norm: float = Field(1.0, gt=0, description="gradient clipping, global norm")
    optimizer: Literal["adamw", "adamw8bit"] = Field("adamw", description="adamw8bit needs bitsandbytes")
    ema_decay: float = Field(0.0, ge=0, lt=1, description="moving average of the weights for export; 0: off")
    beta: float = Field(2000.0, gt=0, description="multiplies a MEAN over latent elements; see README on conventions")
    sft_weight: float = Field(
        0.0, ge=0, description="adds this times beta/4 times the winner's error to each pair's loss; 0: as published"
    )
    safeguard: bool = Field(
        False, description="scale each loser's gradient so that to first order the winner's error falls all the same"
    )
    safeguard_mu: float = Field(
        0.9, ge=0, lt=1, description="share of the winner's own progress that the loser leaves it, with safeguard"
    )
    share_noise: bool = Field(True, description="one noise for both halves of a pair; false: independent (as written)")
    tie_tol: float = Field(0.0, ge=0, description="|D_w| up to this counts as a tie, and ties reject")
    backend: Backend = Field("auto", description="of the loss; auto: triton on CUDA")


class ReferenceConfig(_Section):
    """Past policies; which of them is drawn belongs to the objective."""

    redraw: Literal["iteration", "update"] = Field("iteration", description="how often a reference is drawn")
    errors: Literal["ahead", "together", "apart"] = Field(
        "ahead", description="the reference's errors: made ahead, in one forward with the policy (LoRA), or in two"
    )
    uses: int = Field(
        1, ge=1, description="draws of (timestep, noise) that a sample serves; above 1 changes the distribution"
    )
    window: int | None = Field(
        None,
        ge=1,
        description="updates rolled out at once; null: enough to fill sampling batches, up to the next draw",
    )
    park: bool | None = Field(
        None, description="optimizer and policy wait in host memory during a rollout; null: where memory is short"
    )
    keep: int | None = Field(
        None,
        ge=2,
        description="past policies kept, the initial one among them; null: all (all weights in bf16: 1.6 GiB each)",
    )
    keep_rule: KeepRule = Field(
        "reservoir", description="with keep: by reservoir each past policy is as likely to be drawn as without a bound"
    )
    gpu_gib: float | None = Field(
        None, ge=0, description="GPU memory for past policies; null: all of the run, up to 0.15 of what is free"
    )
    host_gib: float | None = Field(
        None, ge=0, description="host memory of a machine for those beyond; null: half of what is free"
    )
    disk_gib: float | None = Field(
        None, ge=0, description="disk, in data.cache, for those beyond; null: nine tenths of what is free"
    )
    pairs_gib: float | None = Field(
        None, ge=0, description="host memory for samples that wait, the rest on disk; null: a quarter of what is free"
    )


class SamplerConfig(_Section):
    """How references generate their samples."""

    name: Literal["ddim", "dpmsolver++"] = Field("ddim", description="dpmsolver++ changes the distribution")
    steps: int = Field(50, ge=1, description="solver steps; spacing and offset are the pipeline's own")
    guidance: float = Field(7.5, ge=1, description="classifier-free guidance; 1: none, half the work")
    batch: int | None = Field(None, ge=1, description="samples generated at once; null: what fits in memory")
    round_trip: bool = Field(
        False, description="decode samples to 8-bit pixels and encode them again: for winners that a model made"
    )


class SaveConfig(_Section):
    """What a run can go on from."""

    minutes: float = Field(10.0, ge=0, description="between two saved states; 0: one after each update")
    keep: int = Field(
        2, ge=2, description="saved states that stay; of all SD-1.5 weights 10 GB each, without past policies"
    )


class LogConfig(_Section):
    """What a run shows."""

    health_every: int = Field(
        10,
        ge=0,
        description="updates between two measurements of both halves' gradients, one more backward each; 0: none",
    )
    sample_every: int = Field(30, ge=0, description="updates between two pictures of samples; 0: none")
    sample_prompts: tuple[str, ...] = Field(
        (), description="prompts of those pictures; empty: the first four of the data"
    )
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = Field(
        (), description="where numbers go beside log.jsonl: tensorboard (in the run's folder), wandb (to its servers)"
    )


class EvaluationConfig(_Section):
    """How base and aligned are compared after a run."""

    guidance: tuple[Annotated[float, Field(ge=1)], ...] = Field(
        (), description="guidance scales to judge at, the first of them in pictures; empty: the sampler's"
    )


class Config(_Section):
    """A whole run."""

    objective: str = Field("seppo", description="a row of the table of objectives: " + ", ".join(OBJECTIVES))
    seed: int = Field(0, ge=0, description="of order, timesteps, noise, prompt dropout, references and LoRA init")
    output: str = Field("runs/seppo", description="folder of the run; the same command goes on with what is in it")
    memory: Literal["low", "balanced", "fast"] = Field(
        "balanced", description="one dial for batches, checkpointing and compilation; each can still be set by itself"
    )
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    reference: ReferenceConfig = ReferenceConfig()
    sampler: SamplerConfig = SamplerConfig()
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
        """The row of the table of objectives; the only look-up of an objective by its name."""
        return OBJECTIVES[self.objective]

    @property
    def learning_rate(self) -> float:
        """The learning rate in force."""
        default = 2e-6 if self.model.train == "full" else 5e-5
        return default if self.train.learning_rate is None else self.train.learning_rate


def keys() -> dict[str, str]:
    """Every spelling of every key: `section.key`, the bare key where it is unique, and the aliases."""
    full = []
    for name, field in Config.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, _Section):
            full += [f"{name}.{key}" for key in section.model_fields]
        else:
            full.append(name)
    bare = [key.rpartition(".")[2] for key in full]
    spellings = {name: key for name, key in zip(bare, full, strict=True) if bare.count(name) == 1}
    return spellings | {key: key for key in full} | ALIASES


def did_you_mean(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1) or difflib.get_close_matches(
        word.rpartition(".")[2], list(known), n=1
    )
    return f", did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known))}"
