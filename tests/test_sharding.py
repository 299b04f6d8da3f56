"""Rules, mesh and divisibility; media merged into rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from baichuan_omni_jax.config import MeshConfig
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.nn.param import ComputePolicy, named_values, named_variables, normal, stack, with_values
from baichuan_omni_jax.omni.merge import merge_media, pick_slots
from baichuan_omni_jax.sharding import ShardingRules, check_divisible, make_mesh, parameter_axes
from tests.helpers.typecheck import unchecked


def test_spec_names_mesh_axes():
    rules = ShardingRules()
    assert rules.spec("batch", "length", "act_embed") == P(("data", "fsdp"), "context", None)
    assert rules.spec("embed", None, "heads") == P(("fsdp", "context"), None, "tensor")
    assert rules.gathered_spec("embed", "heads") == P(None, "tensor")


def test_spec_refuses_unknown_names_and_collisions():
    with pytest.raises(KeyError, match="unknown logical axis 'width'"):
        ShardingRules().spec("batch", "width")
    with pytest.raises(ValueError, match="use a mesh axis twice"):
        ShardingRules().spec("length", "embed")


def test_mesh_must_cover_the_devices():
    count = jax.device_count()
    assert dict(make_mesh(MeshConfig(fsdp=-1)).shape) == {"data": 1, "fsdp": count, "context": 1, "tensor": 1}
    with pytest.raises(ConfigError, match=r"mesh 3x1x1x1 .* does not cover the"):
        make_mesh(MeshConfig(data=3))
    with pytest.raises(ConfigError, match="at most one -1"):
        make_mesh(MeshConfig(data=-1, fsdp=-1))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(data=1, slices=2), "mesh.data 1 is not a multiple of mesh.slices 2: only data crosses slices"),
        (MeshConfig(data=2, slices=2), "mesh.slices is 2, but the devices form 1"),
    ],
)
def test_slices_that_do_not_fit_are_told(config, message):
    devices = [jax.devices()[0]] * config.data
    with pytest.raises(ConfigError, match=message):
        make_mesh(config, devices)


def test_uneven_split_names_the_dimension():
    class Four:
        shape = {"data": 1, "fsdp": 1, "context": 1, "tensor": 4}  # noqa: RUF012

    with (
        unchecked(),
        pytest.raises(ConfigError, match=r"llm\.k_proj: dimension kv_heads of 2 is not divisible by 4, the mesh axes"),
    ):
        check_divisible(Four(), ShardingRules(), (128, 2), ("embed", "kv_heads"), "llm.k_proj")


class _Layer(nnx.Module):
    def __init__(self, key):
        self.weight = normal(key, (4, 6), ("embed", "mlp"))


def test_stacked_parameters_get_a_layers_axis_and_names():
    layers = stack(_Layer, jax.random.key(0), 3)
    variables = named_variables({"llm": layers})
    assert list(variables) == ["llm.weight"]
    assert parameter_axes(variables["llm.weight"]) == ("layers", "embed", "mlp")
    doubled = with_values(layers, {name: 2 * value for name, value in named_values(layers).items()})
    np.testing.assert_array_equal(doubled.weight[...], 2 * layers.weight[...])
    with pytest.raises(KeyError):
        with_values(layers, {})


def test_compute_is_static_and_hashable():
    assert hash(ComputePolicy()) == hash(ComputePolicy())


def test_media_replace_their_slots_and_unused_ones_do_nothing():
    rules, (b, t, m, d) = ShardingRules(), (2, 6, 4, 3)
    x, media = jnp.ones((b, t, d)), jnp.arange(b * m * d, dtype=jnp.float32).reshape(b, m, d)
    index = jnp.array([[5, 0, 6, 6], [2, 3, 1, 6]], jnp.int32)
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        place = lambda value, *names: jax.sharding.reshard(value, rules.spec(*names))  # noqa: E731
        x, media = place(x, "batch", "length", None), place(media, "batch", "media", None)
        index = place(index, "batch", "media")
        merged = merge_media(x, [(media, index)], rules)
        picked = pick_slots(merged, index, rules)
    expected = np.ones((b, t, d), np.float32)
    for row in range(b):
        for slot, value in zip(np.asarray(index)[row], np.asarray(media)[row], strict=True):
            if slot < t:
                expected[row, slot] = value
    np.testing.assert_array_equal(merged, expected)
    np.testing.assert_array_equal(picked, np.where(np.asarray(index)[..., None] < t, media, 0))
