"""The configuration: YAML files, aliases, suggestions, and command-line flags, which share one schema."""

import numpy as np
import pytest
import yaml

from seppo_fast.config.load import RECIPES, parse_config, read_config, to_yaml
from seppo_fast.config.objectives import OBJECTIVES
from seppo_fast.config.overrides import configure
from seppo_fast.config.schema import Config
from seppo_fast.utils.errors import ConfigError


def write(tmp_path, text):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    return file


def test_yaml_scientific_notation_is_a_number(tmp_path):
    # YAML 1.1 reads 1e-8 as a string.
    assert yaml.safe_load("x: 1e-8")["x"] == "1e-8"
    assert read_config(write(tmp_path, "train: {learning_rate: 1e-8}")).learning_rate == 1e-8


def test_default_learning_rate_follows_what_is_trained():
    assert parse_config({"model": {"train": "full"}}).learning_rate == 2e-6
    assert parse_config({"model": {"train": "lora"}}).learning_rate == 5e-5


def test_resolved_config_reads_back(tmp_path):
    config = parse_config({"objective": "spin", "log": {"sample_prompts": ["a fox", "träume"]}})
    assert read_config(write(tmp_path, to_yaml(config))) == config


def test_config_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Config().train.__setattr__("beta", 1.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {learning_rat: 1}", "unknown key 'train.learning_rat', did you mean 'train.learning_rate'"),
        ("learnin_rate: 1", "did you mean 'learning_rate'"),
        ("modell: {path: x}", "unknown key 'modell'"),
        ("train: {beta: -1}", "train.beta = -1"),
        ("train: {beta: .nan}", "train.beta"),
        ("train: {updates: many}", "train.updates = 'many'"),
        ("objective: sepo", "did you mean 'seppo'"),
        ("train: 3", "section 'train' must be a mapping of keys"),
        ("train: {sft_weight: -1}", "train.sft_weight = -1"),
        ("train: {safeguard_mu: 1}", "train.safeguard_mu = 1"),
        ("train: {lr_schedule: linear}", "train.lr_schedule = 'linear'"),
        ("evaluation: {guidance: [3, 0.5]}", "evaluation.guidance.1 = 0.5"),
        ("log: {health_every: -1}", "log.health_every = -1"),
        ("- a\n- b", "expected a mapping"),
        ("a: [1", "cannot be read as YAML"),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    with pytest.raises(ConfigError, match="run.yaml") as error:
        read_config(write(tmp_path, text))
    assert message in str(error.value)


def test_aliases_of_the_diffusers_scripts():
    config = parse_config(
        {
            "pretrained_model_name_or_path": "a/b",
            "train_batch_size": 4,
            "beta_dpo": 5000,
            "learning_rate": "1e-6",
            "mixed_precision": "no",
            "max_train_steps": 7,
            "output_dir": "out",
            "data": {"source": "folder"},
        }
    )
    assert (config.model.path, config.train.micro_batch, config.train.beta) == ("a/b", 4, 5000)
    assert (config.learning_rate, config.model.precision, config.train.updates) == (1e-6, "fp32", 7)
    assert (config.output, config.data.source) == ("out", "folder")


def test_an_alias_beside_its_own_key_is_refused():
    with pytest.raises(ConfigError, match=r"'beta_dpo' is another name for train.beta"):
        parse_config({"train": {"beta": 1}, "beta_dpo": 2})
    with pytest.raises(ConfigError, match="also set"):
        parse_config({"beta_dpo": 2, "beta": 1})


def test_a_path_is_never_taken_for_a_recipe(tmp_path):
    assert read_config("demo.yaml").model.path == "shapes"
    with pytest.raises(ConfigError, match="does not exist"):
        read_config(tmp_path / "demo.yaml")


def test_missing_file_lists_the_recipes():
    with pytest.raises(ConfigError, match=r"demo.yaml, .*sd15.yaml"):
        read_config("nowhere.yaml")


@pytest.mark.parametrize("name", ["sd15-lra.yaml", "sd15-lora", "folder/sd15_lora.yml"])
def test_a_misspelt_recipe_has_a_suggestion_and_no_list(name):
    with pytest.raises(ConfigError) as error:
        read_config(name)
    assert str(error.value) == f"config {name!r} does not exist, did you mean the recipe 'sd15-lora.yaml'?"


def test_a_folder_of_pictures_as_the_recipe_is_offered_as_data(tmp_path):
    folder = tmp_path / "my pictures"
    folder.mkdir()
    with pytest.raises(ConfigError) as error:
        configure(str(folder), [])
    assert str(error.value).endswith(f"sd15-lora.yaml --data.source '{folder}'")


def test_command_line_overrides_the_file(tmp_path):
    file = write(tmp_path, "train: {beta: 10, updates: 3}")
    flags = [
        "--learning-rate",
        "1e-5",
        "--train.updates",
        "9",
        "--beta_dpo=20",
        "--seed",
        "3",
        "--mixed_precision",
        "no",
    ]
    flags += ["--model.gradient-checkpointing", "true", "--log.sample-prompts", "a fox", "two foxes"]
    config = configure(str(file), flags)
    assert (config.learning_rate, config.train.updates, config.train.beta, config.seed) == (1e-5, 9, 20, 3)
    assert config.model.gradient_checkpointing and config.model.precision == "fp32"
    assert config.log.sample_prompts == ("a fox", "two foxes")


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.name)
def test_recipes_are_valid_and_short(recipe):
    tree = yaml.safe_load(recipe.read_text())
    config = read_config(recipe)
    assert config.model.path and config.data.source
    keys = sum(len(value) if isinstance(value, dict) else 1 for value in tree.values())
    assert keys <= 25


