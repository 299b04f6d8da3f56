"""Documents of images and videos of which a part is heard: shares of sentences, questions, a video's own track."""

from data_pipelines.documents.prompt_writing import audio_tag, image_tag, trainable, turn, video_tag
from data_pipelines.documents.prompts import AudioElement, ImageElement, TextElement, VideoElement, parse_prompt
from data_pipelines.synthesis.speech.crossmodal import ANSWER_IMAGES, CONTINUE_IMAGES
from tests.helpers.small_media import write_image, write_video
from tests.helpers.synthesis_job import FAKE, SHORT, run, write_manifest


def test_a_share_of_the_sentences_is_heard(tmp_path):
    write_image(tmp_path / "a.png", 56, 56)
    sentences = [f"This is sentence number {number}. " for number in range(8)]
    chinese = [f"这是第{number}个句子，它说湖水很平静。" for number in range(8)]
    caption = trainable("".join(sentences[:4])) + image_tag("a.png") + trainable("".join(sentences[4:]))
    manifest = write_manifest(tmp_path, [caption, image_tag("a.png") + trainable("".join(chinese))])
    for share, heard in ((0.25, 2), (0.5, 4), (0.01, 1), (0.99, 7)):
        made, skipped = run("crossmodal", manifest, tmp_path / str(share), "--share", str(share), *SHORT)
        assert not skipped
        for document, language, all_of_them in zip(made, ("en", "zh"), (sentences, chinese), strict=True):
            prompt, *elements = parse_prompt(document["text"])
            assert document["type"] == "cross_modal"
            assert prompt.text.removesuffix("\n") in CONTINUE_IMAGES[language]
            assert not prompt.trainable
            assert sum(isinstance(element, AudioElement) for element in elements) == heard
            assert sum(isinstance(element, ImageElement) for element in elements) == 1
            written = "".join(element.text for element in elements if isinstance(element, TextElement))
            assert sum(sentence.strip() in written for sentence in all_of_them) == 8 - heard
            assert all(element.trainable for element in elements if isinstance(element, TextElement))
            assert not any(
                element.spoken or element.trainable for element in elements if isinstance(element, AudioElement)
            )
            for element in elements:
                if not isinstance(element, TextElement):
                    assert (tmp_path / str(share) / element.reference.path).is_file()
    made, _ = run("crossmodal", manifest, tmp_path / "first", "--order", "first", *SHORT)
    assert [type(element) for element in parse_prompt(made[0]["text"])] == [
        TextElement,
        AudioElement,
        AudioElement,
        TextElement,
        ImageElement,
        TextElement,
    ]


def test_what_trains_whole_is_heard_in_part(tmp_path):
    """Documents in which nothing is marked: what is still written carries loss, as all of it did."""
    write_image(tmp_path / "a.png", 56, 56)
    texts = [
        image_tag("a.png") + "This is sentence number one. This is sentence number two.",
        turn(image_tag("a.png") + "What is in the picture?", "Noise, much of it."),
    ]
    plain = [text.replace("<trainable_start>", "").replace("<trainable_end>", "") for text in texts]
    made, skipped = run("crossmodal", write_manifest(tmp_path, plain), tmp_path / "out", "--order", "first", *SHORT)
    assert not skipped
    story, dialogue = (parse_prompt(document["text"]) for document in made)
    assert [type(element) for element in story] == [TextElement, ImageElement, AudioElement, TextElement]
    assert [element.trainable for element in story if isinstance(element, TextElement)] == [False, True]
    assert story[-1].text.strip() == "This is sentence number two."
    roles, task, image, audio, answer = dialogue
    assert (roles, answer) == (
        TextElement("<C_Q>", trainable=True),
        TextElement("<C_A>Noise, much of it.", trainable=True),
    )
    assert (task.trainable, task.text.strip() in ANSWER_IMAGES["en"]) == (False, True)
    assert isinstance(image, ImageElement)
    assert isinstance(audio, AudioElement)


def test_questions_are_heard_and_answers_stay(tmp_path):
    write_image(tmp_path / "a.png", 56, 56)
    text = turn(image_tag("a.png") + "What is in the picture?", "Noise is in it.", "You are kind to all who ask.")
    made, _ = run("crossmodal", write_manifest(tmp_path, [text]), tmp_path / "out", *FAKE)
    opening, _, sound, answer_mark, answer = parse_prompt(made[0]["text"])
    system, task = opening.text.split("<C_Q>")
    assert system == "<B_SYS>You are kind to all who ask."
    assert task.strip() in ANSWER_IMAGES["en"]
    assert isinstance(sound, AudioElement)
    assert (answer_mark.text, answer) == ("<C_A>", TextElement("Noise is in it.", trainable=True))


def test_the_track_of_a_video_stands_beside_it(tmp_path):
    write_video(tmp_path / "loud.mp4", 2.0, audio=2.0)
    write_video(tmp_path / "mute.mp4", 2.0)
    text = turn(video_tag("loud.mp4") + "What is it?", "A film.")
    sound = image_tag("a.png") + audio_tag("s.wav")
    manifest = write_manifest(
        tmp_path,
        [
            *(text, text.replace("loud", "mute"), text.replace("loud", "gone"), image_tag("a.png") + trainable("One.")),
            *(text.replace("loud.mp4", "../loud.mp4"), "Text. Alone.", sound + trainable("One. Two.")),
        ],
    )
    made, skipped = run("crossmodal", manifest, tmp_path / "out", *FAKE)
    assert [document["type"] for document in made] == ["cross_modal"]
    _, video, track, question, answer = parse_prompt(made[0]["text"])
    assert (video, track) == (VideoElement(track.reference), AudioElement(video.reference))
    assert (tmp_path / "out" / video.reference.path).read_bytes() == (tmp_path / "loud.mp4").read_bytes()
    assert question.text == "What is it?<C_A>"
    assert answer == TextElement("A film.", trainable=True)
    causes = ["no_track", "missing_file", "too_short", "outside_root", "no_picture", "has_sound"]
    assert [(line["id"], line["cause"]) for line in skipped] == [
        (f"d{number}", cause) for number, cause in enumerate(causes, start=1)
    ]
