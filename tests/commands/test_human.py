"""`seppo-fast human make` and `tally` as a user types them, and the page in a real browser."""

import json
import re
import time
from collections import Counter
from dataclasses import asdict

import numpy as np
import pytest
from PIL import Image

from seppo_fast.cli import main
from seppo_fast.evaluation.human.study import read_key
from seppo_fast.evaluation.scoring.score_files import ScorerInfo
from tests.helpers.browser import BROWSER, tab
from tests.helpers.hostile import ends
from tests.helpers.study import MODELS, answer_file, score_folder, side_of

PROMPTS = [f"a {colour} {shape}" for colour in ("red", "blue") for shape in ("ring", "star", "cube")]
BASE, TUNED = MODELS
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs chromium or google-chrome on the PATH")


@pytest.fixture
def folder(tmp_path):
    return score_folder(tmp_path / "scored", PROMPTS)


def make(folder, *words):
    assert main(["human", "make", str(folder), *words]) == 0
    return read_key(folder / "human" / "key.json")


def tally(folder, *words):
    assert main(["human", "tally", str(folder), "--key", str(folder / "human" / "key.json"), *words]) == 0


def careful(place, trial, question):
    """Prefers the tuned model's pictures, and passes every check."""
    return trial.good or side_of(trial, TUNED)


def test_make_says_what_to_send_and_what_to_keep(folder, capsys):
    study = make(folder, "--raters", "anna,ben", "--items", "5", "--questions", "overall,quality")
    said = capsys.readouterr().out.splitlines()
    assert said == [
        f"study {study.id}: {TUNED} against {BASE}, 5 items, 4 attention checks, 3 repeats, 2 questions, 2 raters",
        f"send to the raters: {folder / 'human' / 'for-raters'}",
        f"keep, and do not send: {folder / 'human' / 'key.json'}",
    ]
    assert sorted(path.name for path in (folder / "human").iterdir()) == ["for-raters", "key.json"]
    assert sorted(path.name for path in (folder / "human" / "for-raters").iterdir()) == ["index.html", "media"]


def test_make_takes_all_its_arguments(folder, tmp_path):
    words = ["--models", f"{TUNED},{BASE}", "--seed", "3", "--output", str(tmp_path / "new" / "study")]
    assert main(["human", "make", str(folder), *words]) == 0
    study = read_key(tmp_path / "new" / "study" / "key.json")
    assert study.models == (TUNED, BASE) and study.seed == 3 and list(study.raters) == ["rater-1", "rater-2", "rater-3"]


def test_tally_prints_results_with_and_without_exclusion(folder, capsys, tmp_path):
    """anna prefers the tuned model everywhere; ben always answers left and fails checks."""
    study = make(folder, "--raters", "anna,ben", "--questions", "overall")
    answer_file(folder, study, "anna", careful)
    answer_file(folder, study, "ben", lambda place, trial, question: "left")
    lines = ["id,prompt,sample,model,pickscore"]
    lines += [f"{index}-0,p,0,{model},{20 + (model == TUNED)}" for index in range(6) for model in MODELS]
    (folder / "scores.csv").write_text("\n".join(lines))
    capsys.readouterr()
    tally(folder, "--json", str(tmp_path / "human.json"))
    said = capsys.readouterr().out
    counts = Counter(trial.kind for trial in study.raters["ben"])
    total = sum(counts.values())
    assert f"study {study.id}: {TUNED} against {BASE}, 6 items, 2 raters\n" in said
    assert f"anna: {total} of {total} answers, 0 of 4 attention checks failed, {counts['repeat']} of " in said
    assert re.search(
        r"ben: .* 2 of 4 attention checks failed, 0 of \d repeats consistent, median 1.5 s; excluded\n", said
    )
    assert f"overall, all 2 raters: {TUNED} 9, about the same 0, {BASE} 3\n  win rate 0.750 (ties half), 95 % [" in said
    assert f"overall, without 1 excluded: {TUNED} 6, about the same 0, {BASE} 0\n" in said
    assert "of decisive votes 1.000 [0.610, 1.000] (Wilson), sign test over prompts p = 0.0312" in said
    assert "pickscore agrees with the majority (overall) on 6 of 6 items, 0 ties: 1.000 [0.610, 1.000]" in said
    found = json.loads((tmp_path / "human.json").read_text())
    assert found["study"] == study.id and found["models"] == list(MODELS)
    assert [rater["excluded"] for rater in found["raters"]] == [False, True]
    assert found["preferences"]["all"]["overall"]["wins"] == 9
    assert found["preferences"]["kept"]["overall"]["fleiss"] is None  # one rater is left
    assert found["scorers"]["overall"]["pickscore"]["agree"] == 6


