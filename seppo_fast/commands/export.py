"""`seppo-fast export RUN`: writes a run's trained weights in formats that other software loads.

The weights come from the newest intact saved state, so the run need not be finished: their moving average if the run
keeps one, else the raw weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from seppo_fast import __version__
from seppo_fast.config.load import to_yaml
from seppo_fast.config.schema import Config
from seppo_fast.evaluation.scores import Scores, ScoreTable, read_scores
from seppo_fast.models.family import Family
from seppo_fast.models.registry import family_of
from seppo_fast.models.trainable import lora_weights
from seppo_fast.runs.checkpoint import SavedState, newest_state
from seppo_fast.runs.folder import lacking
from seppo_fast.runs.resume import saved_config
from seppo_fast.runs.saver import on_cpu
from seppo_fast.runs.weights import load_trained
from seppo_fast.train.learner import applied_updates
from seppo_fast.utils.errors import CheckpointError, ConfigError
from seppo_fast.utils.files import free_name, staged_folder
from seppo_fast.utils.progress import progress

Format = Literal["diffusers", "lora", "comfyui"]
COMFYUI_FILE = "lora-comfyui.safetensors"
_MOVED = "If the base was moved, give its new place: --model PATH, --motion-adapter PATH"
_NOT_YET = "the run has no saved state yet; it saves one every save.minutes, and when it is interrupted or finished"
_STAGES = 5  # load the base, compare it with the run's, load the weights, write them, flush them to disk


def export(
    run: Path,
    form: Format | None = None,
    *,
    raw: bool = False,
    output: Path | None = None,
    model: dict[str, str] | None = None,
    report: Callable[[str], object] = print,
) -> Path:
    """Writes a run's weights and a model card into a new folder.

    Args:
        run: the run's folder.
        form: `diffusers`: a pipeline folder that `from_pretrained` loads, with any LoRA merged into the base; `lora`:
            a folder for `load_lora_weights`; `comfyui`: a LoRA with the key names of kohya's scripts. None: `diffusers`
            for a run that trained all weights, else `lora`.
        raw: whether to export the raw weights even if the run keeps their moving average.
        output: the folder to write, which must not exist; None: `export-FORMAT` in the run's folder.
        model: new values of `model.path` and `model.motion_adapter`, by the names `path` and `motion_adapter`, if the
            base was moved.
        report: receives lines for the user.

    Returns:
        The folder.

    Raises:
        ConfigError: the folder holds no run with a saved state; all updates were skipped; a LoRA is requested from a
            run that trained all weights; the model has no key names for ComfyUI; the base is missing or has changed;
            `output` exists; `scores.json` is malformed.
        CheckpointError: no saved state is intact, or the output cannot be written.
    """
    saved = newest_state(run)
    if saved is None:
        raise ConfigError(lacking(run, " with a saved state", _NOT_YET))
    if not applied_updates(saved.numbers):
        raise ConfigError(f"{run}: all of its {saved.update} updates were skipped, so there is nothing to export")
    config = saved_config(saved)
    config = config.model_copy(update={"model": config.model.model_copy(update=model or {})})
    lora = config.model.train == "lora"
    form = form or ("lora" if lora else "diffusers")
    if form != "diffusers" and not lora:
        raise ConfigError(f"{run}: all weights were trained, so there is no LoRA; use --format diffusers")
    family = family_of(config.model)
    if form == "comfyui" and not family.has_comfyui_names:
        raise ConfigError(f"{run}: ComfyUI has no key names for a LoRA of {family.__name__}; use --format lora")
    usual = run / f"export-{form}"
    folder = output or free_name(usual)
    if folder.exists():
        raise ConfigError(f"--output {folder}: already exists; choose another folder")
    if output is None and folder != usual:
        report(f"{usual} exists and is kept; this export is written to {folder}")
    scores = read_scores(run)
    with progress(_STAGES, "exported", "stages") as advance:
        trained, average = load_trained(config, saved, torch.device("cpu"), raw=raw, instead=_MOVED, loaded=advance)
        with staged_folder(folder, CheckpointError) as staging:
            _write(trained, config, form, staging)
            card = model_card(config, saved, form, average, scores)
            # The card quotes paths, which may contain bytes that are not UTF-8.
            (staging / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")
            (staging / "seppo_fast.yaml").write_text(to_yaml(config), encoding="utf-8")
            advance(1)
        advance(1)
    report(f"{form}, after update {saved.update}, {'moving average' if average else 'raw weights'}: {folder}")
    return folder


def _write(family: Family, config: Config, form: Format, folder: Path) -> None:
    if form == "lora":
        family.save_lora(folder, lora_weights(family.model))
    elif form == "comfyui":
        weights, metadata = family.comfyui_lora(lora_weights(family.model), config.model.lora_rank)
        save_file(on_cpu(weights), folder / COMFYUI_FILE, metadata=metadata)
    else:
        if config.model.train == "lora":
            family.merge_lora()
        family.save(folder)


def model_card(
    config: Config, saved: SavedState, form: Format, average: bool, scores: Scores | ScoreTable | None
) -> str:
    """Returns the README.md of an export: base, data, settings, seed, the run's scores, and limitations."""
    adapter = {"motion adapter": config.model.motion_adapter} if config.model.motion_adapter else {}
    lora = f"a LoRA of rank {config.model.lora_rank}"
    facts: dict[str, Any] = {
        "base": config.model.path,
        **adapter,
        "trained": "all weights of the network" if config.model.train == "full" else lora,
        "weights": "moving average" if average else "raw",
        "data": ("" if config.row.reward is None else "prompts of ")
        + f"{config.data.source}, {config.data.resolution} pixels"
        + (f", {config.data.frames} frames" if family_of(config.model).makes_clips else ""),
        "objective": config.objective + _beta(config),
        "updates": f"{saved.update} of {config.train.pairs_per_update} {config.row.unit}, "
        f"learning rate {config.learning_rate:g}",
        **reference_facts(config),
        "seed": config.seed,
        "fingerprints": json.dumps(saved.numbers.get("fingerprints", {})),
        "software": f"seppo_fast {__version__}",
    }  # fmt: skip
    rows = "\n".join(f"| {name} | {str(value).replace('|', '/')} |" for name, value in facts.items())
    method = config.row.source
    if "SePPO" in method:
        method += " (Semi-Policy Preference Optimization, arXiv 2410.05255)"
    source = "pictures" if config.row.reward is None else "reward"
    return (
        "---\nlibrary_name: diffusers\n"
        f"tags: [seppo_fast, {config.objective}{', lora' if form != 'diffusers' else ''}]\n"
        f"---\n\n# Fine-tuned with seppo_fast\n\nMethod: {method}.\n\n| | |\n|---|---|\n{rows}\n\n"
        f"Every setting: `seppo_fast.yaml`.\n\n{_measured(saved, average, scores)}\n\n"
        f"Limitations: it inherits the biases, the licence and the limits of its base and of the {source} that it "
        "learned from.\n"
    )


