"""The page in a headless browser: its turns, its audio, its refusals, tabs that stop, differ and go away.

Needs the extra `browser`, Chromium and its driver (Debian: chromium, chromium-driver).
"""

import inspect
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
import soundfile
from PIL import Image

from baichuan_omni_jax.checkpoint import save_branches
from baichuan_omni_jax.config import MeshConfig, tiny
from baichuan_omni_jax.nn.param import ComputePolicy
from baichuan_omni_jax.omni.flow_matching_model import FlowMatchingModel
from baichuan_omni_jax.omni.model import OmniModel
from baichuan_omni_jax.sharding import make_mesh
from data_pipelines.tokenizers.tokenizer import train_tokenizer
from tests.helpers import micro
from tests.helpers.page_chat import scripted_chat
from tests.helpers.proofs import wait_for

pytest.importorskip("gradio", reason="the page needs Gradio: the extra demo")
pytest.importorskip("selenium", reason="the browser is driven by Selenium: the extra browser")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium with its driver (chromium, chromium-driver)"),
]

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "baichuan_omni_jax", "serve"]
FLAGS = """--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --use-fake-device-for-media-stream --use-fake-ui-for-media-stream
    --autoplay-policy=no-user-gesture-required --window-size=1280,900""".split()
PLAYER = "[data-testid=waveform-Audio]"
PLAYED = "const a = document.querySelector('#player audio'); return a ? a.currentTime : 0"


class Tab:
    """One browser with the page open; `microphone` is a WAV file that it hears once, from when it is switched on."""

    def __init__(self, url: str, profile: Path, microphone: Path | None = None):
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        if microphone:
            options.add_argument(f"--use-file-for-fake-audio-capture={microphone}%noloop")
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        self.driver.get(url)
        wait_for(lambda: self.all("#box textarea") and self.all("#microphone button"))

    def all(self, selector: str) -> list:
        return self.driver.find_elements("css selector", selector)

    def text(self, selector: str) -> str:
        return self.driver.execute_script(
            "return [...document.querySelectorAll(arguments[0])].map(e => e.innerText).join(' ')", selector
        )

    def click(self, selector: str) -> None:
        wait_for(lambda: self.all(selector))[0].click()

    def attach(self, path: Path) -> None:
        self.all("#box input[type=file]")[0].send_keys(str(path))

    def write(self, text: str) -> None:
        self.all("#box textarea")[0].send_keys(text, "\n")

    @property
    def answers(self) -> list[str]:
        return [element.text for element in self.all("#chat .bot-row")]

    @property
    def status(self) -> str:
        return self.text("#status")

    def answered(self, count: int = 1) -> str:
        """The last answer, once there are so many and the last is whole; refused ones are none."""
        wait_for(lambda: len(self.answers) >= count and ("in all" in self.status or "Not" in self.status))
        assert "in all" in self.status, self.status
        return self.answers[-1]


@pytest.fixture
def open_tab(tmp_path):
    tabs = []

    def start(url: str, microphone: Path | None = None) -> Tab:
        tabs.append(Tab(url, tmp_path / f"profile{len(tabs)}", microphone))
        return tabs[-1]

    yield start
    for tab in tabs:
        tab.driver.quit()


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """Serves a chat; returns the page's address."""
    import uvicorn

    from baichuan_omni_jax.serving.limits import Limits
    from baichuan_omni_jax.serving.web_page import PageSettings, _Page, make_app

    # Gradio asks whether a function is a generator, and what the type checks of the tests wrap around it is none.
    for name, function in vars(_Page).items():
        if inspect.isgeneratorfunction(inspect.unwrap(function)):
            monkeypatch.setattr(_Page, name, inspect.unwrap(function))
    running = []

    def start(chat) -> str:
        app = make_app(chat, tmp_path / "sessions", PageSettings(limits=Limits(megabytes=1.0)))
        listening = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=3))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        running.append((server, thread))
        return f"http://127.0.0.1:{listening.getsockname()[1]}/"

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join(30)


def test_text_streams_in_and_speech_plays(serve, open_tab):
    tab = open_tab(serve(scripted_chat(pace=0.05)))
    tab.write("How are you?")
    assert "heard How are you?" in tab.answered()
    assert wait_for(lambda: tab.driver.execute_script(PLAYED)) <= 0.5
    assert tab.all(f"#chat .bot-row {PLAYER}")


def test_a_camera_still_and_a_video_go_with_a_message(serve, open_tab, sample_dir):
    chat = scripted_chat()
    tab = open_tab(serve(chat))
    wait_for(lambda: [button for button in tab.all("#camera button") if "Webcam" in button.text])[0].click()
    tab.click("#camera [aria-label='capture photo']")
    wait_for(lambda: tab.all("#camera img[src*='/file']"))  # shown from the server: before, it is not there yet
    tab.attach(next(path for path in (sample_dir / "video").iterdir()))
    wait_for(lambda: tab.all("#box .thumbnail-item"))
    tab.write("Look")
    assert "heard image video audio Look" in tab.answered()
    assert tab.all("#chat .user-row img")
    assert tab.all("#chat .user-row video")
    tab.write("Again")
    assert "heard image video audio Look Again" in tab.answered(2)


