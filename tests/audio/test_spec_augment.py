"""Masks on what the encoder hears: how much, where, and that nothing but key and place decides."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from baichuan_omni_jax.audio.mel_training import spec_augment
from baichuan_omni_jax.config import MeshConfig, SpecAugmentConfig
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.nn.param import ComputePolicy
from baichuan_omni_jax.sharding import make_mesh

CLIPS, FRAMES, BANDS, KEY = 400, 90, 24, jax.random.key(0)
LENGTHS = np.random.default_rng(0).integers(0, FRAMES + 1, CLIPS).astype(np.int32)
TIME = SpecAugmentConfig(mask_time_prob=0.2, mask_time_length=6)
BOTH = replace(TIME, mask_feature_prob=0.3, mask_feature_length=5, mask_feature_min_masks=1)
augment = jax.jit(spec_augment, static_argnums=(3, 4))


@pytest.fixture(autouse=True, scope="module")
def quickly_compiled():
    """Compiling is nearly all of the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True)
def mesh():
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        yield


def masked(config, key=KEY, lengths=LENGTHS):
    """Which values are masked (c, f, mels); the others are as they were."""
    mel = np.ones((len(lengths), FRAMES, BANDS), np.float32)
    made = np.asarray(augment(key, jnp.asarray(mel), jnp.asarray(lengths), config, ComputePolicy()))
    assert set(np.unique(made)) <= {0.0, 1.0}
    return made == 0


def spans_by_hand(rng, n, share, span, least):
    """Places that the released processor's recipe masks, drawn with NumPy."""
    count = max(int(share * n / span + rng.random()), least)
    places = np.zeros(n, bool)
    for start in rng.permutation(max(n - span, 0))[:count]:
        places[start : start + span] = True
    return places


def test_shares_are_those_of_the_recipe():
    """Of 400 clips each: within 0.01 of 400 x 20 drawn by hand; only valid frames, in whole spans."""
    found, rng = masked(TIME), np.random.default_rng(1)
    times = found.any(2)
    assert (found == times[..., None]).all()  # without a share of bands every mel of a frame
    assert not times[np.arange(FRAMES) >= LENGTHS[:, None]].any()
    long = TIME.mask_time_length * TIME.mask_time_min_masks < LENGTHS
    assert not times[~long].any()
    by_hand = [[spans_by_hand(rng, n, 0.2, 6, 2).sum() for n in LENGTHS[long]] for _ in range(20)]
    assert abs(times[long].sum() - np.mean(by_hand) * long.sum()) / LENGTHS[long].sum() < 0.01
    edges = np.diff(np.pad(times, ((0, 0), (1, 1))).astype(int))
    (_, starts), (_, ends) = np.nonzero(edges == 1), np.nonzero(edges == -1)
    assert (ends - starts >= TIME.mask_time_length).all()


def test_bands_cover_all_valid_frames():
    found = masked(BOTH)
    times = masked(replace(BOTH, mask_feature_prob=0.0, mask_feature_min_masks=0)).any(2)
    long = TIME.mask_time_length * TIME.mask_time_min_masks < LENGTHS
    for clip in np.nonzero(long)[0]:
        length, rng = LENGTHS[clip], found[clip, : LENGTHS[clip]]
        bands = rng[~times[clip, :length]]
        assert (bands == bands[0]).all()
        assert bands[0].sum() >= 5
        assert not found[clip, length:].any()
    by_hand = [spans_by_hand(np.random.default_rng(i), BANDS, 0.3, 5, 1).mean() for i in range(4000)]
    bands = [found[clip, : LENGTHS[clip]].all(0).mean() for clip in np.nonzero(long)[0]]
    assert abs(np.mean(bands) - np.mean(by_hand)) < 0.03


@pytest.mark.slow
def test_key_and_place_alone_decide():
    found = masked(BOTH)
    np.testing.assert_array_equal(masked(BOTH), found)
    np.testing.assert_array_equal(masked(BOTH, lengths=LENGTHS[:16]), found[:16])
    assert (masked(BOTH, jax.random.key(1)) != found).any()
    same = masked(BOTH, lengths=np.full(CLIPS, FRAMES, np.int32))
    assert len({clip.tobytes() for clip in same}) > 0.9 * CLIPS  # clips of one length differ


def test_nothing_is_masked_by_default():
    assert not masked(SpecAugmentConfig()).any()


def test_settings_that_are_refused():
    for change, message in (
        ({"mask_time_prob": 1.5}, r"spec_augment\.mask_time_prob 1\.5 must lie between 0 and 1"),
        ({"mask_feature_length": 0}, "mask_feature_length 0 must be at least 1"),
        ({"mask_time_min_masks": -1}, "mask_time_min_masks -1 at least 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            SpecAugmentConfig(**change)
