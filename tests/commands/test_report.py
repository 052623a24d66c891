"""The HTML report of a run: what it shows, that nothing in it is active, and how it looks in a real browser."""

import base64
import html
import io
import json
import math
import os
import re
import shutil
import subprocess
import tracemalloc
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from seppo_fast.cli import main
from seppo_fast.commands.curves import curve
from seppo_fast.commands.report import report
from seppo_fast.evaluation.grids import side_by_side
from seppo_fast.evaluation.scores import Scores
from seppo_fast.evaluation.statistics import PairedDifference
from seppo_fast.runs.signals import Interrupted
from seppo_fast.train import train
from seppo_fast.utils.errors import ConfigError
from tests.helpers.runs import tiny_config

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
HOSTILE = "</pre></title><script>alert(1)</script><img src=x onerror=alert(2)> \" ' & <svg/onload=alert(3)>"


class Page(HTMLParser):
    """Parses a page: its tags with their attributes, and the text inside each kind of tag."""

    def __init__(self, file):
        super().__init__()
        self.tags, self.text, self._open = [], {}, []
        self.feed(Path(file).read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "line", "path"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        if self._open and self._open[-1] == tag:
            self._open.pop()

    def handle_data(self, data):
        for tag in set(self._open):
            self.text[tag] = self.text.get(tag, "") + data

    def images(self):
        found = [attrs for tag, attrs in self.tags if tag == "img"]
        codes = [attrs["src"].removeprefix("data:image/webp;base64,") for attrs in found]
        opened = [Image.open(io.BytesIO(base64.b64decode(code, validate=True))) for code in codes]
        return dict(zip([attrs["alt"] for attrs in found], opened, strict=True))


def points_of(drawn):
    """Returns the points of the first line of a curve."""
    path = re.search(r'<g class="line">\s*<path d="([^"]+)"', drawn)[1]
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] ([\d.]+) ([\d.]+)", path)]


def entry(number, **more):
    known = {
        "update": number, "loss": 0.69, "winner_error": 0.13, "ref_winner_error": 0.13, "loser_error": 0.2,
        "ref_loser_error": 0.2, "aaf_rate": 0.5, "margin": 0.0, "grad_norm": 1.0, "skipped": 0.0, "seconds": 30.0,
        "pairs_per_second": 4.0, "memory_gib": 2.0, "save_stall_seconds": 0.0,
    }  # fmt: skip
    return known | more


def run_folder(folder, log, settings="train:\n  updates: 40\n  pairs_per_update: 8\n", tail=""):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log) + tail)
    (folder / "config.yaml").write_text(settings, encoding="utf-8")
    return folder


