"""Two processes over gloo, under `accelerate launch`: the same sample ids, the same training."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from seppo_fast.config.load import to_yaml
from seppo_fast.train.preflight import preflight
from seppo_fast.utils.errors import ConfigError
from tests.helpers.launch import launch
from tests.helpers.runs import log_of, tiny_config

# Runs the real trainer and records this rank's pairs by sample id: timestep, noise, loser and reference errors.
RECORDER = """
import json, sys
from seppo_fast.config.overrides import configure
from seppo_fast.train import train

taken = []

def observe(trainer, updates):
    if updates == 0:
        step = trainer.learner.step
        def recording(pairs, update):
            halves = [None, None] if pairs.ref_error is None else pairs.ref_error.chunk(2)
            taken.append({
                sample: [
                    pairs.times[row].item(),
                    pairs.noise[row].flatten().tolist(),
                    pairs.losers[row].flatten().tolist(),
                    [half[row].item() for half in halves if half is not None],
                ]
                for row, sample in enumerate(pairs.sample_ids)
            })
            return step(pairs, update)
        trainer.learner.step = recording
    rank, world = trainer.processes.accelerator.process_index, trainer.processes.accelerator.num_processes
    open(f"{sys.argv[2]}/rank{rank}of{world}.json", "w").write(json.dumps(taken))

train(configure(sys.argv[1], sys.argv[3:]), observe)
"""


@pytest.mark.parametrize(
    ("model", "errors"),
    [({}, "ahead"), ({"train": "lora"}, "together")],
    ids=["full", "lora together"],
)
def test_two_processes_train_as_one(tiny, tmp_path, model, errors):
    config = tiny_config(
        tiny, tmp_path, model=model, reference={"errors": errors},
        train={"beta": 100.0, "pairs_per_update": 7, "micro_batch": 2},
    )  # fmt: skip
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    (tmp_path / "record.py").write_text(RECORDER)
    for processes in (1, 2):
        done = launch(
            processes, tmp_path / "record.py", tmp_path / "run.yaml", tmp_path,
            "--output", tmp_path / f"world{processes}", folder=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]

    alone = json.loads((tmp_path / "rank0of1.json").read_text())
    ranks = [json.loads((tmp_path / f"rank{rank}of2.json").read_text()) for rank in range(2)]
    for update, pairs in enumerate(alone):
        of_rank = [rank[update] for rank in ranks]
        assert [len(taken) for taken in of_rank] == [4, 3]
        both = of_rank[0] | of_rank[1]
        assert set(both) == set(pairs)
        for sample, (timestep, noise, loser, errors_of_reference) in pairs.items():
            assert both[sample][:2] == [timestep, noise]
            # The first iteration samples from equal weights; later ones sample from weights that differ by rounding.
            tolerance = 1e-4 if update < 2 else 5e-2
            np.testing.assert_allclose(both[sample][2], loser, rtol=tolerance, atol=tolerance)
            np.testing.assert_allclose(both[sample][3], errors_of_reference, rtol=tolerance, atol=tolerance)

    logs = [log_of(config.model_copy(update={"output": str(tmp_path / f"world{world}")})) for world in (1, 2)]
    for one, two in zip(*logs, strict=True):
        for name in ("loss", "winner_error", "ref_winner_error", "loser_error", "grad_norm"):
            assert two[name] == pytest.approx(one[name], rel=5e-3), name
    assert logs[1][0]["aaf_rate"] == logs[0][0]["aaf_rate"] == 1
    one, two = (saved_weights(tmp_path / f"world{world}" / "weights") for world in (1, 2))
    start = saved_weights(Path(tiny))
    moved = torch.cat([(value - start.get(name, 0)).flatten() for name, value in one.items()])
    apart = torch.cat([(two[name] - value).flatten() for name, value in one.items()])
    # Adam's first step is the sign of a gradient that may be mere rounding, so single weights may differ, but not the
    # update as a whole.
    assert apart.norm() < 0.05 * moved.norm()


def saved_weights(folder):
    if (folder / "unet").is_dir():
        return UNet2DConditionModel.from_pretrained(folder, subfolder="unet").state_dict()
    from safetensors.torch import load_file

    return load_file(folder / "pytorch_lora_weights.safetensors")


def test_too_few_pairs_for_the_processes_are_refused(tiny, tmp_path):
    cpu = torch.device("cpu")
    with pytest.raises(ConfigError, match=r"samples per update \(6\).*processes \(8\)"):
        preflight(tiny_config(tiny, tmp_path), cpu, 8)
    with pytest.raises(ConfigError, match=r"samples per update \(5\).*processes \(8\)"):
        preflight(tiny_config(tiny, tmp_path, train={"pairs_per_update": 10}, reference={"uses": 2}), cpu, 8)
