"""Serves the web page: text, images, video, microphone and camera in; text and speech out, as they are made.

    baichuan-omni serve --checkpoint DIR [--host 127.0.0.1] [--port 7860] [--max-megabytes 32] ...

Needs the extra `demo` (Gradio). Listens on this machine alone unless `--host` says otherwise. More:
docs/how-to/web-page.md.
"""

import argparse
import contextlib
import os
import socket
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory

from baichuan_omni_jax.cli.chat import add_model_arguments, add_sampling_arguments, generation_config, open_chat
from baichuan_omni_jax.config import GenerationConfig
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.serving.limits import Limits

LIMITS = {
    "files": "files of one message",
    "megabytes": "megabytes of one file",
    "audio_seconds": "seconds of one audio file",
    "video_seconds": "seconds of one video",
    "characters": "characters of one message",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `serve`."""
    add_model_arguments(parser)
    group = parser.add_argument_group("the page")
    add = group.add_argument
    add(
        "--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all of this machine's (default %(default)s)"
    )
    add("--port", type=int, default=7860, help="0: any that is free (default %(default)s)")
    add("--title", default="Baichuan-Omni", help="of the page")
    add("--system", default="", metavar="TEXT", help="system message of every conversation")
    add_sampling_arguments(group)
    for field in fields(Limits):
        flag = f"--max-{field.name.replace('_', '-')}"
        add(
            flag,
            type=type(field.default),
            default=field.default,
            metavar="N",
            help=f"{LIMITS[field.name]} (default %(default)s)",
        )


def run(options: argparse.Namespace) -> None:
    """Serves the page; Ctrl-C is how it ends."""
    with contextlib.suppress(KeyboardInterrupt):
        serve(options)


def serve(options: argparse.Namespace) -> None:
    """Serves the page until it is interrupted. Raises ConfigError naming what cannot be used."""
    limits = Limits(**{name: getattr(options, f"max_{name}") for name in LIMITS})
    try:
        import uvicorn

        from baichuan_omni_jax.serving.web_page import PageSettings, make_app
    except ImportError as error:
        raise ConfigError(f"the page needs Gradio, the extra demo (pip install '.[demo]'): {error}") from error
    # The port before the checkpoint: one that is taken is refused at once, not after minutes of loading.
    with _listen(options.host, options.port) as listening, TemporaryDirectory() as folder:
        # What users send lies in this folder alone, and goes with it.
        os.environ["GRADIO_TEMP_DIR"] = f"{folder}/uploads"
        root = Path(folder) / "sessions"
        opened = open_chat(options, generation_config(options, GenerationConfig()), root)
        if opened.chat.processor is None:
            raise ConfigError(f"checkpoint {options.checkpoint} brings no tokenizer: give one with --tokenizer")
        settings = PageSettings(
            title=options.title,
            notice=opened.notice,
            system=options.system,
            speaks=opened.chat.model.speech_decoder is not None,
            takes_audio=opened.takes_audio,
            clients=options.slots,
            limits=limits,
        )
        app = make_app(opened.chat, root, settings)
        # Compiled before the first request, which would wait for it.
        opened.engine.warm_up()
        host, port = listening.getsockname()[:2]
        print(f"Listening on http://{host}:{port}/", flush=True)
        # Open tabs keep a connection each, for which the end must not wait.
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=3)
        uvicorn.Server(config).run(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ConfigError(f"--host {host} --port {port} cannot be listened on: {error}") from error
