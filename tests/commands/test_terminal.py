"""Commands and downloads on a real terminal: bars are shown and erased; printed lines and files stay the same."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from seppo_fast.config.load import to_yaml
from tests.helpers.runs import tiny_config
from tests.helpers.same_run import assert_same_run
from tests.helpers.terminal import on_terminal, screen

CONTENT = b"x" * 100_000


def compared(rows):
    """Returns a screen's rows, without the values in update lines that depend on time."""
    return [row.split("  |grad|")[0] for row in rows]


def test_a_run_on_a_terminal_computes_the_same_and_leaves_the_same_lines(forks, tiny, tmp_path):
    configs = {}
    for name in ("bars", "lines"):
        log = {"sample_every": 2, "sample_prompts": ["a fox"]}
        configs[name] = tiny_config(tiny, tmp_path / name, train={"updates": 2}, model={"train": "lora"}, log=log)
        (tmp_path / f"{name}.yaml").write_text(to_yaml(configs[name]))
    with on_terminal("-m", "seppo_fast", "train", tmp_path / "bars.yaml") as running:
        written = running.read()
        assert running.process.wait() == 0, written
    plain = forks.run("train", tmp_path / "lines.yaml")
    assert (plain.code, plain.err) == (0, "")
    assert_same_run(configs["bars"], configs["lines"])
    for name in ("encoded", "rolled out", "generated"):
        assert f"\r{name}:   0%|" in written, name
    expected = screen(plain.out.replace(str(tmp_path / "lines"), str(tmp_path / "bars")))
    assert [row for row in expected if row.startswith("update ")] and compared(screen(written)) == compared(expected)
    with on_terminal("-m", "seppo_fast", "export", tmp_path / "bars" / "run") as running:
        written = running.read()
        assert running.process.wait() == 0, written
    assert "\rexported:   0%|" in written
    assert screen(written) == [f"lora, after update 2, raw weights: {tmp_path / 'bars' / 'run' / 'export-lora'}"]


@pytest.fixture
def server():
    """The URL of a served file of 100,000 bytes."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT)

        def log_message(self, *arguments):
            pass

    serving = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=serving.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{serving.server_port}/weights.safetensors"
    serving.shutdown()
    thread.join()
    serving.server_close()


DOWNLOAD = """
import io, sys
if sys.argv[3] == "pipe":
    sys.stdout = io.StringIO()
from seppo_fast.utils.logging import quiet_libraries
quiet_libraries()
from huggingface_hub.file_download import http_get
from diffusers import StableDiffusionPipeline
file = io.BytesIO()
http_get(sys.argv[1], file, displayed_filename="weights.safetensors")
StableDiffusionPipeline.from_pretrained(sys.argv[2], safety_checker=None).save_pretrained(sys.argv[2] + "-copy")
import datasets
for _ in datasets.utils.tqdm([1], desc="Generating"):
    pass
print("downloaded", file.getbuffer().nbytes, file=sys.__stdout__)
"""


@pytest.mark.parametrize(
    ("stdout", "asked", "bars"),
    [
        ("terminal", {}, ["weights.safetensors", "Generating"]),
        ("pipe", {}, []),
        ("terminal", {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}, []),
    ],
    ids=["terminal", "pipe", "turned off by the user"],
)
def test_of_the_libraries_bars_a_terminal_shows_downloads_alone(server, tiny, tmp_path, stdout, asked, bars):
    (tmp_path / "pipeline").symlink_to(tiny)
    environment = {"HF_HUB_OFFLINE": "0", "no_proxy": "127.0.0.1"} | asked
    with on_terminal("-c", DOWNLOAD, server, tmp_path / "pipeline", stdout, environment=environment) as running:
        *shown, last = screen(running.read())
        assert running.process.wait() == 0
    assert last == f"downloaded {len(CONTENT)}"
    assert [line.split(":")[0] for line in shown] == bars