def test_tally_reads_from_the_score_files_for_which_scorers_lower_is_better(folder, tmp_path, capsys):
    """The rater prefers the tuned model; `up` and `unknown` score it higher, `down` scores it lower."""
    study = make(folder, "--raters", "anna", "--questions", "overall")
    answer_file(folder, study, "anna", careful)
    lines = ["id,prompt,sample,model,up-1-float32,down-1-float32,unknown"]
    for index in range(6):
        lines += [f"{index}-0,p,0,{model},{better},{1 - better},{better}" for better, model in enumerate((BASE, TUNED))]
    (folder / "scores.csv").write_text("\n".join(lines))
    (folder / "scores").mkdir()
    for name in ("up", "down"):
        info = ScorerInfo(name, f"{name}-1-float32", "1", "digest", "float32", name == "up", 0)
        (folder / "scores" / f"{name}-float32.json").write_text(json.dumps(asdict(info)))
    capsys.readouterr()
    tally(folder, "--json", str(tmp_path / "human.json"))
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "human.json").read_text())["scorers"]["overall"]
    assert {name: row["agree"] for name, row in found.items()} == dict.fromkeys(found, 6) and len(found) == 3
    assert "unknown: " in said and said.count("does not say which direction is better; higher is assumed") == 1
    tree = asdict(info) | {"higher_is_better": True}
    (folder / "scores" / "down-float32.json").write_text(json.dumps(tree))
    tally(folder, "--json", str(tmp_path / "human.json"))
    found = json.loads((tmp_path / "human.json").read_text())["scorers"]["overall"]
    assert {name: row["agree"] for name, row in found.items()}["down-1-float32"] == 0
    (folder / "scores" / "down-float32.json").write_text(json.dumps(tree | {"higher_is_better": "no"}))
    assert "down-float32.json: malformed scores" in ends(
        capsys, 3, "human", "tally", folder, "--key", folder / "human" / "key.json"
    )


def test_tally_warns_of_a_preferred_side(folder, capsys):
    study = make(folder, "--raters", "anna,ben", "--questions", "overall")
    for rater in study.raters:
        answer_file(folder, study, rater, lambda place, trial, question: trial.good or "left")
    tally(folder)
    said = capsys.readouterr().out
    assert "  left side 1.000 [0.758, 1.000]\n  warning: raters prefer one side" in said
    # Every repeat is inconsistent, so both raters are excluded.
    assert "overall, without 2 excluded: no answers" in said


def test_tally_of_kept_raters_says_so(folder, capsys):
    study = make(folder, "--raters", "anna", "--questions", "overall")
    answer_file(folder, study, "anna", careful)
    tally(folder)
    said = capsys.readouterr().out
    assert "no rater is excluded" in said and "without" not in said


# Bad input


def test_bad_input_to_make(folder, tmp_path, capsys):
    assert "not an output folder of seppo-fast score" in ends(capsys, 2, "human", "make", tmp_path)
    assert "not an output folder" in ends(capsys, 2, "human", "make", tmp_path / "missing")
    assert "--items: expected 1 to 6" in ends(capsys, 2, "human", "make", folder, "--items", "7")
    assert "'tuned' is not in items.json" in ends(capsys, 2, "human", "make", folder, "--models", f"{BASE},tuned")
    assert "--questions" in ends(capsys, 2, "human", "make", folder, "--questions", "motion")
    assert "--raters" in ends(capsys, 2, "human", "make", folder, "--raters", "anna,anna")
    (folder / "items.json").write_text("{")
    assert "items.json: malformed" in ends(capsys, 3, "human", "make", folder)


@pytest.mark.parametrize("words", [["human"], ["human", "make"], ["human", "make", "x", "--items", "y"],
                                   ["human", "tally", "x"]])  # fmt: skip
