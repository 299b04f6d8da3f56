"""Codes to sound: streamed as in one piece, whatever comes how; joins; the same sound again; what is refused."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from baichuan_omni_jax.audio.decoder import AudioDecoder
from baichuan_omni_jax.audio.encoder import ResidualQuantizer
from baichuan_omni_jax.config import MeshConfig, tiny
from baichuan_omni_jax.config.vocoder import VocoderConfig
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.flow.matching import sample_mel
from baichuan_omni_jax.flow.model import FlowDecoder
from baichuan_omni_jax.generation import speech_decoder as speech
from baichuan_omni_jax.generation.speech_decoder import CrossFade, SpeechDecoder
from baichuan_omni_jax.nn.param import ComputePolicy, named_variables, with_values
from baichuan_omni_jax.sharding import make_mesh
from baichuan_omni_jax.vocoder.model import Vocoder, draw_noise, reach
from baichuan_omni_jax.vocoder.streaming import WaveStream
from tests.helpers.golden import golden_path

KEY, COMPUTE = jax.random.key(0), ComputePolicy(attention="reference", remat="none")
# Few layers of each kind: compiling is what these tests wait for.
VOCODER = VocoderConfig(
    in_channels=20,
    base_channels=16,
    upsample_rates=(3, 2),
    upsample_kernel_sizes=(7, 4),
    resblock_kernel_sizes=(3,),
    resblock_dilation_sizes=((3,),),
    source_resblock_kernel_sizes=(3, 3),
    source_resblock_dilation_sizes=((1,), (1,)),
    f0_cond_channels=8,
)
CFG = dataclasses.replace(
    tiny(),
    audio=dataclasses.replace(tiny().audio, decoder_layers=1),
    flow=dataclasses.replace(tiny().flow, num_mid_blocks=1, n_blocks=1, prenet_layers=1, hop_length=VOCODER.hop_length),
)
HOP, FADE = VOCODER.hop_length, 240
PADDED = speech._padded


@pytest.fixture(autouse=True, scope="module")
def quickly_compiled():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def branches():
    rng = np.random.default_rng(0)

    def untrained(make):
        """The module with random weights, drawn by numpy: no program to compile."""
        abstract = jax.eval_shape(make)
        ones = ("scale", "alpha", "weight_g")
        draw = lambda name, v: np.ones(v.shape) if name.endswith(ones) else 0.2 * rng.standard_normal(v.shape)  # noqa: E731
        values = {name: jnp.asarray(draw(name, v), jnp.float32) for name, v in named_variables(abstract).items()}
        return with_values(abstract, values)

    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        vocoder = untrained(lambda: Vocoder(KEY, VOCODER, COMPUTE))
        # A bias that makes it speak, and softly: untrained pitch is not voiced, untrained bodies clip.
        vocoder.f0_predictor.classifier.bias[...] = jnp.full((1,), 150.0)
        vocoder.conv_post.weight_g[...] = 0.1 * vocoder.conv_post.weight_g[...]
        return {
            "audio_encoder": SimpleNamespace(quantizer=untrained(lambda: ResidualQuantizer(KEY, CFG.audio, COMPUTE))),
            "audio_decoder": untrained(lambda: AudioDecoder(KEY, CFG.audio, CFG.post_net, COMPUTE)),
            "flow": untrained(lambda: FlowDecoder(KEY, CFG.flow, COMPUTE)),
            "vocoder": vocoder,
        }


@pytest.fixture(scope="module")
def speaker(branches):
    """All it does is padded to two chunks: one program instead of two for each step. The slow tests pad as users do."""
    with pytest.MonkeyPatch.context() as patch, jax.default_matmul_precision("highest"):
        patch.setattr(speech, "_padded", lambda count, step: 2 * step)
        yield SpeechDecoder(branches, CFG)


def some_codes(frames: int, seed: int = 0, cfg=CFG) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([rng.integers(0, size, frames) for size in cfg.audio.codebook_sizes], -1).astype(np.int32)


def streamed(stream, codes: np.ndarray, at_once: int) -> np.ndarray:
    pushed = [stream.push(codes[i : i + at_once]) for i in range(0, len(codes), at_once)]
    return np.concatenate([*pushed, stream.close()])


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def test_a_stream_is_the_whole_but_for_the_first_normalisation(speaker, monkeypatch):
    """45 code frames, two chunks. What the last chunk makes, with all codes there, is the whole's to 1e-4; the first
    chunk's mel, whose GroupNorm counts the codes that were there, to 3e-2."""
    codes, made = some_codes(45), []
    sample_mel = speaker.sample_mel
    whole = speaker.speak(codes)
    monkeypatch.setattr(speaker, "sample_mel", lambda mu, start: made.append(sample_mel(mu, start)) or made[-1])
    wave = streamed(speaker.stream(), codes, 7)
    first, last = made
    assert len(first) == 100
    assert len(last) == len(whole.mel) == 4 * 45 - 1
    assert distance(last, whole.mel) < 1e-4
    assert 0 < distance(first, whole.mel[:100]) < 3e-2
    assert wave.shape == whole.wave.shape == (179 * HOP,)
    assert distance(wave, whole.wave) < 5e-2
    # What only the last chunk's mel reaches. The sines' phases still come from before.
    apart = (100 + speaker.reach) * HOP
    assert distance(wave[apart:], whole.wave[apart:]) < 2e-2