def test_every_objective_has_a_recipe():
    assert {read_config(recipe).objective for recipe in RECIPES.glob("*.yaml")} == set(OBJECTIVES)


def test_a_mistake_has_the_same_message_in_the_file_and_as_a_flag(tmp_path):
    """Values out of range, of another type, and misspelt choices, in scalars and in lists."""
    for text, flags in (
        ("train: {learning_rate: -1}", ["--train.learning-rate", "-1"]),
        ("train: {updates: many}", ["--train.updates", "many"]),
        ("train: {lr_schedule: cosin}", ["--lr_scheduler=cosin"]),
        ("model: {precision: fp8}", ["--mixed_precision", "fp8"]),
        ("objective: sepo", ["--objective", "sepo"]),
        ("evaluation: {guidance: [3, 0.5]}", ["--evaluation.guidance", "3", "0.5"]),
        ("log: {trackers: [wandbb]}", ["--log.trackers", "wandbb"]),
    ):
        said = []
        for read in (read_config, lambda file, flags=flags: configure("demo.yaml", flags)):
            with pytest.raises(ConfigError) as error:
                read(write(tmp_path, text))
            said.append(str(error.value).partition(": "))
        assert (said[0][0].endswith("run.yaml"), said[1][0]) == (True, "command line")
        assert said[0][2] == said[1][2], text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--udpates", "3"], "unknown flag --udpates, did you mean --train.updates?"),
        (["--train.learning-rat", "3"], "unknown flag --train.learning-rat, did you mean --train.learning-rate?"),
        (["--train.lr", "-1"], "unknown flag --train.lr, did you mean --train.learning-rate?"),
        (["--train.objective", "sepo"], "unknown flag --train.objective, did you mean --objective?"),
        (["--zzzzzqqq", "3"], "unknown flag --zzzzzqqq; --help after the file's name lists all flags"),
        (["--seed", "3", "--train.updates"], "--train.updates needs a value"),
        (["--train.updates", "--seed", "3"], "--train.updates needs a value"),
        (["--data.source", "my", "pictures"], "--data.source takes one value, but got 2: my pictures; put quotes"),
        (["my_pictures"], "unexpected word 'my_pictures'; settings are written --section.key VALUE"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistaken_flags_are_named(flags, message):
    with pytest.raises(ConfigError) as error:
        configure("demo.yaml", flags)
    assert str(error.value).startswith(f"command line: {message}")


def test_text_is_taken_as_it_stands_and_other_values_as_yaml_reads_them():
    flags = ["--data.source", "2048", "--output=true", "--model.motion-adapter", "", "--log.sample-prompts", "1", "no"]
    config = configure("demo.yaml", [*flags, "--learning-rate", "1e-5", "--evaluation.guidance", "3", "2.5"])
    assert (config.data.source, config.output, config.model.motion_adapter) == ("2048", "true", "")
    assert (config.log.sample_prompts, config.learning_rate) == (("1", "no"), 1e-5)
    assert config.evaluation.guidance == (3.0, 2.5)
    assert configure("demo.yaml", ["--evaluation.guidance", "--seed", "1", "--seed", "2"]).evaluation.guidance == ()
    assert configure("demo.yaml", ["--seed", "1", "--seed", "2"]).seed == 2


def test_help_lists_every_flag_with_the_files_values(capsys):
    with pytest.raises(SystemExit) as ended:
        configure("demo.yaml", ["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0 and "--reference.pairs-gib" in said and "(default: 3e-05)" in said


def test_yamls_words_are_understood_as_flags():
    flags = ["--sampler.batch", "null", "--model.compile", "true", "--train.share-noise", "false"]
    config = configure("demo.yaml", flags)
    assert config.sampler.batch is None and config.model.compile is True and config.train.share_noise is False


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr_scheduler: cosine\ntrain: {updates: 5, warmup_updates: 5}", "updates = 5 must be more than"),
        ("objective: sft\ntrain: {safeguard: true}", "'sft' has no losers to scale: set train.safeguard = false"),
        ("objective: sft\ntrain: {sft_weight: 2}", "objective 'sft' has none: set train.sft_weight = 0"),
        ("objective: diffusion-dpo\nsampler: {round_trip: true}", "set sampler.round_trip = false"),
        ("objective: mapo", "train.beta = 2000: MaPO's beta is the weight of its margin"),
        (
            "objective: mapo\ntrain: {beta: 0.1, safeguard: true}",
            "without train.safeguard: set train.safeguard = false",
        ),
        ("objective: mapo\ntrain: {beta: 0.1, tie_tol: 1.0}", "without train.tie_tol: set train.tie_tol = 0.0"),
        (
            "objective: mapo\ntrain: {beta: 0.1}\nreference: {errors: apart}",
            "has no reference: remove reference.errors",
        ),
        ("objective: mapo\ntrain: {beta: 0.1}\nsampler: {round_trip: true}", "set sampler.round_trip = false"),
        ("objective: kto\ntrain: {sft_weight: 1}", "objective 'kto' has a loss of its own, without train.sft_weight"),
        ("objective: kto\nsampler: {round_trip: true}", "set sampler.round_trip = false"),
        ("rpo: {block: 4}", "rpo.block: objective 'seppo' does not compare blocks of pairs; remove it"),
        ("objective: kto\nrpo: {temperature: 1}", "rpo.temperature: objective 'kto' does not compare blocks of pairs"),
        (
            "objective: diffusion-rpo\nrpo: {block: 3}",
            "train.pairs_per_update = 2048 must be a multiple of rpo.block = 3",
        ),
        (
            "objective: diffusion-rpo\ntrain: {micro_batch: 12}",
            "train.micro_batch = 12 must be a multiple of rpo.block = 8",
        ),
        ("objective: diffusion-rpo\nreference: {uses: 2}", "objective 'diffusion-rpo' needs reference.uses = 1"),
        ("objective: diffusion-rpo\ntrain: {tie_tol: 1}", "has a loss of its own, without train.tie_tol"),
        ("train: {safeguard_mu: 0.5}", "train.safeguard_mu = 0.5 needs train.safeguard = true"),
    ],
)
def test_settings_that_do_not_go_together(tmp_path, text, message):
    with pytest.raises(ConfigError) as error:
        read_config(write(tmp_path, text))
    assert message in str(error.value)


def test_contradictions_are_refused_alike_from_file_and_flags(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("reference: {uses: 3}\ntrain: {pairs_per_update: 64}\n")
    said = []
    for read in (lambda: read_config(file), lambda: configure("demo.yaml", ["--reference.uses", "3"])):
        with pytest.raises(ConfigError, match="reference.uses = 3 must divide") as error:
            read()
        said.append(str(error.value))
    assert said[0].replace("64", "128") == said[1]


def test_numbers_of_numpy_are_numbers():
    tree = {
        "seed": np.int64(3),
        "train": {"beta": np.float32(50), "updates": np.int32(4), "share_noise": np.bool_(False)},
    }
    config = parse_config(tree)
    assert (config.seed, config.train.beta, config.train.updates, config.train.share_noise) == (3, 50.0, 4, False)
    assert "seed: 3" in to_yaml(config)
