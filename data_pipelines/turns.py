"""Parts of a document: some of its turns with the system prompt, or its videos with fewer frames.

A turn begins at `<C_Q>`; what stands before the first one is the system prompt and stays with every part.
"""

from dataclasses import replace

import numpy as np

from data_pipelines.document import Document
from data_pipelines.prompts import Element, Picture, Text, Video, parse_prompt
from data_pipelines.special_tokens import USER


def document_elements(document: Document) -> list[Element]:
    """The elements of the part that `document` is. Raises SampleError "bad_prompt"."""
    elements = parse_prompt(document.text)
    if document.turns is not None:
        head, turns = cut_turns(elements)
        elements = head + [element for turn in turns[slice(*document.turns)] for element in turn]
    return thin_frames(elements, document.max_frames) if document.max_frames else elements


def cut_turns(elements: list[Element]) -> tuple[list[Element], list[list[Element]]]:
    """The system prompt, and the turns with their media; marks of loss stay with what they mark."""
    parts: list[list[Element]] = [[]]
    for element in elements:
        if not isinstance(element, Text):
            parts[-1].append(element)
            continue
        first, *others = element.text.split(USER)
        if first:
            parts[-1].append(replace(element, text=first))
        parts += [[replace(element, text=USER + text)] for text in others]
    return parts[0], parts[1:]


def has_frames(elements: list[Element]) -> bool:
    """Whether there are videos, as files or frame by frame."""
    return any(isinstance(each, Video) or (isinstance(each, Picture) and each.frame) for each in elements)


def thin_frames(elements: list[Element], most: int) -> list[Element]:
    """Videos that are listed frame by frame with at most `most` frames, evenly spread; files are thinned as read."""
    kept: list[Element] = []
    run: list[Element] = []
    for element in [*elements, None]:
        if isinstance(element, Picture) and element.frame:
            run.append(element)
            continue
        places = range(len(run)) if len(run) <= most else np.linspace(0, len(run) - 1, most).round().astype(int)
        kept += [run[place] for place in places]
        run = []
        if element is not None:
            kept.append(element)
    return kept