def test_windows_of_the_vocoder_are_exact(speaker):
    """A mel in three parts sounds as in one piece to 1e-4 of the loudest, phases of nine sines included."""
    mel = np.random.default_rng(1).standard_normal((179, 20)).astype(np.float32)
    whole = speaker.windows(200)(mel, 0, True)
    stream, fade = speaker.wave_stream(), CrossFade(FADE)
    parts = [fade.push(stream.push(part, last)) for part, last in ((mel[:90], False), (mel[90:], True))]
    assert distance(np.concatenate([*parts, fade.close()]), whole) < 1e-4
    # And its reach is no larger than need be: within it something does change.
    near, far = mel.copy(), mel.copy()
    near[100 + 1], far[100 + speaker.reach + 1] = 3, 3
    frame = slice(100 * HOP, 101 * HOP)
    assert distance(speaker.windows(200)(near, 0, True)[frame], whole[frame]) > 1e-2
    assert distance(speaker.windows(200)(far, 0, True)[frame], whole[frame]) < 1e-5


@pytest.mark.slow
def test_sound_does_not_depend_on_how_codes_come(speaker):
    """Bit for bit; two streams at once do not disturb each other; no length compiles another program."""
    codes, others = some_codes(45), some_codes(45, seed=1)
    expected, other = streamed(speaker.stream(), codes, 45), streamed(speaker.stream(), others, 45)
    speaker.speak(codes)
    compiled = speaker.compiles
    one, two = speaker.stream(), speaker.stream()
    ones, twos = [], []
    for i in range(45):
        ones.append(one.push(codes[i : i + 1]))
        twos.append(two.push(others[i : i + 1]))
    assert [len(x) > 0 for x in ones].index(True) == speaker.chunk  # the 26th code frame
    np.testing.assert_array_equal(np.concatenate([*ones, one.close()]), expected)
    np.testing.assert_array_equal(np.concatenate([*twos, two.close()]), other)
    assert len(streamed(speaker.stream(), some_codes(33), 5)) == (4 * 33 - 1) * HOP
    speaker.speak(some_codes(50))
    assert speaker.compiles == compiled


@pytest.mark.slow
def test_stretches_share_ten_milliseconds(speaker):
    """Away from the join they are what they are alone."""
    codes = some_codes(45)
    alone = streamed(speaker.stream(), codes, 45)
    stream = speaker.stream()
    wave = np.concatenate([stream.push(codes, last=True), stream.push(codes, last=True), stream.close()])
    assert len(wave) == 2 * len(alone) - FADE
    np.testing.assert_array_equal(wave[: len(alone) - FADE], alone[:-FADE])
    np.testing.assert_array_equal(wave[len(alone) :], alone[FADE:])


def test_a_cross_fade_keeps_what_both_sides_say():
    fade, wave = CrossFade(4), np.arange(20, dtype=np.float32)
    pieces = [fade.push(wave[:9]), fade.push(wave[5:12]), fade.push(wave[:0]), fade.push(wave[8:]), fade.close()]
    np.testing.assert_allclose(np.concatenate(pieces), wave, atol=1e-5)
    assert len(pieces[0]) == 5
    fade.push(np.ones(4, np.float32))
    np.testing.assert_allclose(fade.push(np.zeros(8, np.float32)), [0.875, 0.625, 0.375, 0.125])


def test_the_key_alone_decides_the_noise(branches, speaker, monkeypatch):
    """Ten steps of sampling: the same key, the same mel and wave, to the last bit; another seed, others."""
    assert CFG.flow.diffusion_steps == 10
    codes = some_codes(45)
    once, again = speaker.speak(codes), speaker.speak(codes)
    monkeypatch.setattr(
        speaker, "_keys", SpeechDecoder(branches, CFG, seed=1)._keys
    )  # with the programs compiled already
    other = speaker.speak(codes)
    np.testing.assert_array_equal(once.mel, again.mel)
    np.testing.assert_array_equal(once.wave, again.wave)
    assert distance(other.mel, once.mel) > 1e-2
    assert distance(other.wave, once.wave) > 1e-3


