"""The branch `flow` (`audio_tokenizer.audio_flow_matching_decoder.*`): pre-net and estimator."""

import jax
from flax import nnx
from jaxtyping import PRNGKeyArray

from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.flow.config import FlowConfig
from baichuan_omni_jax.flow.prenet import PreNet
from baichuan_omni_jax.flow.unet import Estimator
from baichuan_omni_jax.nn.param import ComputePolicy


class FlowDecoder(nnx.Module):
    """`prenet(hidden, lengths)` gives mu, `estimator(x, mu, time, lengths)` the velocity; `sample_mel` joins them.

    Raises ConfigError where the pre-net's output is not as wide as the mel.
    """

    def __init__(self, key: PRNGKeyArray, cfg: FlowConfig, compute: ComputePolicy):
        if cfg.prenet_out_dim != cfg.in_channels:
            raise ConfigError(
                f"flow.prenet_out_dim {cfg.prenet_out_dim} must equal flow.in_channels {cfg.in_channels}: "
                "the estimator reads the noisy mel and the pre-net's side by side"
            )
        keys = jax.random.split(key)
        self.prenet = PreNet(keys[0], cfg, compute)
        self.estimator = Estimator(keys[1], cfg, compute)
        self.cfg, self.compute = cfg, compute
