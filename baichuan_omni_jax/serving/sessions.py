"""All conversations of the page, by what Gradio calls the session hash of a browser tab."""

import secrets
import threading
import time
from pathlib import Path

from baichuan_omni_jax.generation.chat import OmniChat

from .limits import Limits
from .session import Session
from .speech import GrowingSpeech

IDLE = 3600.0  # seconds after which a tab that never said goodbye is forgotten


class Sessions:
    """Thread-safe. Each session's files lie in a folder of `folder` whose name cannot be guessed."""

    def __init__(self, chat: OmniChat, folder: Path, system: str, limits: Limits, hears: bool = True):
        self._chat, self._folder, self._system, self._limits, self._hears = chat, folder, system, limits, hears
        self._sessions: dict[str, Session] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._sessions)

    def of(self, tab: str) -> Session:
        """The tab's session, begun where there was none."""
        with self._lock:
            if tab not in self._sessions:
                self._close_idle()
                folder = self._folder / secrets.token_urlsafe(16)
                self._sessions[tab] = Session(self._chat, folder, self._system, self._limits, self._hears)
            return self._sessions[tab]

    def close(self, tab: str) -> None:
        """The tab is gone."""
        with self._lock:
            session = self._sessions.pop(tab, None)
        if session:
            session.close()

    def speech(self, name: str) -> GrowingSpeech | None:
        """The answer of that name, while it is the newest of its session."""
        with self._lock:
            found = [s.speech for s in self._sessions.values() if s.speech and s.speech.name == name]
        return found[0] if found else None

    def _close_idle(self) -> None:
        before = time.monotonic() - IDLE
        for tab in [tab for tab, s in self._sessions.items() if s.used < before and not s.answering]:
            self._sessions.pop(tab).close()
