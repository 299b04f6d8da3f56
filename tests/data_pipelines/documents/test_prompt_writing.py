"""The two forms of a conversation, byte for byte, in chat and in documents; text of users is text in both."""

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from baichuan_omni_jax.config import tiny
from baichuan_omni_jax.errors import ConfigError, RequestError
from data_pipelines.datasets.builder.build import main as build
from data_pipelines.documents.chat_prompt import ChatPrompts
from data_pipelines.documents.document import Document
from data_pipelines.documents.processor import Processor
from data_pipelines.documents.prompt_writing import (
    Source,
    audio_tag,
    conversation,
    image_tag,
    join,
    plain_text,
    speech_tag,
    trainable,
    turn,
    voice_prompt,
    write_prompt,
)
from data_pipelines.documents.prompts import (
    NAMES,
    AudioElement,
    ImageElement,
    TextElement,
    TokensElement,
    VideoElement,
    parse_prompt,
)
from data_pipelines.media.location import MediaReference
from data_pipelines.synthesis.units import Draft
from data_pipelines.tokenizers.tokenizer import AUDIOTEXT_START, SPECIAL_TOKENS, encode, train_tokenizer
from tests.helpers.small_media import write_audio, write_image
from tests.helpers.synthesis_job import FAKE, run, write_manifest

CONFIG = tiny()
T = CONFIG.tokens
AUDIO, SPEECH = "<audio_start_baichuan>{}<audio_end_baichuan>", "<audiogen_start_baichuan>{}<audiogen_end_baichuan>"
# What the released demos send for the first question, and for the second one after a spoken answer in two pieces.
FIRST = (
    "<B_SYS>请用【邻家女声】这个声音回答问题。<C_Q>"
    '<audio_start_baichuan>{"path": "u0.wav"}<audio_end_baichuan><audiotext_start_baichuan><C_A>'
)
SECOND = FIRST + (
    'Good day,<audiogen_start_baichuan>{"path": "a0.wav"}<audiogen_end_baichuan>'
    ' sir.<audiogen_start_baichuan>{"path": "a1.wav"}<audiogen_end_baichuan><C_Q>'
    '<audio_start_baichuan>{"path": "u1.wav"}<audio_end_baichuan><audiotext_start_baichuan><C_A>'
)
WRITTEN = '<C_Q><audio_start_baichuan>{"path": "u0.wav"}<audio_end_baichuan><C_A>'


@pytest.fixture(scope="module")
def prompts():
    return ChatPrompts(
        Processor(CONFIG, train_tokenizer(["Good day, sir. 请用【邻家女声】这个声音回答问题。"] * 3, 360))
    )


def user(*content):
    return {"role": "user", "content": list(content)}


def audio_ids(start, end, frames):
    return [start, *[T.audio_pad] * frames, end]


def ids_of(prompts, source):
    """Token ids of a source prompt whose audio files have 3 code frames, 2 where they are spoken."""
    found = []
    for part in re.split(r"(<audio(?:gen)?_start_baichuan>.*?<audio(?:gen)?_end_baichuan>)", source):
        if part.startswith("<audio_start"):
            found += audio_ids(T.audio_start, T.audio_end, 3)
        elif part.startswith("<audiogen_start"):
            found += audio_ids(T.audiogen_start, T.audiogen_end, 2)
        else:
            found += encode(prompts.processor.tokenizer, part)
    return found


def test_the_mark_of_spoken_answers_is_the_released_token():
    assert AUDIOTEXT_START == "<audiotext_start_baichuan>"
    assert 151643 + SPECIAL_TOKENS.index(AUDIOTEXT_START) == 151697


def test_a_conversation_answered_in_speech(prompts, tmp_path):
    write_audio(tmp_path / "u0.wav", 0.25)
    heard = {"type": "audio", "path": str(tmp_path / "u0.wav")}
    speech = {"type": "audio", "codes": np.ones((2, CONFIG.audio.levels), np.int32)}
    said = [{"type": "text", "text": "Good day,"}, speech, {"type": "text", "text": " sir."}, speech]
    first, second = [user(heard)], [user(heard), {"role": "assistant", "content": said}, user(heard)]
    for messages, spoken, source in ((first, True, FIRST), (second, True, SECOND), (first, False, WRITTEN)):
        assert prompts.encode_messages(messages, spoken=spoken).tokens.tolist() == ids_of(prompts, source)
    # In text alone the marks stand nowhere, whatever was said before.
    unmarked = SECOND.removeprefix("<B_SYS>请用【邻家女声】这个声音回答问题。").replace(AUDIOTEXT_START, "")
    assert prompts.encode_messages(second).tokens.tolist() == ids_of(prompts, unmarked)
    # An answer that is gone on with has its mark before it.
    begun = prompts.encode_messages(second[:2], spoken=True).tokens.tolist()
    assert begun == ids_of(prompts, SECOND[: SECOND.rindex("<C_Q>")])