def test_words_that_do_not_parse(words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2 and "usage: seppo-fast human" in capsys.readouterr().err


def test_bad_input_to_tally(folder, tmp_path, capsys):
    study = make(folder, "--raters", "anna,ben")
    key = folder / "human" / "key.json"
    assert "no answers-*.json" in ends(capsys, 2, "human", "tally", folder, "--key", key)
    assert "is missing; name the key.json" in ends(capsys, 2, "human", "tally", folder, "--key", tmp_path / "key.json")
    answer_file(folder, study, "anna", careful)
    other = score_folder(tmp_path / "other", PROMPTS[:5])
    make(other)
    message = ends(capsys, 3, "human", "tally", folder, "--key", other / "human" / "key.json")
    assert "answers-anna.json: belongs to study" in message
    message = ends(capsys, 6, "human", "tally", folder, "--key", key, "--json", tmp_path / "no" / "folder.json")
    assert "cannot be written" in message
    key.write_text(key.read_text().replace(TUNED, BASE, 1))
    assert "key.json: not a key" in ends(capsys, 3, "human", "tally", folder, "--key", key)


def test_tally_knows_for_which_metrics_lower_is_better(folder, tmp_path, capsys):
    """The rater prefers the tuned model, which has the higher SSIM and PSNR and the lower LPIPS."""
    study = make(folder, "--raters", "anna", "--questions", "overall")
    answer_file(folder, study, "anna", careful)
    lines = ["id,prompt,sample,model,ssim,psnr,lpips"]
    for index in range(6):
        lines += [f"{index}-0,p,0,{model},{up},{20 + up},{1 - up}" for up, model in enumerate((BASE, TUNED))]
    (folder / "scores.csv").write_text("\n".join(lines))
    capsys.readouterr()
    tally(folder, "--json", str(tmp_path / "human.json"))
    found = json.loads((tmp_path / "human.json").read_text())["scorers"]["overall"]
    assert {name: row["agree"] for name, row in found.items()} == {"ssim": 6, "psnr": 6, "lpips": 6}
    assert "higher is assumed" not in capsys.readouterr().out


# In a real browser


def answered(page, choose, study, rater):
    """Answers everything by keys as `choose` decides."""
    for place, trial in enumerate(study.raters[rater]):
        for question in study.questions:
            page.wait("ready")
            assert page.evaluate("[shown, study.questions[answers.length % perTrial].name]") == [place, question]
            page.press({"left": "1", "same": "2", "right": "3"}[choose(place, trial, question)])
    page.wait("!byId('finished').hidden")


def downloaded(folder):
    """Returns the content of the saved file, once the browser has written it."""
    end = time.monotonic() + 60
    while not (files := [file for file in folder.glob("answers-*.json") if file.read_text().endswith("\n")]):
        assert time.monotonic() < end, list(folder.iterdir())
    return files[0]


@needs_browser
@pytest.mark.parametrize("clips", [False, True])
def test_all_items_are_answered_and_saved_without_a_mouse(tmp_path, clips, capsys):
    folder = score_folder(tmp_path / "scored", PROMPTS[:4], clips=clips)
    study = make(folder, "--raters", "anna,ben", "--questions", "overall,alignment")
    page = folder / "human" / "for-raters" / "index.html"
    with tab(tmp_path, page.as_uri(), width=400) as browser:
        browser.press("Tab")
        browser.press("ArrowDown")
        browser.wait("byId('rater').value === 'ben'")
        browser.press("Tab")
        browser.press("Enter")
        answered(browser, careful, study, "ben")
        browser.press("u")
        browser.wait("ready && byId('finished').hidden")
        browser.press({"left": "1", "right": "3"}[careful(0, study.raters["ben"][-1], "alignment")])
        browser.wait("!byId('finished').hidden")
        assert browser.evaluate("document.documentElement.scrollWidth") <= 400
        browser.press("s")
        file = downloaded(tmp_path / "downloads")
        assert all(address.startswith(page.parent.as_uri()) for address in browser.requests if address[:4] != "blob")
        assert browser.messages == []
    assert file.name == "answers-ben.json"
    file.rename(folder / file.name)
    capsys.readouterr()
    tally(folder)
    said = capsys.readouterr().out
    assert f"overall, all 1 raters: {TUNED} 4, about the same 0, {BASE} 0\n" in said
    assert "0 of 4 attention checks failed" in said and "no rater is excluded" in said


@needs_browser
def test_undo_resume_and_saving_early(tmp_path, folder):
    study = make(folder, "--raters", "anna", "--questions", "overall,quality")
    page = (folder / "human" / "for-raters" / "index.html").as_uri()
    with tab(tmp_path, page) as browser:
        browser.evaluate("byId('start').click()")
        for key in ("1", "2", "3"):
            browser.wait("ready")
            browser.press(key)
        browser.press("u")
        assert browser.evaluate("answers.map((row) => row.slice(0, 3))") == [
            [0, "overall", "left"],
            [0, "quality", "same"],
        ]
        browser.press("Backspace")
        browser.wait("ready")
        assert browser.evaluate("shown") == 0
        browser.go(page)  # answers are kept
        browser.evaluate("byId('start').click()")
        browser.wait("ready")
        assert browser.evaluate("answers.length") == 1
        browser.evaluate("byId('answer-right').click()")
        browser.press("s")
        saved = json.loads(downloaded(tmp_path / "downloads").read_text())
    assert [row[:3] for row in saved["answers"]] == [[0, "overall", "left"], [0, "quality", "right"]]
    assert saved["study"] == study.id and saved["rater"] == "anna"
    assert all(0 <= row[3] < 60_000 for row in saved["answers"])


@needs_browser
def test_pictures_are_those_of_the_trial_with_the_prompt_as_text_and_zoom_alike(tmp_path, folder):
    study = make(folder, "--raters", "anna")
    with tab(tmp_path, (folder / "human" / "for-raters" / "index.html").as_uri()) as browser:
        browser.evaluate("byId('start').click()")
        browser.wait("ready")
        trial = study.raters["anna"][0]
        alts = browser.evaluate("[...document.querySelectorAll('.tile img')].map((image) => image.alt)")
        assert alts == [study.prompts[trial.item]] * 2
        browser.press("z")
        browser.press("z")
        browser.press("ArrowRight")
        matrices = browser.evaluate(
            "[...document.querySelectorAll('.zoom')].map((box) => [getComputedStyle(box).transform,"
            " getComputedStyle(box).transformOrigin])"
        )
        assert matrices[0] == matrices[1] and matrices[0][0] == "matrix(4, 0, 0, 4, 0, 0)"
        browser.press("z")
        browser.screenshot(tmp_path / "shot.png")
        boxes = browser.evaluate(
            "['left', 'right'].map((id) => { const b = byId(id).getBoundingClientRect();"
            " return [b.left, b.top, b.right, b.bottom]; })"
        )
    pixels = np.asarray(Image.open(tmp_path / "shot.png").convert("RGB")).astype(int)
    for shown, (left, top, right, bottom) in zip((trial.left, trial.right), boxes, strict=True):
        file = folder / "media" / {BASE: "0123456789abcdef-base", TUNED: "fedcba9876543210-tuned"}[shown.model]
        source = np.asarray(Image.open(file / f"{shown.item}.png")).astype(int)
        if not shown.noise:
            assert np.abs(pixels[round(top) + 3, round(left) + 3] - source[0, 0]).max() <= 3
            assert np.abs(pixels[round(bottom) - 4, round(right) - 4] - source[-1, -1]).max() <= 3


@needs_browser
def test_both_clips_show_the_same_frame(tmp_path):
    folder = score_folder(tmp_path / "scored", PROMPTS[:3], clips=True)
    make(folder, "--raters", "anna")
    place = "['--column', '--row'].map((name) => byId(id).style.getPropertyValue(name)).join()"
    frames = f"['left', 'right'].map((id) => {place})"
    with tab(tmp_path, (folder / "human" / "for-raters" / "index.html").as_uri()) as browser:
        browser.evaluate("byId('start').click()")
        browser.wait("ready")
        seen = set()
        for _ in range(10_000):
            left, right = browser.evaluate(frames)
            assert left == right
            seen.add(left)
            if len(seen) == 5:
                break
        assert seen == {"0,0", "1,0", "2,0", "0,1", "1,1"}
        browser.press("p")
        browser.wait("!playing")


@needs_browser
def test_a_missing_file_is_reported_and_cannot_be_answered(tmp_path, folder):
    make(folder, "--raters", "anna")
    out = folder / "human" / "for-raters"
    for file in (out / "media").iterdir():
        file.unlink()
    with tab(tmp_path, (out / "index.html").as_uri()) as browser:
        browser.evaluate("byId('start').click()")
        browser.wait("byId('said').textContent.includes('cannot be loaded')")
        browser.press("1")
        assert browser.evaluate("answers.length") == 0 and browser.evaluate("byId('answer-left').disabled")
