"""The page in Gradio: what is on it, and which function of a session each thing on it calls."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fastapi
import gradio as gr
import numpy as np
from fastapi.responses import StreamingResponse

from baichuan_omni_jax.generation.chat import OmniChat

from .limits import Limits
from .session import Session, View
from .sessions import Sessions

CSS = Path(__file__).with_name("page.css")
LISTEN = 0.25  # seconds of sound in a piece from the microphone
THEME = gr.themes.Default(
    primary_hue="teal",
    neutral_hue="slate",
    font=["system-ui", "sans-serif"],  # names alone: nothing is fetched from elsewhere
    font_mono=["ui-monospace", "monospace"],
)


@dataclass(frozen=True, kw_only=True)
class PageSettings:
    """`note` stands under the title; `aloud`, `hears`: whether the checkpoint can speak and hear; so many `clients` are
    served at a time, and `waiting` more may queue."""

    title: str = "Baichuan-Omni"
    note: str = ""
    system: str = ""
    aloud: bool = True
    hears: bool = True
    clients: int = 8
    waiting: int = 64
    limits: Limits = Limits()


def make_app(chat: OmniChat, folder: Path, settings: PageSettings) -> fastapi.FastAPI:
    """The web application. What users send and hear lies in `folder` while their tab is open."""
    sessions = Sessions(chat, folder, settings.system, settings.limits, settings.hears)
    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/speech/{name}.wav")
    async def speech(name: str) -> fastapi.Response:
        found = sessions.speech(name)
        if found is None:
            return fastapi.Response(status_code=404)
        return StreamingResponse(found.stream(), media_type="audio/wav", headers={"Cache-Control": "no-store"})

    gr.set_static_paths([folder])  # served as they lie, not copied and hashed for each view
    return gr.mount_gradio_app(
        app,
        _Page(sessions, chat, settings).blocks,
        path="/",
        max_file_size=round(settings.limits.megabytes * 2**20),
        theme=THEME,
        css_paths=CSS,
        footer_links=[],
        run_history=False,
    )


class _Page:
    """The components, and the functions behind them. Gradio gives each function the session hash of its tab."""

    def __init__(self, sessions: Sessions, chat: OmniChat, settings: PageSettings):
        self._sessions, self._chat, self._settings = sessions, chat, settings
        with gr.Blocks(
            title=settings.title, analytics_enabled=False, fill_width=True, delete_cache=(600, 3600)
        ) as self.blocks:
            self._place()
            self._connect()
        self.blocks.queue(max_size=settings.clients + settings.waiting, default_concurrency_limit=None)

    def _place(self) -> None:
        settings = self._settings
        self.spoken = gr.State()
        gr.Markdown(f"# {settings.title}\n{settings.note}", line_breaks=True, elem_id="title")
        with gr.Row(equal_height=False):
            with gr.Column(scale=7, min_width=420):
                self.chat = gr.Chatbot(
                    show_label=False, height="54vh", elem_id="chat", buttons=[], feedback_options=None,
                    placeholder="Write, attach a picture, a sound or a video, or speak.",
                )  # fmt: skip
                self.player = gr.HTML(elem_id="player")
                # Any ending may be chosen (`file_types` is left out): what a file is, its content tells.
                self.box = gr.MultimodalTextbox(
                    show_label=False, placeholder="Message", file_count="multiple", elem_id="box"
                )
                with gr.Row():
                    self.stop = gr.Button("Stop", size="md", elem_id="stop")
                    self.restart = gr.Button("New conversation", size="md", elem_id="restart")
                self.status = gr.Markdown(elem_id="status")
            with gr.Column(scale=3, min_width=280):
                self.microphone = gr.Audio(
                    label="Speak: a pause sends it", sources=["microphone"], streaming=True,
                    type="numpy", elem_id="microphone",
                )  # fmt: skip
                self.camera = gr.Image(
                    label="Camera: goes with the next message", sources=["webcam"], type="filepath",
                    height=220, elem_id="camera",
                )  # fmt: skip
                self.aloud = gr.Checkbox(
                    value=settings.aloud, interactive=settings.aloud, label="Answer aloud",
                    info="" if settings.aloud else "The checkpoint has no branches for speech.", elem_id="aloud",
                )  # fmt: skip

    def _connect(self) -> None:
        shown = [self.chat, self.player, self.status]
        slot = {"concurrency_limit": self._settings.clients, "concurrency_id": "answers", "show_progress": "hidden"}
        quick = {"queue": False, "show_progress": "hidden"}
        self.box.submit(self._write, [self.box, self.camera, self.aloud], [*shown, self.box, self.camera], **slot)
        self.microphone.stream(self._hear, self.microphone, self.spoken, stream_every=LISTEN, show_progress="hidden")
        self.microphone.stop_recording(self._switch_off, None, self.spoken, **quick)
        self.spoken.change(
            self._speak, [self.spoken, self.camera, self.aloud], [*shown, self.camera], trigger_mode="multiple", **slot
        )
        self.stop.click(self._stop, None, self.player, **quick)
        self.restart.click(self._restart, None, shown, **quick)
        self.blocks.unload(self._leave)

    def _write(self, box: dict[str, Any], camera: str | None, aloud: bool, request: gr.Request) -> Iterator[list]:
        files = [*([camera] if camera else []), *box["files"]]
        yield [gr.skip()] * 3 + [None, None]
        yield from self._answer(request, box["text"], files, aloud, 2)

    def _hear(self, piece: tuple[int, np.ndarray] | None, request: gr.Request):
        """The path of an utterance when one has ended."""
        said = self._session(request).hear(*piece) if piece else None
        return str(said) if said else gr.skip()

    def _switch_off(self, request: gr.Request):
        said = self._session(request).switch_off()
        return str(said) if said else gr.skip()

    def _speak(self, spoken: str, camera: str | None, aloud: bool, request: gr.Request) -> Iterator[list]:
        yield [gr.skip()] * 3 + [None]
        yield from self._answer(request, "", [*([camera] if camera else []), spoken], aloud, 1)

    def _answer(self, request: gr.Request, text: str, files: list[str], aloud: bool, skipped: int) -> Iterator[list]:
        """Values for messages, player and status, and as many components more that stay as they are."""
        settings = replace(self._chat.settings, speech=aloud)
        playing = None
        for view in self._session(request).answer(text, [Path(file) for file in files], settings):
            player = gr.skip() if view.speech is playing else _player(view)
            playing = view.speech
            yield [view.messages, player, view.status] + [gr.skip()] * skipped

    def _stop(self, request: gr.Request) -> str:
        self._session(request).stop()
        return ""

    def _restart(self, request: gr.Request) -> list:
        view = self._session(request).restart()
        return [view.messages, _player(view), view.status]

    def _leave(self, request: gr.Request) -> None:
        self._sessions.close(request.session_hash)

    def _session(self, request: gr.Request) -> Session:
        return self._sessions.of(request.session_hash)


def _player(view: View) -> str:
    if view.speech is None:
        return ""
    return f'<audio src="speech/{view.speech.name}.wav" autoplay controls aria-label="The answer, spoken"></audio>'
