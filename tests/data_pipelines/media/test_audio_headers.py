"""What headers of audio files promise, format by format, and when that is believed."""

import struct
from itertools import islice

import av
import numpy as np
import pytest
import soundfile as sf

from data_pipelines.media.audio import probe_audio, read_audio
from data_pipelines.media.audio_track import AudioTrack
from data_pipelines.media.location import Media
from tests.helpers.audio_files import CLOSE, RATE, length, memory, mp3, refusal, wav
from tests.helpers.small_media import tone, write_track


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


@pytest.mark.parametrize(("frames", "damaged"), [(None, 0), (2, 1)])
def test_a_frame_too_many_of_flac_is_no_damage_where_all_is_there(frames, damaged, tmp_path, monkeypatch):
    """FFmpeg's parser gives a last one that no decoder takes for some whole files; elsewhere it is a damaged frame."""
    path = tmp_path / "a.flac"
    sf.write(path, np.sin(np.arange(12112) / 40) * 0.5, 22050)
    real = AudioTrack._packets

    def with_another(track):
        yield from islice(real(track), frames)
        another = av.Packet(bytes.fromhex("fff8690c0000") + bytes(90))
        another.stream = track.stream
        yield another

    monkeypatch.setattr(AudioTrack, "_packets", with_another)
    audio = read_audio(Media("a.flac", path), 22050)
    assert (len(audio.wave), audio.damaged) == (12112, damaged)
