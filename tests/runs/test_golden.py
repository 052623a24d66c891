"""Later commits compute the same as the recorded commit, both from the beginning and from the states that it wrote.

Bit for bit if torch and the machine are those of the record. Elsewhere, with tolerances fixed before they were tried:
the numbers of the first update within 0.1 % (10 % in half precision), norms of weights and moments at the end within
2 %.
"""

import json

import pytest

from tests.golden.record import HERE, KEPT, RUNS, STATES, environment, make_inputs, put_back, run

RECORD = json.loads((HERE / "record.json").read_text(encoding="utf-8"))
EXACT = environment() == RECORD["environment"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    make_inputs(folder)
    return folder


def assert_alike(found, kept, name):
    """Asserts that a run computed what was recorded of it; its log entries may have keys that were added since."""
    assert len(found["log"]) == len(kept["log"])
    entries = zip(found["log"], kept["log"], strict=True)
    found = found | {"log": [{key: entry.get(key) for key in known} for entry, known in entries]}
    if EXACT:
        assert found == kept
        return
    near = {"rel": 0.1 if name == "bf16" else 1e-3, "abs": 1e-6}
    for key, value in kept["log"][0].items():
        assert found["log"][0][key] == pytest.approx(value, **near), key
    assert found["tensors"].keys() == kept["tensors"].keys() and found["pictures"].keys() == kept["pictures"].keys()
    for file, values in kept["tensors"].items():
        assert found["tensors"][file]["norm"] == pytest.approx(values["norm"], rel=2e-2), file


@pytest.mark.parametrize("name", RUNS)
def test_a_run_computes_what_it_did(ranks, inputs, name):
    assert_alike(run(name, inputs, ranks), RECORD["runs"][name], name)


@pytest.mark.parametrize("name", STATES)
def test_a_run_goes_on_from_the_state_that_is_kept(ranks, inputs, name):
    """Log and pictures start after the kept state."""
    other = inputs.with_name(f"{inputs.name}-{name}")
    other.mkdir()
    for part in inputs.iterdir():
        if part.name != "runs":
            (other / part.name).symlink_to(part)
    put_back(name, other)
    kept = RECORD["runs"][name]
    pictures = {file: values for file, values in kept["pictures"].items() if file > f"update-{KEPT:06d}.png"}
    assert_alike(run(name, other, ranks), kept | {"log": kept["log"][KEPT:], "pictures": pictures}, name)


def test_what_is_kept_is_small():
    assert sum(file.stat().st_size for file in HERE.rglob("*") if file.is_file() and file.suffix != ".pyc") < 2e6
