"""The web page in Gradio: what is on it, and which function of a session each component calls."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fastapi
import gradio as gr
import numpy as np
from fastapi.responses import StreamingResponse
from gradio.themes import Default as DefaultTheme

from baichuan_omni_jax.generation.chat import OmniChat
from baichuan_omni_jax.serving.limits import Limits
from baichuan_omni_jax.serving.session import Session, Sessions, View

CSS = Path(__file__).with_name("web_page.css")
LISTEN = 0.25  # seconds of audio in a piece from the microphone
THEME = DefaultTheme(
    primary_hue="teal",
    neutral_hue="slate",
    font=["system-ui", "sans-serif"],  # names alone: nothing is fetched from elsewhere
    font_mono=["ui-monospace", "monospace"],
)


@dataclass(frozen=True, kw_only=True)
class PageSettings:
    """What the page shows, and how many it serves."""

    title: str = "Baichuan-Omni"
    notice: str = ""  # stands under the title
    system: str = ""  # system message of every conversation
    speaks: bool = True  # whether the checkpoint can speak
    takes_audio: bool = True  # whether it can encode audio
    clients: int = 8  # answers at a time
    waiting: int = 64  # more that may queue
    limits: Limits = Limits()


def make_app(chat: OmniChat, folder: Path, settings: PageSettings) -> fastapi.FastAPI:
    """Makes the web application. What users send and hear lies in `folder` while their tab is open."""
    sessions = Sessions(chat, folder, settings.system, settings.limits, settings.takes_audio)
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
        """Lays out the components: chat, player, message box and buttons left; microphone, camera, options right."""
        settings = self._settings
        # The microphone's last utterance: its change is the event that begins an answer.
        self.utterance = gr.State()
        gr.Markdown(f"# {settings.title}\n{settings.notice}", line_breaks=True, elem_id="title")
        with gr.Row(equal_height=False):
            with gr.Column(scale=7, min_width=420):
                self.chat = gr.Chatbot(
                    show_label=False, height="54vh", elem_id="chat", buttons=[], feedback_options=None,
                    placeholder="Write, attach an image, an audio file or a video, or speak.",
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
                self.speech = gr.Checkbox(
                    value=settings.speaks, interactive=settings.speaks, label="Spoken answers",
                    info="" if settings.speaks else "The checkpoint has no branches for speech.", elem_id="speech",
                )  # fmt: skip

    def _connect(self) -> None:
        """Says which function each event calls. Answers share the engine's slots; what is quick waits for none."""
        shown = [self.chat, self.player, self.status]
        slot = {"concurrency_limit": self._settings.clients, "concurrency_id": "answers", "show_progress": "hidden"}
        quick = {"queue": False, "show_progress": "hidden"}
        self.box.submit(self._write, [self.box, self.camera, self.speech], [*shown, self.box, self.camera], **slot)
        self.microphone.stream(
            self._push_audio, self.microphone, self.utterance, stream_every=LISTEN, show_progress="hidden"
        )
        self.microphone.stop_recording(self._end_audio, None, self.utterance, **quick)
        self.utterance.change(
            self._answer_utterance,
            [self.utterance, self.camera, self.speech],
            [*shown, self.camera],
            trigger_mode="multiple",
            **slot,
        )
        self.stop.click(self._stop, None, self.player, **quick)
        self.restart.click(self._restart, None, shown, **quick)
        self.blocks.unload(self._leave)

    def _write(self, box: dict[str, Any], camera: str | None, speech: bool, request: gr.Request) -> Iterator[list]:
        # The message box and the camera are emptied at once; the answer's views follow.
        files = [*([camera] if camera else []), *box["files"]]
        yield [gr.skip()] * 3 + [None, None]
        yield from self._answer(request, box["text"], files, speech, 2)

    def _push_audio(self, piece: tuple[int, np.ndarray] | None, request: gr.Request):
        """Returns the path of an utterance when one has ended."""
        utterance = self._session(request).push_audio(*piece) if piece else None
        return str(utterance) if utterance else gr.skip()

    def _end_audio(self, request: gr.Request):
        utterance = self._session(request).end_audio()
        return str(utterance) if utterance else gr.skip()

    def _answer_utterance(
        self, utterance: str, camera: str | None, speech: bool, request: gr.Request
    ) -> Iterator[list]:
        yield [gr.skip()] * 3 + [None]
        yield from self._answer(request, "", [*([camera] if camera else []), utterance], speech, 1)

    def _answer(self, request: gr.Request, text: str, files: list[str], speech: bool, skipped: int) -> Iterator[list]:
        """Values for messages, player and status, and as many components more that stay as they are."""
        settings = replace(self._chat.settings, speech=speech)
        playing = None
        for view in self._session(request).answer(text, [Path(file) for file in files], settings):
            # A new player starts from the beginning: only a new answer gets one.
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
        self._sessions.close(_tab(request))

    def _session(self, request: gr.Request) -> Session:
        return self._sessions.get(_tab(request))


def _tab(request: gr.Request) -> str:
    # A request of an event has a hash; those of the API, which the page does not call, share one conversation.
    return request.session_hash or ""


def _player(view: View) -> str:
    """Returns the HTML of a player that begins by itself, or nothing."""
    if view.speech is None:
        return ""
    return f'<audio src="speech/{view.speech.name}.wav" autoplay controls aria-label="The answer, spoken"></audio>'
