"""The documents of the data set: what trains, by source, and the held-out questions, by ability."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from data_pipelines.documents.prompt_writing import Source, conversation, image_tag, trainable, turn, video_tag
from data_pipelines.small import text
from data_pipelines.small.charts import BarChart, random_chart
from data_pipelines.small.digits import Digit, held_out_digits, training_digits
from data_pipelines.small.motion import Motion, random_motion
from data_pipelines.small.pictures import Picture, random_picture
from data_pipelines.small.spoken import SPOKEN_SOURCES, SpeechPlan, SpokenCounts, plan_spoken
from data_pipelines.small.words import Ability, Question

DESCRIBE = ("Describe it.", "What do you see?")
CAPTION_SHARE = 0.25
SOURCES = ("digits", "pictures", "charts", "motion", "text", *SPOKEN_SOURCES)
HELD_OUT = "held_out"
"""The folder of held-out manifests, one an ability; they name media below the data set's root, as all do."""


Still = Digit | Picture | BarChart
"""Scenes that are one picture."""
Scene = Still | Motion
"""What a picture or a video shows: `questions` about it by ability, and a `caption` of it."""


@dataclass
class MediaPlan:
    """Files that have to be made, by path: `stills`, `videos` and the `speech`."""

    stills: dict[str, Still] = field(default_factory=dict)
    videos: dict[str, Motion] = field(default_factory=dict)
    speech: SpeechPlan = field(default_factory=SpeechPlan)

    def add(self, scene: Scene, name: str) -> Source:
        """Plans a scene's file, `NAME_NUMBER`; returns its tag."""
        if isinstance(scene, Motion):
            path = f"video/{name}_{len(self.videos):05d}.mp4"
            self.videos[path] = scene
            return video_tag(path)
        path = f"images/{name}_{len(self.stills):05d}.png"
        self.stills[path] = scene
        return image_tag(path)


@dataclass(frozen=True)
class Counts:
    """How many scenes train: copies of each digit, and so many of the others; and held-out questions an ability."""

    digits: int = 3
    pictures: int = 6000
    charts: int = 3000
    motion: int = 1500
    text: int = 6000
    spoken: SpokenCounts = SpokenCounts()
    held_out: int = 200


COUNTS = Counts()


def scene_document(rng: random.Random, scene: Scene, tag: Source) -> tuple[str, Source]:
    """Writes a document about a scene: its description, or all questions about it in any order, a turn each."""
    if rng.random() < CAPTION_SHARE:
        return "caption", turn(tag + rng.choice(DESCRIBE), scene.caption(rng))
    # The medium stands before the first question alone; later turns refer back to it.
    asked = list(scene.questions(rng).values())
    if isinstance(scene, BarChart):
        asked = [asked[0], *(scene.value_question(rng, color) for color in scene.colors)]
    rng.shuffle(asked)
    (question, answer), *others = asked
    return "qa", conversation([(tag + question, answer), *others])


def text_document(rng: random.Random) -> tuple[str, Source]:
    """Writes a document of text: a passage, or one to four questions, a turn each."""
    if rng.random() < 0.3:
        return "text", trainable(text.passage(rng))
    asked = [text.question(rng, rng.choice(text.TEXT_ABILITIES)) for _ in range(rng.randint(1, 4))]
    return "text_qa", conversation(asked)


def plan_documents(seed: int, counts: Counts) -> tuple[MediaPlan, dict[str, list[dict[str, str]]]]:
    """Plans every document by its manifest's name, without `.jsonl`, and the media they need: the same for a seed."""
    plan, manifests = MediaPlan(), {}
    for name, scenes in _training_scenes(seed, counts).items():
        # A generator for each source: a change to one leaves the others' documents as they are.
        rng = random.Random(f"{seed}/{name}")
        written = [scene_document(rng, scene, plan.add(scene, name)) for scene in scenes]
        manifests[name] = _numbered(name, written, rng)
    rng = random.Random(f"{seed}/text")
    manifests["text"] = _numbered("text", [text_document(rng) for _ in range(counts.text)], rng)
    for name, written in _spoken(seed, counts.spoken, plan).items():
        manifests[name] = _numbered(name.rpartition("/")[2], written, random.Random(f"{seed}/{name}"))
    for ability, make in _held_out(seed, plan).items():
        rng = random.Random(f"{seed}/{HELD_OUT}/{ability}")
        written = [(ability, make(rng, ability)) for _ in range(counts.held_out)]
        manifests[f"{HELD_OUT}/{ability}"] = _numbered(ability, written, rng)
    return plan, manifests


def _spoken(seed: int, counts: SpokenCounts, plan: MediaPlan) -> dict[str, list[tuple[str, Source]]]:
    """Plans the documents of speech; questions by voice are about pictures that other documents show too."""
    shown = [path for path, scene in plan.stills.items() if isinstance(scene, Digit | Picture)]

    def asked(rng: random.Random) -> tuple[Source, Question]:
        path = rng.choice(shown)
        return image_tag(path), rng.choice(list(plan.stills[path].questions(rng).values()))

    def asked_held_out(rng: random.Random) -> tuple[Source, Question]:
        scene = random_picture(rng, held_out=True)
        return plan.add(scene, "heard"), rng.choice(list(scene.questions(rng).values()))

    return plan_spoken(seed, counts, plan.speech, asked, asked_held_out, HELD_OUT)


def _training_scenes(seed: int, counts: Counts) -> dict[str, list[Still | Motion]]:
    draw = {name: random.Random(f"{seed}/{name}/scenes") for name in ("digits", "pictures", "charts", "motion")}
    return {
        "digits": list(training_digits(draw["digits"], counts.digits)),
        "pictures": [random_picture(draw["pictures"]) for _ in range(counts.pictures)],
        "charts": [random_chart(draw["charts"]) for _ in range(counts.charts)],
        "motion": [random_motion(draw["motion"]) for _ in range(counts.motion)],
    }


def _held_out(seed: int, plan: MediaPlan) -> dict[Ability, Callable[[random.Random, Ability], Source]]:
    """Returns what writes one held-out question of each ability."""
    digits = held_out_digits()
    random.Random(f"{seed}/{HELD_OUT}/digits").shuffle(digits)

    def ask_of(draw: Callable[[random.Random], Still | Motion]) -> Callable[[random.Random, Ability], Source]:
        def write(rng: random.Random, ability: Ability) -> Source:
            scene = draw(rng)
            question, answer = scene.questions(rng)[ability]
            return turn(plan.add(scene, ability) + question, answer)

        return write

    def write_text(rng: random.Random, ability: Ability) -> Source:
        return turn(*text.question(rng, ability, held_out=True))

    picture = ask_of(lambda rng: random_picture(rng, held_out=True))
    chart = ask_of(lambda rng: random_chart(rng, held_out=True))
    return {
        "digit": ask_of(lambda rng: digits.pop()),
        "color": picture,
        "shape": picture,
        "place": picture,
        "tallest_bar": chart,
        "bar_value": chart,
        "motion": ask_of(lambda rng: random_motion(rng, held_out=True)),
        **dict.fromkeys(text.TEXT_ABILITIES, write_text),
    }


def _numbered(name: str, written: list[tuple[str, Source]], rng: random.Random) -> list[dict[str, str]]:
    documents = [
        {"id": f"{name}-{number:05d}", "type": kind, "text": prompt}
        for number, (kind, prompt) in enumerate(written, start=1)
    ]
    # Shuffled: a reader that takes the first documents of a manifest sees every type.
    rng.shuffle(documents)
    return documents