def picture(folder, update, size=(516, 152), colour=(200, 30, 30)):
    (folder / "samples").mkdir(exist_ok=True)
    image = Image.new("RGB", size, "white")
    image.paste(colour, (260 + (size[0] - 260) // 2, 24, *size))
    image.save(folder / "samples" / f"update-{update:06d}.png")


def test_rewards_have_curves_and_their_warnings(tmp_path):
    """The ratios of every second update are clipped at one step; the others are each the first of an iteration."""
    log = [
        {"update": n, "loss": 0.0, "grad_norm": 1.0, "seconds": 3.0, "reward_mean": 0.4 + n / 100, "reward_std": 0.3,
         "kept": 0.9, "unscored": 0.0, "clipped": 0.1 * (n % 2 == 0), "clipped_step7": 0.8 * (n % 2 == 0)}
        for n in range(1, 21)
    ]  # fmt: skip
    page = Page(report(run_folder(tmp_path, log)))
    assert "Reward" in page.text["h2"] and "0.6 (last)" in page.text["td"]
    assert "reward of the iteration's samples, mean" in page.text["figcaption"]
    assert "all steps" in page.text["figcaption"] and "the step with most" in page.text["figcaption"]
    assert "zero" not in page.text["figcaption"] and "KL" not in page.text["figcaption"]
    html = (tmp_path / "report.html").read_text()
    assert "are clipped at one of the sampler's steps".replace("'", "&#x27;") in html
    assert "<code>rl.window</code>" in html and html.count('class="spell"') == 1


def test_nothing_that_a_user_wrote_is_live(tmp_path):
    folder = tmp_path / "<script>alert(4)<" / "b onclick=alert(5)>"
    run = run_folder(folder, [entry(1), entry(2, loss=HOSTILE)], json.dumps({"log": {"sample_prompts": [HOSTILE]}}))
    (run / "samples").mkdir()
    (run / "samples" / 'update-"><script>.png').write_bytes(b"<script>alert(6)</script>")
    Scores(HOSTILE, 2, False, PairedDifference(0.5, 0.6, 0.100, 0.0, 0.2, 10)).write(run)
    page = Page(report(run))
    allowed = {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "table", "tr", "td", "div", "figure",
        "figcaption", "strong", "span", "svg", "g", "line", "path", "text", "pre",
    }  # fmt: skip
    assert {tag for tag, _ in page.tags} <= allowed
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on") or name in ("href", "src")]
    assert page.text["pre"] == (run / "config.yaml").read_text()
    assert page.text["title"] == f"{folder.name} - seppo_fast"
    assert HOSTILE in page.text["td"] and 'update-"><script>.png cannot be shown' in page.text["p"]


def test_a_run_that_is_not_finished_by_the_command_line(tiny, tmp_path, capsys):
    config = tiny_config(tiny, tmp_path, log={"sample_every": 1, "sample_prompts": ["a fox", "<b>bold</b>"]})

    def stop(trainer, updates):
        if updates == 2:
            raise Interrupted("enough")

    with pytest.raises(Interrupted):
        train(config, stop)
    run = Path(config.output)
    assert main(["report", str(run)]) == 0
    assert f"report: {run / 'report.html'}" in capsys.readouterr().out
    page = Page(run / "report.html")
    assert "2 of 3" in page.text["td"] and "none" in page.text["td"] and "pairs/s" in page.text["td"]
    assert "<b>bold</b>" in page.text["pre"]
    shown = page.images()
    assert list(shown) == ["prompts and base", "update-000001", "update-000002"]
    first = Image.open(run / "samples" / "update-000001.png")
    assert shown["prompts and base"].size == (260 + 128, first.height)
    for name, part in {"prompts and base": (0, 388), "update-000001": (388, 516)}.items():
        made = np.asarray(shown[name].convert("RGB"), dtype=float)
        wanted = np.asarray(first.crop((part[0], 0, part[1], first.height)), dtype=float)
        assert np.abs(made - wanted).mean() < 6
    train(config)  # a report in its folder does not prevent a run from resuming


def test_odd_logs(tmp_path):
    lonely = Page(report(run_folder(tmp_path / "one", [entry(1)])))
    assert (
        len([tag for tag, attrs in lonely.tags if attrs.get("class") == "line"]) == 11
        and "1 of 40" in lonely.text["td"]
    )
    assert "no pictures" in lonely.text["p"]
    empty = Page(report(run_folder(tmp_path / "empty", [])))
    assert "0 of 40" in empty.text["td"] and "no update has finished yet" in empty.text["p"]
    broken = run_folder(tmp_path / "broken", [entry(1), entry(2)], settings="train: [", tail='{"update": 3, "lo')
    assert "updates2" in Page(report(broken)).text["table"]
    (broken / "config.yaml").unlink()
    assert "no config.yaml" in Page(report(broken)).text["p"]
    nothing = [{"update": number, "loss": None} for number in (1, 2)]
    assert "winner error" not in Page(report(run_folder(tmp_path / "nothing", nothing))).text.get("strong", "")


def test_values_that_are_not_finite_are_gaps_and_their_updates_marked(tmp_path):
    broken = {"loss": None, "grad_norm": math.nan, "skipped": 1.0}
    log = [entry(number, **(broken if number in (4, 5) else {})) for number in range(1, 9)]
    file = report(run_folder(tmp_path / "run", log))
    page = Page(file)
    assert "2: 4, 5; samples in skipped.jsonl" in page.text["td"]
    assert sum(attrs.get("class") == "skipped" for _, attrs in page.tags) == 2
    figures = file.read_text().split("<figure")
    (loss,) = [figure for figure in figures if "<strong>loss</strong>" in figure]
    assert loss.count('<g class="line">') == 2
    assert "nan" not in file.read_text().lower()


def test_the_warning_stands_where_the_policy_stayed_worse(tmp_path):
    worse = [entry(number, winner_error=0.14) for number in range(1, 31)]
    file = report(run_folder(tmp_path / "worse", worse))
    page = Page(file)
    assert "updates 5 to 30, shaded below" in page.text["p"]
    assert "<code>train.learning_rate</code>" in file.read_text()
    assert sum(attrs.get("class") == "warning" for _, attrs in page.tags) == 1
    assert sum(attrs.get("class") == "spell" for _, attrs in page.tags) == 2
    sft = [{name: value for name, value in line.items() if not name.startswith("ref_")} for line in worse]
    assert 'class="warning"' not in report(run_folder(tmp_path / "sft", sft)).read_text()


def test_each_warning_shades_its_own_curve(tmp_path):
    ill = {"winner_error": 0.2, "logit_abs": 2.0, "preference_loss": 0.5, "loss": 0.5}
    log = [entry(1), *(entry(number, grad_norm=20.0, **ill) for number in range(2, 13))]
    file = report(run_folder(tmp_path / "run", log))
    assert sum(attrs.get("class") == "warning" for _, attrs in Page(file).tags) == 4
    shaded = [figure for figure in file.read_text().split("<figure") if 'class="spell"' in figure]
    titles = [html.unescape(re.search("<strong>(.*?)</strong>", figure)[1]) for figure in shaded]
    assert titles == [
        "loss", "winner error", "winner error minus the reference's", "|logit|", "gradient norm, before clipping",
    ]  # fmt: skip
    healthy = [entry(number, logit_abs=0.1) for number in range(1, 13)]
    assert 'class="warning"' not in report(run_folder(tmp_path / "healthy", healthy)).read_text()


def health(number, mean, deviation=1e-3, pairs=16.0):
    bands = {f"{name}_band{band}": band / 10 for name in ("winner_difference", "logit_abs", "aaf_rate")
             for band in (1, 2, 3, 4)}  # fmt: skip
    measured = {"winner_grad_norm": 1.0, "loser_grad_norm": 2.0, "grad_cosine": -0.5} if number % 10 == 1 else {}
    untied = {"untied_pairs": pairs, "untied_difference": mean, "untied_difference_sd": deviation}
    return entry(number, **(untied if pairs else {"untied_pairs": 0.0}), **bands, **measured)


def test_bands_and_halves_are_drawn(tmp_path):
    file = report(run_folder(tmp_path / "run", [health(number, 1e-3) for number in range(1, 32)]))
    text = file.read_text()
    figures = {re.search("<strong>(.*?)</strong>", figure)[1]: figure for figure in text.split("<figure")[1:]}
    for title in ("winner error minus the reference&#x27;s, by timestep", "|logit|, by timestep"):
        assert figures[title].count('<g class="line">') == 4
        assert all(f"var(--{name})" in figures[title] for name in ("first", "second", "third", "fourth"))
        assert all(f'class="line-{line}"' in figures[title] for line in range(4))
    assert figures["gradient norms of both"].count('<g class="line">') == 2  # one line over the measured updates
    assert len(points_of(figures["cosine between them"])) == 4
    plain = report(run_folder(tmp_path / "plain", [entry(1), entry(2)])).read_text()
    assert "By timestep" not in plain and "of losers" not in plain


ITERATIONS = "train:\n  updates: 40\n  pairs_per_update: 16\n  updates_per_iteration: 5\n"


def test_iterations_at_chance_are_noted(tmp_path):
    """An iteration has 80 pairs of which 64 are untied, so the standard error is 1.25e-4."""
    means = {1: 0.0, 2: 1e-3, 3: 2e-4, 4: -2e-4, 5: 2.7e-4}  # by iteration
    log = [
        health(number, means[(number - 1) // 5 + 1], pairs=0.0 if number % 5 == 1 else 16.0) for number in range(1, 26)
    ]
    page = Page(report(run_folder(tmp_path / "half", log, ITERATIONS)))
    assert "near chance" not in page.text["p"]  # two of four are no majority
    page = Page(report(run_folder(tmp_path / "most", log[:20], ITERATIONS)))
    assert "In 2 of 3 iterations after the first (iterations 3, 4)" in page.text["p"]
    assert "benchmarks.anchor" in page.text["code"]
    unknown = Page(report(run_folder(tmp_path / "unknown", log[:20])))
    assert "near chance" not in unknown.text["p"]
    broken = [line | {"untied_difference": None} if line["update"] > 10 else line for line in log[:20]]
    assert "near chance" not in Page(report(run_folder(tmp_path / "broken", broken, ITERATIONS))).text["p"]


def test_points_lie_where_the_axis_says():
    values = [0.0, 1.0, 4.0, 2.0, 2.0]
    drawn = curve("loss", [1, 2, 3, 4, 5], {"loss": values})
    points = points_of(drawn)
    labels = re.findall(r'text-anchor: (\w+)[^>]* x="([\d.]+)" y="([\d.]+)"[^>]*>([\d.]+)<', drawn)
    heights = {float(text): float(y) for anchor, _, y, text in labels if anchor == "end"}
    places = {float(text): float(x) for anchor, x, _, text in labels if anchor == "middle"}
    assert [places[number] for number in range(1, 6)] == [x for x, _ in points]
    assert len(heights) >= 3 and {0, 3} <= set(heights)
    # The labels' middles are a constant below their line.
    unit = (heights[0] - heights[3]) / 3
    zero = points[0][1]
    assert [zero - y for _, y in points] == pytest.approx([value * unit for value in values], abs=0.01)
    assert abs(zero - heights[0]) < 5


def test_long_runs_are_thinned_by_means():
    drawn = curve("loss", list(range(1, 6001)), {"loss": [float(number % 4) for number in range(6000)]})
    points = points_of(drawn)
    assert len(points) == 1500 and len({y for _, y in points}) == 1


def test_a_value_between_gaps_is_seen_and_two_lines_have_keys():
    drawn = curve("error", [1, 2, 3], {"<a>": [1.0, None, 2.0], "b": [1.0, 2.0, 3.0]})
    lines = re.findall(r'<g class="line">\s*<path d="([^"]+)"\s*style="([^"]+)"', drawn)
    assert len(lines) == 3 and all("stroke-linecap: round" in style for _, style in lines[:2])
    assert "&lt;a&gt;" in drawn and "<a>" not in drawn
    assert not re.search(r"(href|id|clip-path)=", drawn) and "var(--first)" in drawn and "var(--second)" in drawn


def test_a_few_pictures_the_first_and_the_last_among_them_make_a_small_page(tmp_path):
    run = run_folder(tmp_path / "run", [entry(1)])
    updates = range(999990, 1000010)  # from the middle on, names have one more digit
    for update in updates:
        picture(run, update, size=(5000, 1000), colour=(update % 100, 0, 0))
    (run / "samples" / "notes.txt").write_text("not a picture")
    file = report(run)
    assert list(Page(file).images()) == [
        "prompts and base", *(f"update-{updates[place]}" for place in (0, 4, 8, 11, 15, 19)),
    ]  # fmt: skip
    assert file.stat().st_size < 2**20
    assert max(image.width for image in Page(file).images().values()) <= 1600


def test_clips_show_their_frames(tmp_path):
    run = run_folder(tmp_path / "run", [entry(1)])
    (run / "samples").mkdir()
    clips = np.zeros((2, 8, 16, 16, 3), np.uint8)
    side_by_side(["a", "b"], {"base": clips, "update 1": clips}).save(run / "samples" / "update-000001.png")
    assert [image.width for image in Page(report(run)).images().values()] == [260 + 8 * 128, 8 * 128]


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (None, "log.jsonl cannot be read"),
        ("none/x.html", "cannot be written"),
        ("run/log.jsonl/x.html", "cannot be written"),
        ("run/" + "x" * 254, "cannot be written"),
        ("/", "name the file to write"),
    ],
    ids=["run", "output", "below a file", "long name", "no name"],
)
def test_mistakes_are_said(tmp_path, capsys, output, said):
    run = tmp_path / "run"
    run.mkdir()
    words = ["report", str(run)]
    if output:
        run_folder(run, [entry(1)])
        words += ["--output", str(tmp_path / output)]
    before = sorted(tmp_path.rglob("*"))
    assert main(words) == 2
    assert said in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_scores_stand_in_the_summary_and_broken_ones_are_named(tmp_path, capsys):
    run = run_folder(tmp_path / "run", [entry(1)])
    Scores("judge", 1, True, PairedDifference(0.814, 0.829, 0.015, 0.002, 0.028, 1200)).write(run)
    assert "+0.015 [+0.002, +0.028] (95 %, 1200 pairs)" in Page(report(run)).text["td"]
    good = (run / "scores.json").read_text()
    changes = {"0.814": "NaN", "0.829": "9" * 400, "1200": "Infinity", '"judge"': json.dumps("x" * 100_000)}
    for broken in (
        "[]",
        "{",
        '{"what": "judge"}',
        "[" * 60_000,
        *(good.replace(*change) for change in changes.items()),
    ):
        (run / "scores.json").write_text(broken)
        assert main(["report", str(run)]) == 2
        assert "scores.json: malformed scores" in capsys.readouterr().err


def test_numbers_that_are_too_large_are_gaps_and_end_the_log(tmp_path):
    huge = 10**400
    broken = {"loss": huge, "winner_error": huge, "seconds": huge, "grad_norm": -1e200, "margin": 1.7e308}
    log = [entry(number, **(broken if number == 25 else {"margin": -1.7e308})) for number in range(1, 41)]
    text = report(run_folder(tmp_path / "values", log)).read_text()
    (loss,) = [figure for figure in text.split("<figure") if "<strong>loss</strong>" in figure]
    assert loss.count('<g class="line">') == 2 and "<strong>margin</strong>" not in text
    assert "40 of 40" in text and "19 m 30 s" in text
    for number in (huge, -1):
        ended = report(run_folder(tmp_path / "updates", [entry(1), entry(2), entry(number), entry(4)]))
        assert "2 of 40" in Page(ended).text["td"]


def laughs():
    lines = ["a0: &a0 [lol]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 7)]
    return "\n".join([*lines, "train: {updates: *a6, pairs_per_update: 8}"])


ODD_SETTINGS = {
    "no date": "x: 2024-99-99",
    "aliases": laughs(),
    "a huge number": f"train: {{pairs_per_update: 8, updates: 0x{'f' * 5000}}}",
    "a list": "train: {pairs_per_update: 8, updates: [40]}",
    "no section": "train: 3",
    "a tag": "train: {updates: !!int ''}",
    "deep": "[" * 600,
    "long": "train: {updates: 40, pairs_per_update: 8}\n" + "# x\n" * 20_000,
}


@pytest.mark.parametrize("settings", ODD_SETTINGS.values(), ids=ODD_SETTINGS)
def test_odd_settings_take_nothing_from_the_page(tmp_path, settings):
    run = run_folder(tmp_path / "run", [entry(1), entry(2)], settings=settings)
    report(run)  # warms up imports and caches
    tracemalloc.start()
    page = Page(report(run))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6
    assert "updates2" in page.text["table"]
    if len(settings) > 2**16:
        assert "no config.yaml that can be read and has at most 65536 bytes" in page.text["p"]
    else:
        assert page.text["pre"] == settings


def test_what_is_no_file_is_not_waited_for(tmp_path, capsys):
    run = run_folder(tmp_path / "run", [entry(1)])
    (run / "samples").mkdir()
    for name in ("config.yaml", "samples/update-000001.png"):
        (run / name).unlink(missing_ok=True)
        os.mkfifo(run / name)
    page = Page(report(run))
    assert "no config.yaml" in page.text["p"] and "update-000001.png cannot be shown: " in page.text["p"]
    for name in ("scores.json", "log.jsonl"):
        (run / name).unlink(missing_ok=True)
        os.mkfifo(run / name)
        assert main(["report", str(run)]) == 2
        assert name in capsys.readouterr().err
    (run / "log.jsonl").unlink()
    with open(run / "log.jsonl", "wb") as file:
        file.truncate(2**40)
    assert main(["report", str(run)]) == 2
    assert f"log.jsonl: has {2**40} bytes" in capsys.readouterr().err


def test_pictures_are_png_alone_and_of_a_runs_width(tmp_path):
    run = run_folder(tmp_path / "run", [entry(1)])
    (run / "samples").mkdir()
    drawn = Image.new("RGB", (300, 20))
    drawn.save(run / "samples" / "update-1.png", "EPS")
    drawn.save(run / "samples" / "update-2.png", "TIFF")
    drawn.crop((0, 0, 260, 20)).save(run / "samples" / "update-3.png")
    data = io.BytesIO()
    Image.effect_noise((300, 200), 50).save(data, "PNG")
    (run / "samples" / "update-4.png").write_bytes(data.getvalue()[:-2000])
    drawn.save(run / "samples" / "update-5.png", "PNG")
    page = Page(report(run))
    assert list(page.images()) == ["prompts and base", "update-5"]
    said = dict(re.findall(r"update-(\d)\.png cannot be shown: (too narrow|truncated|not an image)", page.text["p"]))
    assert said == {"1": "not an image", "2": "not an image", "3": "too narrow", "4": "truncated"}


def test_files_that_are_no_page_are_not_replaced(tmp_path):
    run = run_folder(tmp_path / "run", [entry(1)])
    before = (run / "log.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="log.jsonl: exists and is not a seppo_fast report"):
        report(run, run / "log.jsonl")
    assert (run / "log.jsonl").read_bytes() == before
    assert report(run, report(run)).read_bytes().startswith(b"<!doctype html>")


@pytest.mark.skipif(BROWSER is None, reason="needs chromium or google-chrome on the PATH")
@pytest.mark.parametrize("width", [500, 1200])
def test_in_a_real_browser(tmp_path, width):
    """Both lines, the shaded spell and a sample are visible in the light page's colours; nothing overflows."""
    log = [entry(number, winner_error=0.1 + number / 1e3, ref_winner_error=0.1) for number in range(1, 31)]
    run = run_folder(tmp_path / "run", log)
    picture(run, 1)
    shot = tmp_path / "shot.png"
    words = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-device-scale-factor=1",
        f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},4500", f"--screenshot={shot}",
        report(run).as_uri(),
    ]  # fmt: skip
    subprocess.run(words, check=True, capture_output=True, timeout=120)
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    assert pixels.shape[1] == width

    def near(colour, within=30):
        return np.abs(pixels - colour).max(axis=2) < within

    assert near((0x15, 0x65, 0xC0)).sum() > 1000  # first line
    assert near((0xC2, 0x57, 0x0C)).sum() > 100  # second line
    assert near((200, 30, 30)).sum() > 10_000  # the sample: 128 x 128
    spell = near(np.round(0.16 * np.array([0xB3, 0x26, 0x1E]) + 0.84 * 255), 6)
    assert spell.sum() > 5000
    assert near((255, 255, 255), 1)[:, -8:].mean() > 0.99  # the right margin is free
