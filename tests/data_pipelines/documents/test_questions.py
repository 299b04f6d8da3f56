"""Documents as questions, cut where training's first target is; and with the media of others."""

from dataclasses import replace

import numpy as np
import pytest

from baichuan_omni_jax.config import tiny
from data_pipelines.documents.processor import Processor
from data_pipelines.documents.prompt_writing import (
    audio_tag,
    image_tag,
    join,
    speech_tag,
    spoken_answer,
    trainable,
    turn,
)
from data_pipelines.documents.questions import exchange, find_exchangeable, pair_up, read_question, recognition_prompt
from data_pipelines.errors import SampleError
from data_pipelines.tokenizers.tokenizer import train_tokenizer
from tests.helpers.small_media import document, media, write_audio, write_image


@pytest.fixture(scope="module")
def processor():
    omni = tiny()
    return Processor(omni, train_tokenizer(["What is this? It is a cat. Good day."], omni.llm.vocab_size))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("media")
    write_image(root / "cat.png", 56, 84)
    write_image(root / "dog.png", 56, 56)
    (root / "copy.png").write_bytes((root / "cat.png").read_bytes())
    write_audio(root / "one.wav", 1.2)
    write_audio(root / "two.wav", 2.5)
    return root


def text_of(processor, ids):
    return processor.tokenizer.decode(list(ids), skip_special_tokens=False)


def test_a_turn_is_asked_up_to_its_answer(processor, folder):
    asked = document(turn(image_tag("cat.png") + "What is this?", "It is a cat."), folder)
    question = read_question(asked, processor, None)
    assert (question.asked, question.reference, question.frames) == ("What is this?", "It is a cat.", 0)
    whole = processor.encode(asked, None)
    first = int(np.flatnonzero(whole.text_weights)[0])
    assert question.prompt.tokens.tolist() == whole.tokens[: first + 1].tolist()
    assert question.tokens == whole.text_weights.sum() - 1, "the end of text is no part of the reference"
    assert len(question.prompt.patches) == len(whole.patches) > 0
    assert text_of(processor, question.prompt.tokens).endswith("<C_A>")
    assert not question.prompt.text_weights.any()


def test_of_several_turns_the_first_is_asked_without_the_media_behind_it(processor, folder):
    text = turn(image_tag("cat.png") + "What is this?", "It is a cat.") + turn(image_tag("dog.png"), "It is.")
    question = read_question(document(text, folder), processor, None)
    assert question.reference == "It is a cat."
    assert set(question.prompt.patch_frames.tolist()) == {1}
    assert len(question.prompt.visual_slots) * 4 == len(question.prompt.patches)


def test_speech_is_asked_with_the_mark_that_begins_it(processor, folder):
    text = join(["Good day.", trainable(speech_tag("one.wav"))])
    question = read_question(document(text, folder), processor, None)
    assert (question.reference, question.tokens) == ("Good day.", 0)
    assert question.prompt.tokens[-1] == processor.config.tokens.audiogen_start
    assert len(question.prompt.audio_codes) == 0
    assert question.frames == len(processor.encode(document(text, folder), None).audio_codes) > 10


def test_what_is_read_aloud_in_pieces_is_asked_for_as_speech(processor, folder):
    paths = iter(["one.wav", "two.wav"])
    text = turn("Read: Good day.", spoken_answer(["Good ", "day."], lambda piece: next(paths)))
    read = replace(document(text, folder), type="tts")
    question = read_question(read, processor, None)
    assert question.asked.endswith("Read: Good day.")
    assert question.reference == "Good day."
    # The pieces, the two marks that begin speech, and the end of text.
    assert question.tokens == len(processor.tokenizer.encode("Good ")) + len(processor.tokenizer.encode("day.")) + 3
    assert text_of(processor, question.prompt.tokens).endswith("<C_A>")
    assert question.frames == len(processor.encode(read, None).audio_codes) > 20
    # Of any other answer that is spoken its first text counts.
    assert read_question(replace(read, type="aqa"), processor, None).reference == "Good"
    # What it says stands in the answer too: another question in its place would change little.
    assert find_exchangeable(read, processor) is None