def test_the_stop_button_ends_an_answer(serve, open_tab):
    chat = scripted_chat(pace=0.05)
    tab = open_tab(serve(chat))
    tab.write("word " * 300)
    wait_for(lambda: tab.answers)
    tab.click("#stop")
    wait_for(lambda: "Stopped." in tab.status)
    assert chat.model.engine.requests[0].cancelled.is_set()
    assert len(tab.answers[-1].split()) < 250
    tab.click("#restart")
    wait_for(lambda: not tab.answers)
    tab.write("Hello")
    wait_for(lambda: tab.answers and "heard Hello" in tab.answers[-1])


def test_too_large_an_upload_is_refused_in_words(serve, open_tab, tmp_path):
    tab = open_tab(serve(scripted_chat()))
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (800, 800, 3), np.uint8)).save(tmp_path / "noise.png")
    tab.attach(tmp_path / "noise.png")
    wait_for(lambda: "exceed the maximum allowed size" in tab.text("body"))
    tab.write("Hello")
    assert "heard Hello" in tab.answered()


def test_the_page_names_what_cannot_be_read(serve, open_tab, tmp_path):
    tab = open_tab(serve(scripted_chat()))
    (tmp_path / "broken.wav").write_bytes(b"no audio")
    tab.attach(tmp_path / "broken.wav")
    wait_for(lambda: "broken.wav" in tab.text("#box") or tab.all("#box .thumbnail-item"))
    tab.write("Listen")
    wait_for(lambda: "Not answered: broken.wav is a text, neither an image nor an audio file" in tab.status)
    tab.write("Hello")
    assert "heard Hello" in tab.answered(2)


def test_two_tabs_are_two_conversations_and_one_that_goes_away_is_let_go(serve, open_tab):
    chat = scripted_chat(pace=0.05)
    url = serve(chat)
    here, there = open_tab(url), open_tab(url)
    here.write("secret " * 400)
    wait_for(lambda: here.answers)
    there.write("Hello")
    assert there.answered().split()[:2] == ["heard", "Hello"]
    assert "secret" not in there.text("body")
    assert not chat.model.engine.requests[0].cancelled.is_set()
    here.driver.quit()
    wait_for(chat.model.engine.requests[0].cancelled.is_set)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Every branch with random weights, and a tokenizer."""
    path, cfg, key = tmp_path_factory.mktemp("page") / "checkpoint", tiny(), jax.random.key(0)
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        omni = jax.jit(lambda: OmniModel(key, cfg, ComputePolicy()))()
        voice = jax.jit(lambda: FlowMatchingModel(key, cfg, ComputePolicy()))()
        branches = {name: getattr(model, name) for model in (omni, voice) for name in model.branches}
        tokenizer = train_tokenizer([(ROOT / "README.md").read_text()], cfg.llm.vocab_size)
        save_branches(path, branches, cfg, tokenizer.to_str())
    return path


def test_the_command_answers_text_an_image_and_the_microphone(checkpoint, open_tab, tmp_path, sample_dir):
    """Untrained branches: there is an answer, and audio, and that is all."""
    image, microphone = tmp_path / "teal.png", tmp_path / "spoken.wav"
    Image.new("RGB", (120, 90), "teal").save(image)
    spoken, rate = soundfile.read(next((sample_dir / "speech").glob("en_*.wav")))
    quiet = np.zeros(rate)
    soundfile.write(microphone, np.concatenate([quiet, spoken, *[quiet] * 3]), rate)
    flags = ("--port", "0", "--length", "1024", "--slots", "2", "--max-tokens", "4", "--set", "segment_frames=20")
    command = [*COMMAND, "--checkpoint", str(checkpoint), *flags]
    environment = micro.environment(tmp_path / "xla", 1)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            line = next(line for line in process.stdout if "Listening" in line)
            assert "http://127.0.0.1:" in line
            tab = open_tab(line.split()[-1], microphone)
            tab.write("What is a star?")
            assert tab.answered(1)
            tab.attach(image)
            wait_for(lambda: tab.all("#box img"))
            tab.write("What is this?")
            assert tab.answered(2)
            tab.click("#stop")  # while the last answer plays, the microphone is ignored
            tab.click("#microphone .record-button")
            assert tab.answered(3)
            assert tab.all("#chat .user-row img")
            assert tab.all(f"#chat .user-row {PLAYER}")
            assert len(tab.all(f"#chat .bot-row {PLAYER}")) == 3
            assert tab.all("#player audio")
        finally:
            process.terminate()


def test_what_cannot_be_used_is_named(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for flags, sentence in (
            (("--checkpoint", str(tmp_path)), "is neither a checkpoint"),
            (("--checkpoint", str(tmp_path), "--port", port), f"--port {port} cannot be listened on"),
            (("--checkpoint", str(tmp_path), "--max-files", "0"), "limit files 0 must be positive"),
        ):
            done = subprocess.run([*COMMAND, *flags], capture_output=True, text=True)
            assert done.returncode == 2, done.stderr
            assert sentence in done.stderr.splitlines()[-1]
