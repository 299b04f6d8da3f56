"""The windows of audio of a mixture, for stores whose codes are made up."""

from data_pipelines.audio_codes.store import CodeKey
from data_pipelines.audio_codes.windows import clip_sources
from data_pipelines.documents.media_items import AudioItem
from data_pipelines.pipeline import Pipeline


def windows_of(pipeline: Pipeline) -> dict[CodeKey, AudioItem]:
    """Every window by its key, in the order of sources and documents."""
    return {
        item.key: item
        for source in clip_sources([pipeline])
        for number in source.with_audio(0, len(source)).tolist()
        for item in source.items(number)
    }