def test_heard_speech_stays_in_the_prompt(processor, folder):
    question = read_question(document(audio_tag("two.wav") + trainable("Good day."), folder), processor, None)
    assert question.asked == ""
    assert len(question.prompt.audio_codes) == len(question.prompt.audio_slots) > 20


@pytest.mark.parametrize("text", [trainable("It is a cat."), "It is a cat."])
def test_a_document_that_is_trained_on_from_its_first_word_is_no_question(processor, folder, text):
    with pytest.raises(SampleError, match="nothing stands before") as error:
        read_question(document(text, folder), processor, None)
    assert error.value.cause == "no_question"


def test_codes_of_an_answer_become_the_audio_of_a_recognition_prompt(processor):
    codes = np.arange(24).reshape(3, 8).astype(np.int32)
    prompt = recognition_prompt(codes, processor)
    assert prompt.audio_codes.tolist() == codes.tolist()
    heard = prompt.tokens[prompt.audio_slots[0] - 1 : prompt.audio_slots[-1] + 2].tolist()
    special = processor.config.tokens
    assert heard == [special.audio_start, *[special.audio_pad] * 3, special.audio_end]


def test_pairs_are_a_derangement_of_contents():
    """Every document meets another content, and where a rotation can do it each is met once."""
    for contents in (["a", "a", "b", "b"], ["a", "b"], ["a", "a", "b", "c", "c", "d"], [("a", "b"), ("a", "c")]):
        partners = pair_up(contents)
        assert sorted(partners) == list(range(len(contents)))
        assert all(contents[one] != contents[other] for one, other in enumerate(partners))
    assert pair_up(["a", "a", "a", "b"]) == [3, 3, 3, 0]
    assert pair_up(["a"]) == [None]


def test_media_are_exchanged_and_nothing_else(processor, folder):
    one = document(turn(image_tag("cat.png") + "What is this?", "It is a cat."), folder)
    other = document(turn(image_tag("dog.png") + "What is it?", "It is a dog."), folder)
    twin = document(turn(image_tag("copy.png") + "What?", "It is a cat."), folder)
    found = [find_exchangeable(each, processor) for each in (one, other, twin)]
    assert found[0].kinds == found[1].kinds == ("ImageElement",)
    assert found[0].contents == found[2].contents != found[1].contents
    made = exchange(one, found[0], found[1], other)
    assert made.text == str(turn(image_tag("dog.png") + "What is this?", "It is a cat."))
    before, after = processor.encode(one, None), processor.encode(made, None)
    assert after.text_weights.sum() == before.text_weights.sum()
    assert len(after.patches) == len(processor.encode(other, None).patches) != len(before.patches)


def test_of_speech_the_text_is_exchanged_and_of_text_nothing(processor, folder):
    one, other = (
        document(join([text, trainable(speech_tag(path))]), folder)
        for text, path in (("Good day.", "one.wav"), ("Good night.", "two.wav"))
    )
    found = [find_exchangeable(each, processor) for each in (one, other)]
    assert found[0].of_text
    made = exchange(one, found[0], found[1], other)
    assert made.text == str(join(["Good night.", trainable(speech_tag("one.wav"))]))
    assert find_exchangeable(document(turn("What?", "That."), folder), processor) is None


def test_media_of_a_record_are_found_under_a_name_of_their_own(processor, folder):
    """Two records of a shard call their pictures alike."""
    text = turn(image_tag("0") + "What is this?", "It is a cat.")
    one = replace(document(text, folder), media={"0": media(folder / "cat.png")})
    other = replace(document(text, folder), media={"0": media(folder / "dog.png")})
    made = exchange(one, *(find_exchangeable(each, processor) for each in (one, other)), other)
    assert len(processor.encode(made, None).patches) == len(processor.encode(other, None).patches)
