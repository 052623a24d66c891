"""README and docs/ against the repository: tables, links, commands, configuration keys, quoted code, length."""

import argparse
import inspect
import re
import runpy
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from diffusers import UNet2DConditionModel

from benchmarks.harness.counters import count_flops
from benchmarks.tables import fill, pages, tables
from seppo_fast import cli
from seppo_fast.config.overrides import configure
from seppo_fast.config.schema import ALIASES, Config, keys
from tests.helpers import drop_in

ROOT = Path(__file__).parents[2]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in pages()}
DOCS = [name for name in TEXTS if name.startswith("docs/")]


def fences(text: str, language: str) -> list[str]:
    return [body for kind, body in re.findall(r"```(\S*)\n(.*?)```", text, re.DOTALL) if kind == language]


# Length and tables


@pytest.mark.parametrize("page", TEXTS)
def test_a_page_is_short(page):
    """Generated tables count in the README alone: elsewhere they grow with every suite that is measured."""
    lines = TEXTS[page].splitlines()
    prose = re.sub(r"(<!-- ([a-z-]+) -->\n).*?(?=<!-- /\2 -->)", r"\1", TEXTS[page], flags=re.DOTALL).splitlines()
    assert len(lines) <= 180 if page == "README.md" else len(prose) <= 200
    long = [line for line in lines if len(line) > 120 and not (line.startswith("|") and page != "README.md")]
    assert long == []


@pytest.mark.parametrize("page", TEXTS)
def test_tables_are_those_of_the_committed_results(page):
    assert fill(TEXTS[page]) == TEXTS[page]


def test_every_table_is_on_a_page():
    shown = {name for text in TEXTS.values() for name in re.findall(r"<!-- ([a-z-]+) -->", text)}
    assert shown == set(tables())


# Links


def slug(heading: str) -> str:
    words = re.sub(r"[^\w\s-]", "", re.sub(r"[`*]", "", heading).lower())
    return words.strip().replace(" ", "-")


def links(page: str) -> list[str]:
    prose = re.sub(r"```.*?```", "", TEXTS[page], flags=re.DOTALL)
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", prose) if not link.startswith(("http:", "https:"))]


def target(page: str, link: str) -> str:
    return (ROOT / page).parent.joinpath(link.partition("#")[0]).resolve().relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page):
    for link in links(page):
        name, _, anchor = link.partition("#")
        file = target(page, link) if name else page
        assert (ROOT / file).exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", TEXTS[file], flags=re.DOTALL), re.MULTILINE)
            assert anchor in map(slug, headings), link


def test_every_page_is_two_clicks_from_the_readme():
    near = {target("README.md", link) for link in links("README.md")}
    near |= {target(page, link) for page in near & set(DOCS) for link in links(page) if link.partition("#")[0]}
    assert set(DOCS) <= near


# Commands


class Parsed(Exception):
    """The words of a command were accepted."""


def parse_program(words: list[str], monkeypatch) -> None:
    """Runs a module's `main` up to the parsing of its arguments."""
    original = argparse.ArgumentParser.parse_args

    def parse(parser, *arguments, **options):
        original(parser, *arguments, **options)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(Parsed):
        runpy.run_module(words[0], run_name="__main__")


def parse_seppo_fast(words: list[str]) -> None:
    arguments = cli._parser().parse_args(words)
    if arguments.command in ("train", "check") and "--help" not in words:
        recipe = "sd15.yaml" if arguments.config.startswith("my") else arguments.config
        configure(recipe, arguments.overrides)


def parse(command: str, monkeypatch) -> None:
    words = shlex.split(command, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)
    match words:
        case ["seppo-fast", *rest] | ["python", "-m", "seppo_fast", *rest]:
            parse_seppo_fast(rest)
        case ["python", "-m", "seppo_fast.train", *rest]:
            parse_seppo_fast(["train", *rest])
        case ["python", "-m", "pytest", path]:
            assert (ROOT / path).exists()
        case ["python", "-m", "benchmarks.tables"]:
            pass
        case ["python", "-m", module, *rest] if module.startswith("benchmarks."):
            parse_program([module, *rest], monkeypatch)
        case ["accelerate", "launch", *rest]:
            launched = launch_command_parser().parse_args(rest)
            assert launched.module and launched.training_script == "seppo_fast.train"
            parse_seppo_fast(["train", *launched.training_script_args])
        case ["make", *targets]:
            makefile = (ROOT / "Makefile").read_text()
            assert all("=" in name or re.search(rf"^{name}:", makefile, re.MULTILINE) for name in targets)
        case ["pip", "install", *rest]:
            extras = [extra for word in rest for extra in "".join(re.findall(r"\[(.*)\]", word)).split(",") if extra]
            setup = (ROOT / "setup.py").read_text()
            assert all(f'"{extra}":' in setup for extra in extras)
        case ["tensorboard" | "cd" | "git" | "export" | "hf", *_]:
            pass
        case _:
            raise AssertionError(f"a command that this test does not know: {command}")