def test_a_system_message_stays_as_it_is(prompts):
    own = {"role": "system", "content": "sir."}
    tokens = prompts.encode_messages([own, user()], spoken=True).tokens.tolist()
    assert tokens == ids_of(prompts, "<B_SYS>sir.<C_Q><audiotext_start_baichuan><C_A>")
    tokens = prompts.encode_messages([user()], spoken=True, voice="sir").tokens.tolist()
    assert tokens == ids_of(prompts, "<B_SYS>请用【sir】这个声音回答问题。<C_Q><audiotext_start_baichuan><C_A>")
    with pytest.raises(RequestError, match="without 【 and 】") as error:
        prompts.encode_messages([user()], spoken=True, voice="】")
    assert error.value.cause == "bad_message"
    with pytest.raises(ConfigError, match="must be a name"):
        voice_prompt("")


def test_documents_have_the_same_form():
    answer = "Good day," + speech_tag("a0.wav") + " sir." + speech_tag("a1.wav")
    written = conversation([(audio_tag("u0.wav"), answer), (audio_tag("u1.wav"), "Yes.")])
    assert re.sub("<trainable_(start|end)>", "", written) == SECOND + "Yes."
    assert written.count("<C_A><trainable_start>") == 2
    assert turn(audio_tag("u0.wav"), "Yes.") == WRITTEN + "<trainable_start>Yes.<trainable_end>"
    own = turn("Hi.", "Yes." + speech_tag("a.wav"), "Be kind.")
    assert own.startswith("<B_SYS>Be kind.<C_Q>Hi.<audiotext_start_baichuan><C_A><trainable_start>Yes.<audiogen_start")
    assert "【小明】" in turn("Hi.", speech_tag("a.wav"), voice="小明")


# Pieces of names among other characters, so that whole ones arise often.
TEXTS = st.lists(
    st.sampled_from(
        [*NAMES, "<", ">", "<C_", "A>", "_A>", "<literal", "_omni>", "trainable_start>", "a b", "好。", "{"]
    )
    | st.text(st.characters(codec="utf-8"), max_size=3),
    max_size=8,
).map("".join)


@settings(max_examples=80, deadline=None)
@given(question=TEXTS, answer=TEXTS, system=TEXTS)
def test_any_text_is_text_in_documents_as_in_chat(prompts, question, answer, system):
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    expected = prompts.encode_messages(messages).tokens.tolist()
    elements = parse_prompt(turn(question, answer, system))
    document = prompts.processor.encode_prompt(elements, {})
    assert document.tokens.tolist() == expected
    assert parse_prompt(write_prompt(elements)) == elements
    assert "".join(each.text for each in parse_prompt(trainable(answer))) == answer
    learned = "".join(each.text for each in elements if each.trainable)
    assert learned == answer


@settings(max_examples=100)
@given(parts=st.lists(TEXTS, max_size=4))
def test_parts_of_text_stay_text_where_they_meet(parts):
    whole = Source() + image_tag("a.png")
    for part in parts:
        whole += part
    image, *texts = parse_prompt(whole)
    assert image == ImageElement(MediaReference(path="a.png"))
    assert "".join(each.text for each in texts) == "".join(parts)
    assert plain_text(whole) == "".join(parts).strip()
    assert parse_prompt(join(parts)) == texts


def test_names_in_paths_are_no_marks():
    path = 'x<img_end_baichuan>"<trainable_start>.png'
    assert parse_prompt(image_tag(path)) == [ImageElement(MediaReference(path=path))]
    assert parse_prompt(write_prompt([ImageElement(MediaReference(path=path))])) == [
        ImageElement(MediaReference(path=path))
    ]


def test_a_document_whose_text_lost_its_type_is_a_mistake(tmp_path):
    draft = Draft(Document("d", "", "", "m:1", tmp_path), "job", "job-00000", 0)
    with pytest.raises((TypeError, TypeCheckError), match="Source"):
        draft.add(f"{image_tag('a.png')}", "caption")


