"""How long an audio file is, by what its format says, and that nothing is heard that is not in the file."""

import io
import struct
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from av.stream import Disposition

from data_pipelines.errors import SampleError
from data_pipelines.media import audio_track
from data_pipelines.media.audio import decode_audio, probe_audio, read_audio
from data_pipelines.media.location import Media
from tests.helpers.small_media import media, tone, write_track, write_video

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))
from media_headers import compare, originals

RATE = 16000
CLOSE = 0.020  # seconds


def memory(data: bytes, name: str = "a") -> Media:
    return Media(name, None, bytes(data))


def length(found: Media, rate: int = RATE) -> int:
    """Samples measured, which must be those decoded."""
    samples = probe_audio(found, rate)
    assert len(read_audio(found, rate).wave) == samples
    assert len(decode_audio(found, samples, rate)) == samples
    return samples


def refusal(found: Media) -> str:
    with pytest.raises(SampleError) as caught:
        decode_audio(found, probe_audio(found, RATE), RATE)
    assert caught.value.cause == "unreadable_media"
    return str(caught.value)


def wav(seconds: float = 3.0, form: str = "WAV", subtype: str = "PCM_16") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, tone(seconds), RATE, format=form, subtype=subtype)
    return file.getvalue()


def mp3(folder: Path, seconds: float, loud: float = 1.0, xing: str = "1") -> bytes:
    path = folder / "song.mp3"
    options = {"bit_rate": 48000, "write_xing": xing}  # frames of 216 bytes
    return write_track(path, loud * tone(seconds), "libmp3lame", RATE, "mp3", **options).read_bytes()


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


