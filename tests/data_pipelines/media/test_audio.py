"""How long an audio file is, by what its format says, and that nothing is heard that is not in the file."""

import sys
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition

from data_pipelines.errors import SampleError
from data_pipelines.media import audio_track
from data_pipelines.media.audio import decode_audio, probe_audio, read_audio
from data_pipelines.media.location import Media
from tests.helpers.audio_files import CLOSE, RATE, length, memory, mp3, refusal, wav
from tests.helpers.small_media import media, tone, write_track, write_video

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))
from media_headers import compare, originals


class TestNothingElseIsHeard:
    """What a decoder did not fill is never returned: not memory of the process, not another file's audio."""

    @pytest.fixture(autouse=True)
    def poisoned(self, monkeypatch):
        """New arrays are full of a value that no file here holds."""
        empty = np.empty

        def poison(shape, dtype=float, *arguments, **options):
            array = empty(shape, dtype, *arguments, **options)
            if array.dtype.kind == "f":
                array.fill(0.99)
            return array

        monkeypatch.setattr(np, "empty", poison)

    def test_in_any_container_after_any_other_file(self):
        """Each file decodes alike before and after loud ones, and is nowhere louder than what was encoded."""
        loud = memory(wav(subtype="FLOAT"), "loud.wav")
        for original in originals():
            found = memory(original.data, original.name)
            first = read_audio(found, RATE)
            decode_audio(loud, 3 * RATE, RATE)
            again = read_audio(found, RATE)
            np.testing.assert_array_equal(first.wave, again.wave)
            assert first.damaged == 0
            assert 0.2 < np.abs(first.wave).max() < 0.6, original.name
            assert len(first.wave) == probe_audio(found, RATE)

    @pytest.mark.parametrize("share", [0.1, 0.3, 0.7, 0.95])
    def test_a_cut_mp3_is_truncated_by_its_own_count_of_frames(self, tmp_path, share):
        read_audio(memory(mp3(tmp_path, 4)), RATE)
        whole = mp3(tmp_path, 10, loud=0.1)
        assert "truncated" in refusal(memory(whole[: int(len(whole) * share)]))

    def test_a_whole_mp3_without_a_count(self, tmp_path):
        """Frames of 576 samples at 16 kHz, each of them heard, and nothing behind the last."""
        streamed = memory(mp3(tmp_path, 10, loud=0.1, xing="0"))
        waves = []
        for _ in range(3):
            waves.append(read_audio(streamed, RATE).wave)
            read_audio(memory(mp3(tmp_path, 14)), RATE)
        assert len(waves[0]) == probe_audio(streamed, RATE) == 576 * (len(streamed.data) // 216)
        assert np.abs(waves[0]).max() < 0.1
        for wave in waves:
            np.testing.assert_array_equal(wave, waves[0])

    def test_a_library_that_fills_less_than_it_was_asked_for(self, monkeypatch):
        """Past what the decoder gave the wave is silence, and only for the 0.1 s that a promise may be off."""
        promise = audio_track.Promise(3 * RATE + 1000, 0, RATE, 1)
        monkeypatch.setattr(audio_track, "_header_promise", lambda media: promise)
        found = read_audio(memory(wav()), RATE)
        assert (len(found.wave), found.damaged) == (3 * RATE + 1000, 1)
        assert not found.wave[3 * RATE :].any()
        promise = audio_track.Promise(3 * RATE + 2000, 0, RATE, 1)
        assert "truncated" in refusal(memory(wav()))


STREAMED = {  # codec, container, rate, packet, options
    "a.aac": ("aac", "adts", 16000, {}),
    "a.ts": ("aac", "mpegts", 44100, {}),
    "a.mkv": ("aac", "matroska", 44100, {}),
    "a.webm": ("libopus", "webm", 48000, {}),
    "live.webm": ("libopus", "webm", 48000, {"live": "1"}),
    "a.mp4": ("aac", "mp4", 44100, {}),
    "parts.mp4": ("aac", "mp4", 44100, {"movflags": "frag_every_frame+empty_moov"}),
    "lossless.m4a": ("alac", "mp4", 44100, {}),
    "a.mov": ("pcm_s16le", "mov", 44100, {}),
    "a.avi": ("libmp3lame", "avi", 44100, {}),
}


class TestPackets:
    @pytest.mark.parametrize("start", [0, 100])
    @pytest.mark.parametrize("name", STREAMED)
    def test_lengths_whatever_the_clock(self, tmp_path, name, start):
        """Three seconds; a codec fills its last packet, and where its delay is not told, one more."""
        codec, form, rate, options = STREAMED[name]
        path = write_track(tmp_path / name, tone(3, rate), codec, rate, form, start * rate, **options)
        filling = 2 * 1152 / rate if codec in ("aac", "libmp3lame") else CLOSE
        assert 3 - 1 / rate <= length(media(path), rate) / rate <= 3 + filling

    def test_the_encoder_delay_is_not_heard(self, tmp_path):
        """An edit list tells it: a click stays where it was."""
        wave = np.zeros(44100, np.float32)
        wave[22050] = 0.9
        path = write_track(tmp_path / "a.m4a", wave, "aac", 44100, "mp4", movflags="faststart")
        heard = read_audio(media(path), 44100).wave
        assert abs(int(np.abs(heard).argmax()) - 22050) < 5

    @pytest.mark.parametrize("name", ["a.m4a", "parts.mp4", "a.mkv", "a.avi"])
    def test_cut_videos_are_truncated(self, tmp_path, name):
        options = {"a.m4a": {"movflags": "faststart"}, "parts.mp4": STREAMED["parts.mp4"][3]}.get(name, {})
        form = {"mkv": "matroska", "avi": "avi"}.get(name[-3:], "mp4")
        codec = "libmp3lame" if form == "avi" else "aac"
        data = write_track(tmp_path / name, tone(10, 44100), codec, 44100, form, **options).read_bytes()
        for share in (0.3, 0.7, 0.98):
            assert "truncated" in refusal(memory(data[: int(len(data) * share)], name)), share

    def test_amr(self):
        """Frames of 20 ms at 8 kHz, here of 12.2 kbit/s: 31 bytes behind the head."""
        assert probe_audio(memory(b"#!AMR\n" + 50 * (b"\x3c" + bytes(31)), "a.amr"), 8000) == 8000

    @pytest.mark.parametrize(("name", "form"), [("a.m4a", "mp4"), ("a.mkv", "matroska")])
    def test_a_damaged_packet_costs_itself(self, tmp_path, name, form):
        """One of a hundred and thirty; when a third is damaged the file is refused."""
        path = write_track(tmp_path / name, tone(3, 44100), "aac", 44100, form)
        good, data = read_audio(media(path), 44100), bytearray(path.read_bytes())
        with av.open(str(path)) as container:
            packets = [bytes(packet) for packet in container.demux(audio=0) if packet.size]
        places = [data.index(packet) for packet in packets if len(packet) > 60][10:]

        def damage(places: list[int]) -> Media:
            damaged = bytearray(data)
            for place in places:
                damaged[place : place + 40] = b"\xff" * 40
            return memory(damaged, name)

        found = read_audio(damage(places[20:21]), 44100)
        assert found.damaged == 1
        assert len(good.wave) - len(found.wave) in (0, 1024)
        assert len(found.wave) == probe_audio(damage(places[20:21]), 44100)
        assert "packets are damaged" in refusal(damage(places[::3]))

    def test_what_a_decoder_makes_of_damage_is_not_heard(self, tmp_path, monkeypatch):
        """Noise beyond any audio is a damaged packet; of plain samples it is what the file says, and refused."""
        path = write_track(tmp_path / "a.aac", tone(3, 44100), "aac", 44100, "adts")
        decoded, count = audio_track._mono, 0

        def mono(frame: av.AudioFrame) -> np.ndarray:
            nonlocal count
            count += 1
            return decoded(frame) * (1e3 if count == 30 else 1)

        good = read_audio(media(path), 44100).wave
        monkeypatch.setattr(audio_track, "_mono", mono)
        found = read_audio(media(path), 44100)
        assert (found.damaged, len(found.wave)) == (1, len(good))
        assert not found.wave[29 * 1024 : 30 * 1024].any()
        count = 29
        with pytest.raises(SampleError, match="full scale"):
            read_audio(memory(wav(3, "WAV", "FLOAT")), RATE)

    def test_a_damaged_cluster_is_no_cut(self, tmp_path):
        """Matroska whose size says that it is whole, of which the last tenth cannot be found: no truncation."""
        wave = np.random.default_rng(0).uniform(-0.3, 0.3, 20 * 48000).astype(np.float32)
        options = {"cluster_time_limit": "2000"}
        data = write_track(tmp_path / "a.webm", wave, "libopus", 48000, "webm", **options).read_bytes()
        clusters = [place for place in range(len(data)) if data.startswith(b"\x1f\x43\xb6\x75", place)]
        assert len(clusters) == 11  # nine of them hold 18 s

        def without(number: int) -> Media:
            return memory(data[: clusters[number]] + bytes(len(data) - clusters[number]), "a.webm")

        assert length(without(9)) / RATE == pytest.approx(18, abs=0.1)
        assert read_audio(without(9), RATE).damaged == 1
        assert "too much of the file is damaged: 10.0 of 20.0 s" in refusal(without(5))
        assert "truncated" in refusal(memory(data[: clusters[9]], "a.webm"))

    def test_the_audio_of_a_video_is_its_default_track(self, tmp_path):
        path = tmp_path / "two.mkv"
        with av.open(str(path), "w") as video:
            tracks = [video.add_stream("pcm_f32le", rate=RATE, layout="mono") for _ in range(2)]
            tracks[0].disposition, tracks[1].disposition = Disposition(0), Disposition.default
            for track, loud in zip(tracks, (0.8, 0.2), strict=True):
                frame = av.AudioFrame.from_ndarray(loud * tone(2)[None], format="flt", layout="mono")
                frame.sample_rate, frame.pts = RATE, 0
                video.mux(track.encode(frame))
        assert np.abs(read_audio(media(path), RATE).wave).max() == pytest.approx(0.1, abs=0.01)


class TestRefusals:
    @pytest.mark.parametrize(
        ("head", "name"),
        [
            (b"MThd\0\0\0\6", "MIDI"),
            (b"wvpk", "WavPack"),
            (b"MAC \x96\x0f", "Monkey's Audio"),
            (b"\x02#!SILK_V3", "SILK"),
            (b"Creative Voice File\x1a", "VOC"),
            (b"FORM\0\1\0\0008SVX", "8SVX"),
            (b"DSD \x1c", "DSD"),
            (b"\x64\xa3\x02\x00", "IRCAM"),
            (b" paf", "PARIS"),
            (b"\x0b\x77", "AC-3"),
        ],
    )
    def test_formats_are_named(self, tmp_path, head, name):
        path = tmp_path / "memo.bin"
        path.write_bytes(head + bytes(np.random.default_rng(0).integers(0, 256, 5000, np.uint8)))
        message = refusal(media(path))
        assert name in message
        assert message.startswith("memo.bin ")

    def test_no_message_holds_a_path_or_an_object(self, tmp_path):
        for data in (
            b"\x00" * 999,
            b"RIFF\0\0\0\0WAVEfmt ",
            b"ID3" + bytes(500),
            b"OggS" + bytes(900),
            b"fLaC" + bytes(90),
        ):
            path = tmp_path / "broken.mp3"
            path.write_bytes(data)
            message = refusal(media(path))
            assert str(tmp_path) not in message
            assert "<" not in message
            assert "Errno" not in message

    def test_a_video_without_audio(self, tmp_path):
        assert "no audio track" in refusal(media(write_video(tmp_path / "mute.mp4", 1)))


def test_headers_that_lie(tmp_path):
    """One file of every container with a field or two set to something else; benchmarks/media_headers.py tries more."""
    outcomes = compare(len(originals()), 3, tmp_path)
    assert not [outcome for outcome in outcomes if outcome.wrong]
    assert sum(not outcome.cause for outcome in outcomes) > 10