COMMANDS = sorted(
    {
        (page, line.strip())
        for page, text in TEXTS.items()
        for body in fences(text, "bash")
        for line in body.replace("\\\n", " ").splitlines()
        if line.strip() and not line.strip().startswith("#")
    }
    | {
        (page, command)
        for page, text in TEXTS.items()
        for command in re.findall(r"`((?:seppo-fast|python -m benchmarks|accelerate launch|make) [^`\n]*)`", text)
        if not re.search(r"\b[A-Z]{3,}\b|\.\.\.|[|…]", command) and not re.fullmatch(r"seppo-fast [a-z]+", command)
    }
)


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_a_command_that_is_shown_parses(page, command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    parse(command, monkeypatch)


def test_commands_are_found():
    assert len(COMMANDS) > 60 and {page for page, _ in COMMANDS} >= {"README.md", "docs/training.md"}


@pytest.mark.parametrize(
    "command",
    ["seppo-fast train sd15.yaml --no-such-key 1", "python -m benchmarks.run --no-such 1", "make no-such", "bake demo"],
)
def test_a_command_that_does_not_parse_is_noticed(command, monkeypatch):
    with pytest.raises((AssertionError, SystemExit, Exception)) as caught:
        parse(command, monkeypatch)
    assert not isinstance(caught.value, Parsed)


# Configuration keys, packages, files


def test_every_configuration_key_is_documented_once():
    rows = re.findall(r"^\| `([\w.]+)` \|", TEXTS["docs/configuration.md"], re.MULTILINE)
    full = sorted(set(keys().values()))
    assert sorted(rows) == full
    assert all(f"`{alias}`" in TEXTS["docs/configuration.md"] for alias in ALIASES)
    assert "train.beta" in full and len(full) > 60 and Config.model_fields


def test_keys_named_in_prose_exist():
    known = set(keys().values())
    sections = {name for name, _, rest in (key.partition(".") for key in known) if rest}
    for page, text in TEXTS.items():
        for section, name in re.findall(r"`(?:--)?([a-z]+)\.([a-z_]+)(?:[ :=][^`]*)?`", text):
            if section in sections and name not in ("yaml", "json", "jsonl", "py", "safetensors"):
                assert f"{section}.{name}" in known, f"{page}: {section}.{name}"


def test_the_readme_lists_every_package():
    layout = TEXTS["README.md"].split("## Project layout")[1].split("##")[0]
    named = set(re.findall(r"`([\w.]+)`", layout))
    packages = {f"seppo_fast.{file.parent.name}" for file in ROOT.glob("seppo_fast/*/__init__.py")} - {
        "seppo_fast.kernels"
    }
    assert named == packages | {"seppo_fast", "kernels", "benchmarks", "tests", "docs"}


def test_every_file_of_the_tree_exists_and_none_is_missing():
    tree = TEXTS["docs/architecture.md"].split("## Files")[1].split("```")[1]
    named, folder = set(), ""
    for line in tree.splitlines():
        if match := re.match(r"(\s*)(\S+)", line):
            path = match[2]
            if not match[1]:
                folder = path if path.endswith("/") else ""
                named.add(path.rstrip("/"))
            else:
                named.add((folder + path).rstrip("/"))
    for path in named - {""}:
        assert (ROOT / path).exists(), path
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    modules = {file for file in listed if not file.startswith("tests/") and not file.endswith("__init__.py")}
    folders = {file.parent.relative_to(ROOT).as_posix() for file in ROOT.glob("[sb]*/*/__init__.py")}
    assert modules <= named | {file for file in modules if any(file.startswith(f"{name}/") for name in named & folders)}


# Quoted code and figures


def test_the_drop_in_diff_is_the_code_that_the_test_runs():
    (diff,) = fences(TEXTS["docs/loss.md"], "diff")
    before = [line[1:].strip() for line in diff.splitlines() if line.startswith("-")]
    after = [line[1:].strip() for line in diff.splitlines() if line.startswith("+")]
    source_before = [line.strip() for line in inspect.getsource(drop_in.seppo_before).splitlines()]
    source_after = [line.strip() for line in inspect.getsource(drop_in.seppo_after).splitlines()]
    assert before and after
    assert set(before) <= set(source_before)
    assert set(after) <= set(source_after)


def test_the_examples_of_extensions_are_those_that_tests_run():
    family, scorer = (
        (ROOT / "tests" / "helpers" / f"toy_{name}.py").read_text(encoding="utf-8") for name in ("family", "scorer")
    )
    blocks = [block for block in fences(TEXTS["docs/extending.md"], "python") if "import my_family" not in block]
    assert len(blocks) == 4 and all(block.strip("\n") in family for block in blocks[:3])
    assert blocks[3].strip("\n") in scorer and "import" in blocks[3]


@pytest.mark.parametrize("page", TEXTS)
def test_python_examples_are_valid(page):
    for block in fences(TEXTS[page], "python"):
        compile(textwrap.dedent(block), page, "exec")


def test_the_shares_of_a_pair_are_the_counted_ones():
    """A guided step takes two forwards, the reference's errors two, the policy two with backward."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, sample_size=64)
        inputs = torch.empty(1, 4, 64, 64), torch.empty(1, dtype=torch.int64), torch.empty(1, 77, 768)
        with torch.no_grad():
            forward = count_flops(lambda: unet(*inputs))
        policy = 2 * count_flops(lambda: unet(*inputs).sample.sum().backward())
    whole = {steps: 2 * steps * forward + 2 * forward + policy for steps in (20, 50)}
    sampling = [f"{2 * steps * forward / whole[steps]:.0%}".rstrip("%") for steps in (20, 50)]
    learning = [f"{policy / whole[steps]:.0%}".rstrip("%") for steps in (50, 20)]
    assert f"{' to '.join(sampling)} % of a pair is the sampling" in TEXTS["docs/performance.md"]
    assert f"{' to '.join(learning)} % the policy" in TEXTS["docs/performance.md"]