def _beta(config: Config) -> str:
    """Returns what the card says of beta; empty for an objective without one."""
    what = {
        "mapo": "weight of the margin",
        "step-preference": "times log-ratios of steps",
        "policy-gradient": None,
        "nft": None,
    }.get(config.row.loss, "times a mean over latent elements")
    return f", beta {config.train.beta:g} ({what})" if what else ""


def reference_facts(config: Config) -> dict[str, str]:
    """Returns the facts of a model card about past policies, their samples, and the scorer that judged these."""
    facts: dict[str, str] = {}
    pulled = config.rl.kl > 0 or config.row.loss == "step-preference"
    if config.row.draw == "initial" or config.row.replay or pulled:
        facts["reference"] = "the base"
    elif config.row.draw is not None and config.row.reward is None:
        facts["references"] = f"a new past policy every {config.train.updates_per_iteration} updates"
    sampler = f"{config.sampler.name}, {config.sampler.steps} steps, guidance {config.sampler.guidance:g}"
    if config.row.negatives == "generated":
        facts["sampler of the references"] = sampler
    if config.row.reward is not None:
        eta = f", eta {config.rl.eta:g}" if config.row.process == "reverse" else ""
        length, each = config.train.updates_per_iteration, config.samples_per_prompt
        facts["samples"] = f"its own, {each} per prompt, made anew every {length} updates; {sampler}{eta}"
    if config.scorer is not None:
        key, name, _ = config.scorer
        facts[key.rpartition(".")[2]] = f"{name}; scores by the same scorer are no evidence of quality"
    return facts


def _measured(saved: SavedState, average: bool, scores: Scores | ScoreTable | None) -> str:
    """Returns the run's scores, and a remark if they were measured on other weights than the exported ones."""
    if scores is None:
        return "Scores: no score was measured with this run."
    same = (scores.update, scores.average) == (saved.update, average)
    other = " They were measured on other weights of this run than the exported ones."
    return f"Scores: {scores}.{'' if same else other}"