@pytest.mark.slow
def test_without_a_vocoder_griffin_and_lim_speak(branches):
    """As long, and about as loud (a factor of 1.5 each fifth of a second); its windows do not share phases."""
    cfg = dataclasses.replace(CFG, flow=dataclasses.replace(CFG.flow, hop_length=480))
    speaker = SpeechDecoder({name: branches[name] for name in branches if name != "vocoder"}, cfg)
    assert (speaker.vocoder, speaker.rate) == ("griffin_lim", 24000)
    mel = -3 + 0.5 * np.random.default_rng(0).standard_normal((60, 20)).astype(np.float32)
    whole = speaker.windows(200)(mel, 0, True)
    stream, fade = speaker.wave_stream(), CrossFade(FADE)
    parts = [fade.push(stream.push(part, last)) for part, last in ((mel[:40], False), (mel[40:], True))]
    wave = np.concatenate([*parts, fade.close()])
    assert len(wave) == len(whole) == 60 * 480
    loudness = (np.sqrt((x.reshape(6, -1) ** 2).mean(1)) for x in (wave, whole))
    ratio = np.divide(*loudness)
    assert (ratio > 1 / 1.5).all()
    assert (ratio < 1.5).all()


def test_what_cannot_be_spoken_is_refused(branches, speaker):
    with pytest.raises(ConfigError, match="speech needs the branch flow; there are audio_encoder, audio_decoder"):
        SpeechDecoder({name: branches[name] for name in ("audio_encoder", "audio_decoder")}, CFG)
    with pytest.raises(ValueError, match=r"codes \(3, 7\): expected \(frames, 8\)"):
        speaker.speak(some_codes(3)[:, :7])
    wrong = some_codes(3)
    wrong[2, 1] = CFG.audio.codebook_sizes[1]
    stream = speaker.stream()
    with pytest.raises(ValueError, match="code 48 of frame 2, level 1: the codebook has 48"):
        stream.push(wrong)
    assert len(stream.close()) == 0
    with pytest.raises(ValueError, match="closed"):
        stream.push(some_codes(3))
    nothing = speaker.speak(some_codes(0))
    assert (nothing.mel.shape, nothing.wave.shape) == ((0, 20), (0,))


@pytest.mark.slow
def test_the_fixtures_speak_alike_whole_and_streamed(monkeypatch):
    """Released computation at fixture sizes. Whole: the branches one after the other to 1e-4 (mel), 2e-3 (wave).
    Streamed, 60 code frames: first chunk's mel to 1e-2, wave to 5e-3; both say the same before and after."""
    from baichuan_omni_jax.verify.fixtures import Fixtures, exact_arithmetic

    monkeypatch.setattr(speech, "_padded", PADDED)  # the other tests need one size alone
    fixtures = Fixtures(golden_path("omni_a"))
    with exact_arithmetic():
        names = ("audio_encoder", "audio_decoder", "flow", "vocoder")
        models = {name: fixtures.branch(name) for name in names}
        speaker, codes = SpeechDecoder(models, fixtures.config), some_codes(60, cfg=fixtures.config)
        whole = speaker.speak(codes)
        noise_key, wave_key = jax.random.split(jax.random.key(0))

        @jax.jit
        def directly(models, codes):
            frames = jnp.arange(4 * codes.shape[1] - 1)
            decoded = models["audio_decoder"](models["quantizer"].decode(codes), jnp.full(1, codes.shape[1]))
            each = lambda frame: jax.random.normal(jax.random.fold_in(noise_key, frame), (20,))  # noqa: E731
            mel = sample_mel(models["flow"], decoded.hidden, decoded.hidden_lengths, jax.vmap(each)(frames)[None])
            noise = draw_noise(wave_key, frames, fixtures.vocoder_config)
            return mel[0], models["vocoder"](mel, decoded.hidden_lengths, *noise)[0]

        models["quantizer"] = models.pop("audio_encoder").quantizer
        mel, wave = directly(models, codes[None])
        assert distance(whole.mel, np.asarray(mel)) < 1e-4
        assert distance(whole.wave, np.asarray(wave)) < 2e-3
        assert distance(streamed(speaker.stream(), codes, 10), whole.wave) < 5e-3


def test_lengths_are_padded_to_few_sizes():
    assert [PADDED(chunks * 100 - 1, 100) // 100 for chunks in range(1, 14)] == [
        *(1, 2, 4, 4, 6, 6, 8, 8, 12, 12, 12, 12, 16)
    ]
    assert PADDED(120, 50) == 200


def test_reach_at_released_sizes():
    assert reach(VocoderConfig()) == 21
    room = {"reach": 21, "hop": 480, "fade": FADE}
    assert WaveStream.longest(100, **room) == 143