class TestMp3:
    def test_tags_junk_and_joined_files(self, tmp_path):
        """Ten seconds with an encoder's delay and filling that the header counts: exactly ten seconds."""
        song = mp3(tmp_path, 10)
        image = b"APIC" + struct.pack(">I", 300_000) + bytes(2) + bytes(300_000)
        size = bytes(len(image) >> shift & 127 for shift in (21, 14, 7, 0))
        tag = b"ID3\3\0\0" + size + image
        old, ape = b"TAG" + bytes(125), b"APETAGEX" + struct.pack("<IIII", 2000, 40, 0, 0) + bytes(8 + 40)
        for data in (song, tag + song, song + old, song + ape, song + ape + old, tag + tag + song + old):
            assert length(memory(data)) == 10 * RATE
        joined = length(memory(song + song)) / RATE, length(memory(song + old + tag + song)) / RATE
        assert joined == pytest.approx((20, 20), abs=0.15)  # the delays of the second are heard
        assert length(memory(bytes(2000) + song)) / RATE == pytest.approx(10, abs=0.1)

    def test_variable_bit_rate_without_a_count(self, tmp_path):
        wave = np.concatenate([0.1 * tone(8), np.random.default_rng(0).uniform(-0.5, 0.5, 2 * RATE).astype(np.float32)])
        path = write_track(tmp_path / "a.mp3", wave, "libmp3lame", RATE, "mp3", write_xing="0")
        data = path.read_bytes()
        # Frames of another bit rate first: the length is estimated from them.
        other = write_track(
            tmp_path / "b.mp3", tone(1), "libmp3lame", RATE, "mp3", bit_rate=160000, write_xing="0"
        ).read_bytes()
        assert length(memory(other + data)) / RATE == pytest.approx(11, abs=0.25)

    def test_counts_that_lie(self, tmp_path):
        """Fewer frames than there are: measured; more: truncated. VBRI counts, too."""
        song = bytearray(mp3(tmp_path, 4))
        place = max(song.find(b"Xing"), song.find(b"Info")) + 8
        (frames,) = struct.unpack(">I", song[place : place + 4])
        song[place : place + 4] = struct.pack(">I", frames // 2)
        assert length(memory(song)) / RATE == pytest.approx(4, abs=0.15)
        song[place : place + 4] = struct.pack(">I", 2 * frames)
        assert "truncated" in refusal(memory(song))
        plain = mp3(tmp_path, 4, xing="0")
        plain = plain[plain.index(b"\xff\xf3") :]
        head = plain[:4] + bytes(32) + b"VBRI" + struct.pack(">HHHII", 1, 0, 0, len(plain), frames)
        assert length(memory(head.ljust(216, b"\0") + plain)) / RATE == pytest.approx(4, abs=0.2)
        assert "truncated" in refusal(memory(head.ljust(216, b"\0") + plain[: len(plain) // 2]))


PLACEHOLDERS = {
    "SoX to a pipe": (0x7FFFF024, 0x7FFFF000),
    "arecord to a pipe": (0x80000024, 0x80000000),
    "INT32_MAX": (0x7FFFFFFF, 0x7FFFFFFF),
    "INT32_MAX less the header": (0x7FFFFFFF, 0x7FFFFFDB),
    "never finished": (0, 0),
    "never finished, of nothing": (36, 0),
    "ffmpeg to a pipe": (0xFFFFFFFF, 0xFFFFFFFF),
    "the largest less the header": (0xFFFFFFFF, 0xFFFFFFDB),
}


class TestWav:
    good = wav()

    def sized(self, riff: int, data: int, behind: bytes = b"") -> Media:
        good = self.good
        head = good[:4] + struct.pack("<I", riff) + good[8:40] + struct.pack("<I", data)
        return memory(head + good[44:] + behind)

    @pytest.mark.parametrize("name", PLACEHOLDERS)
    def test_sizes_that_stand_for_nothing(self, name):
        assert length(self.sized(*PLACEHOLDERS[name])) == 3 * RATE

    def test_sizes_that_count_the_header(self):
        size = len(self.good)
        for riff, data in ((size, size - 44), (size + 36, size - 44), (size - 8, size), (size - 8, size - 8)):
            assert length(self.sized(riff, data)) == 3 * RATE

    def test_the_chunk_is_the_promise(self):
        """Chunks behind it are no audio; sizes of RIFF that are wrong harm nothing; a shorter file is truncated."""
        size = len(self.good) - 44
        note = b"LIST" + struct.pack("<I", 5) + b"notes"  # without the byte that makes it even
        assert length(self.sized(20, size, note)) == length(self.sized(0xFFFF, size, note + b"\0")) == 3 * RATE
        assert length(self.sized(len(self.good) - 8, size // 2)) == 3 * RATE // 2
        assert "truncated: 96044 of 192044 bytes" in refusal(self.sized(len(self.good) - 8, 2 * size))
        for data in (self.good[:-200], self.good[: len(self.good) // 2]):
            assert "truncated" in refusal(memory(data))
        assert "holds no audio" in refusal(memory(wav(0)))
        assert "holds no audio" in refusal(memory(wav(0) + note))

    def test_odd_sizes(self):
        good = wav(1, subtype="PCM_U8")
        assert length(memory(good[:40] + struct.pack("<I", 15999) + good[44:-1])) == 15999

    def test_other_kinds(self):
        """Sizes of 64 bits, other orders of bytes, 24 bits, floats, companded and ADPCM."""
        assert length(memory(wav(form="RF64"))) == 3 * RATE
        long = wav(form="RF64")
        place = long.index(b"ds64") + 16
        for size in (0, 2**64 - 1, 2**63 - 1, 2**31):
            assert length(memory(long[:place] + struct.pack("<Q", size) + long[place + 8 :])) == 3 * RATE
        assert "truncated" in refusal(memory(long[: len(long) // 2]))
        for subtype in ("PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW"):
            assert length(memory(wav(form="WAVEX", subtype=subtype))) == 3 * RATE
        for subtype in ("MS_ADPCM", "IMA_ADPCM"):  # the last block is filled up
            assert 3 <= length(memory(wav(subtype=subtype))) / RATE < 3 + 1024 / RATE


@pytest.mark.parametrize(("form", "name"), [("AIFF", "a.aiff"), ("AU", "a.au"), ("CAF", "a.caf"), ("W64", "a.w64")])
@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT", "ULAW"])
def test_other_files_of_plain_samples(form, name, subtype):
    good = wav(3, form, subtype)
    assert length(memory(good, name)) == 3 * RATE
    width = {"PCM_16": 2, "PCM_24": 3, "FLOAT": 4, "ULAW": 1}[subtype]
    error = 2.0**-14 if subtype != "ULAW" else 0.02
    np.testing.assert_allclose(read_audio(memory(good), RATE).wave, tone(3), atol=error)
    assert "truncated" in refusal(memory(good[: -width * RATE], name))


def test_lossless_caf():
    """Apple's ALAC, whose last packet is shorter than the others: 3 s are eleven of 4096 samples, and 2944."""
    found = memory(wav(3, "CAF", "ALAC_16"), "memo.caf")
    assert length(found) == 3 * RATE
    np.testing.assert_allclose(read_audio(found, RATE).wave, tone(3), atol=2.0**-14)


def test_sphere():
    """Of NIST, in its three codes. Cut ones are refused, and so is what Shorten has packed, if it cannot be read."""
    for subtype in ("PCM_16", "ULAW", "ALAW"):
        assert length(memory(wav(3, "NIST", subtype), "timit.wav")) == 3 * RATE
    good = wav(3, "NIST")
    assert "truncated" in refusal(memory(good[:-RATE]))
    assert refusal(memory(good.replace(b"-s3 pcm", b"-s26 pcm,embedded-shorten-v2.00", 1)))


def test_sizes_that_writers_to_a_pipe_leave_in_other_files():
    au, aiff, caf = (wav(3, form) for form in ("AU", "AIFF", "CAF"))
    assert length(memory(au[:8] + b"\xff\xff\xff\xff" + au[12:])) == 3 * RATE
    sound, frames = aiff.index(b"SSND") + 4, aiff.index(b"COMM") + 10
    assert length(memory(aiff[:frames] + bytes(4) + aiff[frames + 4 :])) == 3 * RATE
    assert "truncated" in refusal(memory(aiff[:sound] + b"\0\1\x80\0" + aiff[sound + 4 :]))
    for size in (b"\0\0\0\0", b"\0\0\0\x08", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff"):
        unfinished = aiff[:frames] + bytes(4) + aiff[frames + 4 : sound] + size + aiff[sound + 4 :]
        assert length(memory(unfinished[:4] + bytes(4) + unfinished[8:])) == 3 * RATE
    w64 = wav(3, "W64")
    data = w64.index(b"data") + 16
    for size in (0, 24, 2**64 - 1, 2**63 - 1):
        assert length(memory(w64[:data] + struct.pack("<Q", size) + w64[data + 8 :])) == 3 * RATE
    sphere = wav(3, "NIST")
    assert length(memory(sphere.replace(b"48000", b"0    ", 1))) == 3 * RATE
    data = caf.index(b"data") + 4
    assert length(memory(caf[:data] + b"\xff" * 8 + caf[data + 8 :])) == 3 * RATE


class TestFlac:
    @pytest.fixture(scope="class")
    def good(self):
        return wav(3, "FLAC")

    def counting(self, good: bytes, samples: int) -> bytes:
        packed = int.from_bytes(good[18:26], "big") >> 36 << 36 | samples
        return good[:18] + packed.to_bytes(8, "big") + good[26:]

    def test_counts(self, good):
        """0 or all ones is a writer that could not come back; too few is no end; too many is a file that was cut."""
        for samples in (3 * RATE, 0, RATE, 2**36 - 1):
            assert length(memory(self.counting(good, samples))) == 3 * RATE
        assert "truncated" in refusal(memory(self.counting(good, 4 * RATE)))
        assert "truncated" in refusal(memory(good[: len(good) // 2]))
        assert length(memory(b"ID3\4\0\0\0\0\1\0" + bytes(128) + good)) == 3 * RATE

    def test_a_damaged_frame_is_silent_and_counted(self, good):
        """With the few that FFmpeg takes for its rest; all others are as they were, at their places."""
        data = bytearray(good)
        data[len(data) // 2] ^= 0x55
        found, whole = read_audio(memory(data), RATE), read_audio(memory(good), RATE).wave
        assert found.damaged == 1
        assert len(found.wave) == probe_audio(memory(data), RATE) == 3 * RATE
        differs = np.flatnonzero(found.wave != whole)
        assert 0 < np.ptp(differs) < 4 * 4096 < differs.min() < 2 * RATE


class TestOgg:
    @pytest.fixture(scope="class")
    def opus(self, tmp_path_factory):
        path = tmp_path_factory.mktemp("ogg") / "a.ogg"
        return write_track(path, tone(3, 48000), "libopus", 48000, "ogg", page_duration="200000").read_bytes()

    def test_opus(self, opus):
        assert length(memory(opus)) == 3 * RATE
        assert length(memory(opus + opus)) == pytest.approx(6 * RATE, abs=CLOSE * RATE)

    def test_without_an_end_mark(self, opus):
        """Cut after a page: nothing says that there was more."""
        cut = opus[: opus.rindex(b"OggS")]
        assert length(memory(cut)) / RATE == pytest.approx(3, abs=0.25)

    def test_a_damaged_page_is_left_out_and_counted(self, opus):
        """0.2 s of 3: FFmpeg passes over a page whose checksum is wrong, and says nothing."""
        pages = [place for place in range(len(opus)) if opus.startswith(b"OggS", place)]
        data = bytearray(opus)
        data[pages[7] + 60] ^= 0xFF
        found = memory(data)
        assert length(found) / RATE == pytest.approx(2.8, abs=CLOSE)
        assert read_audio(found, RATE).damaged == 1

    def test_vorbis(self):
        vorbis = wav(3, "OGG", "VORBIS")
        assert length(memory(vorbis)) == pytest.approx(3 * RATE, abs=CLOSE * RATE)
        assert length(memory(vorbis + vorbis)) == pytest.approx(6 * RATE, abs=2 * CLOSE * RATE)

    def test_opus_cut_out_of_a_longer_stream(self, opus):
        """Its clock begins at the tenth second: only what is there counts."""
        pages = [b"OggS" + page for page in opus.split(b"OggS")[1:]]
        late = []
        for number, page in enumerate(pages):
            (granule,) = struct.unpack("<q", page[6:14])
            granule += 480_000 if number > 1 else 0
            late.append(page[:6] + struct.pack("<q", granule) + page[14:])
        from media_headers import with_checksums

        assert length(memory(with_checksums(b"".join(late)))) / RATE == pytest.approx(3, abs=CLOSE)


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
