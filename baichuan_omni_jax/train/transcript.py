"""What a frozen reader makes of quantized features: the cross-entropy of what was said."""

from jaxtyping import Array, Bool, Float

from baichuan_omni_jax.config import RunConfig
from baichuan_omni_jax.omni.audio_tokenizer_model import TokenizerModel
from baichuan_omni_jax.omni.batch import Batch
from baichuan_omni_jax.train.losses import text_entropies


def transcript_entropies(
    model: TokenizerModel, features: Float[Array, "c g f"], valid: Bool[Array, "c g"], batch: Batch, run: RunConfig
) -> Float[Array, "b t"]:
    """Cross-entropy of every text slot of the rows whose clips have these features, fp32, not weighted."""
    hidden = model.read(features, valid, batch)
    return text_entropies(model.llm, hidden, batch["text_targets"], run.compute.loss_chunk)