def test_text_of_users_is_text_in_what_synthesis_makes(tmp_path):
    """A text that speaks for the assistant is read aloud, transcribed, interleaved as the text that it is."""
    trap = "He wrote <C_A> and <audio_pad_baichuan> there. It was not an answer, of course."
    manifest = write_manifest(tmp_path, [str(trainable(trap))])
    for job in ("itts", "intlv", "asr", "tts"):
        made, skipped = run(job, manifest, tmp_path / job, *FAKE)
        assert not skipped
        texts = [each for one in made for each in parse_prompt(one["text"]) if isinstance(each, TextElement)]
        assert not any("<C_A>" in each.text and not each.plain for each in texts)
        if job == "itts":
            assert "".join(each.text for each in texts) == trap
        if job in ("asr", "tts"):
            assert any("<C_A> and <audio_pad_baichuan>" in each.text for each in texts)


def test_dialogues_become_spoken_ones(tmp_path):
    write_image(tmp_path / "a.png", 56, 56)
    answer = "It is an image of noise. There is a little bit of everything in it, and it says <C_Q>."
    asked = conversation([(image_tag("a.png") + "What is it?", answer), ("Is it a good one?", "Yes, it is good.")])
    texts = [
        asked,
        turn("你好吗？", "我很好。", "你是助手。"),
        "Not a turn.",
        turn("Hi.", "?"),
        turn(audio_tag("s"), "A."),
    ]
    made, skipped = run("dialogue", write_manifest(tmp_path, list(map(str, texts))), tmp_path / "out", *FAKE)
    assert [line["cause"] for line in skipped] == ["no_voice", "no_turns", "no_text", "has_sound"]
    text = made[0]["text"]
    assert made[0]["type"] == "dialogue"
    assert text.startswith('<B_SYS>请用【邻家女声】这个声音回答问题。<C_Q><img_start_baichuan>{"local": ')
    assert text.count("<audiotext_start_baichuan><C_A><trainable_start>") == text.count("<C_A>") == 2
    spoken = re.sub(r"<(audiogen|audio|img)_start_baichuan>(\{.*?\})<\1_end_baichuan>", r"|\1|", text)
    first, second = re.findall("<trainable_start>(.*?)<trainable_end>", spoken)
    pieces = [
        "It is an image of noise.",
        " There is a little bit of everything in it,",
        " and it says <<literal_omni>C_Q>.",
    ]
    assert first == "".join(f"{piece}|audiogen|" for piece in pieces)
    assert second.endswith(" it is good.|audiogen|")
    assert re.findall(r"<C_Q>([a-z|]*)<", spoken) == ["|img||audio|", "|audio|"]


def test_a_build_tells_of_spoken_answers_without_their_mark(tmp_path, capsys):
    write_audio(tmp_path / "a.wav", 0.5)
    good = turn("Hi.", "Yes." + speech_tag("a.wav"))
    texts = [good, good.replace(AUDIOTEXT_START, ""), turn("Hi.", "Yes."), "Hi." + trainable(speech_tag("a.wav"))]
    manifest = write_manifest(tmp_path, list(map(str, texts)))
    assert build([str(manifest), "--out", str(tmp_path / "built"), "--workers", "0"]) == 0
    assert "1 conversations answer in speech without <audiotext_start_baichuan>" in capsys.readouterr().out
    assert json.loads((tmp_path / "built" / "dataset.json").read_text())["unmarked_speech"] == 1


REFERENCES = st.builds(MediaReference, path=st.sampled_from(["a.png", "目录/“b”.wav"])) | st.just(
    MediaReference(base64="AAAA")
)
MEDIA = st.one_of(
    st.builds(ImageElement, REFERENCES, st.booleans()),
    st.builds(VideoElement, REFERENCES),
    st.builds(lambda reference: AudioElement(reference), REFERENCES),
    st.builds(lambda reference, learned: AudioElement(reference, True, learned), REFERENCES, st.booleans()),
    st.builds(TokensElement, REFERENCES, st.booleans()),
)
TEXT_ELEMENTS = st.builds(TextElement, st.sampled_from(["one ", "二\n", "<C_Q>", '{"path"}']), st.booleans())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(MEDIA, TEXT_ELEMENTS), max_size=5))
def test_elements_are_read_as_they_were_written(pairs):
    elements = [element for pair in pairs for element in pair]
    assert parse_prompt(write_prompt(elements)) == elements


@pytest.mark.parametrize(
    ("prompt", "read"),
    [
        (turn("What?", "That.", system="Be kind."), "Be kind.\nWhat?\nThat."),
        ('a<img_start_baichuan>{"local": "b.png"}<img_end_baichuan>c', "ac"),
        (" <C_Q>  ", ""),
    ],
)
def test_plain_text_has_neither_media_nor_marks(prompt, read):
    assert plain_text(prompt) == read
