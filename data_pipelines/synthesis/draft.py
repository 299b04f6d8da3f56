"""What a maker makes of one document: new documents and their media, written only when all of it succeeded."""

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from data_pipelines.documents.document import Document
from data_pipelines.documents.prompt_writing import Source
from data_pipelines.errors import SampleError
from data_pipelines.media.location import Media, reading


@dataclass
class Draft:
    """New documents made from `source`, the document `number` of a unit, whose folder in the output is `folder`.

    Media paths are relative to the output, as the texts of the new documents need them.
    """

    source: Document
    name: str
    folder: str
    number: int
    documents: list[tuple[str, dict]] = field(default_factory=list)
    skipped: list[SampleError] = field(default_factory=list)
    _media: dict[str, bytes | Media] = field(default_factory=dict)

    def add(self, text: Source, type: str, part: str = "") -> None:
        """A new document. `part` names the manifest it goes to (default: the job's own).

        Its id is the source's with the part's name behind it, and a number from the second document of a part on.
        """
        if not isinstance(text, Source):  # a prompt that lost its type on the way: all of it would be text
            raise TypeError(f"the text of a document is a Source, not {text!r:.60}")
        part = part or self.name
        made = sum(other == part for other, _ in self.documents) + 1
        identifier = f"{self.source.id}-{part}" + (f"-{made}" if made > 1 else "")
        self.documents.append((part, {"id": identifier, "type": type, "text": str(text)}))

    def skip(self, cause: str, message: str) -> None:
        """Counts something of the source that could not be used, while the rest of it can."""
        self.skipped.append(SampleError(cause, message))

    def save(self, content: bytes, suffix: str) -> str:
        """Keeps a new media file with these bytes; returns its path. `suffix` is `.wav`, `.png`, ..."""
        return self._keep(content, suffix)

    def link(self, media: Media) -> str:
        """Keeps a media file of the source document, linked where the file system can; returns its path."""
        suffix = Path(media.name).suffix.lower() if media.path is not None else ""
        return self._keep(media, suffix)

    def write_media(self, out: Path) -> None:
        """Writes the media below `out`, the folder that their paths are relative to.

        Raises SampleError "unreadable_media" for a file of the source that can neither be linked nor opened.
        """
        for path, content in self._media.items():
            target = out / path
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                target.write_bytes(content)
            else:
                _link_or_copy(content, target)

    def _keep(self, content: bytes | Media, suffix: str) -> str:
        # A folder for each hundred documents: a unit of any size leaves no folder with very many files.
        path = f"{self.folder}/{self.number // 100:03d}/{self.number:05d}-{len(self._media):03d}{suffix}"
        self._media[path] = content
        return path


def _link_or_copy(media: Media, target: Path) -> None:
    if media.path is not None:
        try:
            os.link(media.path, target)
            return
        except OSError:  # another file system, or one without links
            pass
    with reading(media, "file"):
        source = media.open()
    with source, target.open("wb") as file:
        shutil.copyfileobj(source, file)
