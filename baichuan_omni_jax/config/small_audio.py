"""The audio runs of the small recipe: the tokenizer, in two runs from short to long clips, and flow matching.

There is no pretrained language model, so the one that reads transcripts learns with the tokenizer, and the omni model
begins from it. A reader that is given sentences at once finds no word in them for hundreds of steps; from clips of one
to three words it learns which sounds are which words, then reads sentences (docs/explanation/small-recipe.md).
"""

from typing import Literal

from baichuan_omni_jax.config.audio import FlowTrainConfig, QuantizerConfig, TokenizerTrainConfig
from baichuan_omni_jax.config.run import (
    Budgets,
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    EvalConfig,
    GroupConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from baichuan_omni_jax.config.stages import held_out_of, mixture_of

_COMPUTE = ComputeConfig(dtype="float32", remat="none", loss_chunk=256, attention_block=128)
_HEARD = ("hear_numbers", "hear_sentences")  # held-out recordings: of both runs, of the second
WORDS_STEPS, SENTENCES_STEPS, FLOW_STEPS = 800, 1200, 1200


def small_tokenizer(part: Literal[1, 2], *, model: str = "small") -> RunConfig:
    """Returns a run of the audio tokenizer and its reader: the first on words, or the second on sentences.

    Args:
        part: 1 of words, 2 of sentences.
        model: another model of the same vocabulary.
    """
    first = part == 1
    steps = WORDS_STEPS if first else SENTENCES_STEPS
    # Words are short: a window for them is half as long, and a row holds more of them.
    shares = {"words": 2.0, "numbers": 1.0} if first else {"words": 0.5, "numbers": 1.0, "sentences": 2.5}
    windows, tokens = (16, 320) if first else (10, 448)
    return RunConfig(
        name=f"audio_tokenizer_{part}_small",
        model=model,
        task="audio_tokenizer",
        branches=("audio_encoder", "audio_decoder", "transcript_adapter", "llm"),
        data=DataConfig(
            root="data/small",
            tokenizer="data/small/tokenizer.json",
            mixture=mixture_of(shares),
            rows=2,
            budgets=Budgets(tokens=tokens, patches=0, audio_frames=288, audio_targets=288, mel_windows=windows),
            mel_frames=(160, 224) if first else (304, 400),
            workers=1,
        ),
        optimizer=OptimizerConfig(
            groups=(GroupConfig(name="all", pattern=".*", learning_rate=2e-3),),
            warmup_steps=50,
            decay_steps=steps,
            final_fraction=0.3 if first else 0.05,
        ),
        compute=_COMPUTE,
        train=TrainConfig(steps=steps, frozen_dtype="float32"),
        checkpoint=CheckpointConfig(every=200, keep=1),
        eval=EvalConfig(every=200, steps=6, mixtures=(held_out_of(_HEARD[:part]),)),
        tokenizer=TokenizerTrainConfig(
            # The sum of mel errors is some 50 where the transcript's nats are 1: as it is, it would be all of the loss.
            reconstruction=0.05,
            commitment_start=0.05 if first else None,
            quantizer=QuantizerConfig(
                decay=0.9 if first else 0.97,
                shrink=0.01,
                restart_after=20 if first else 50,
                init_steps=10 if first else 0,
                temperature=(0.05, 0.0) if first else (0.0, 0.0),
                temperature_steps=500,
                # Features as they are at first: codebooks of features that still change say nothing.
                quantized_share=0.0 if first else 1.0,
                quantized_steps=500,
            ),
        ),
    )


def small_flow(*, model: str = "small") -> RunConfig:
    """Returns the run of the flow-matching decoder, on the model's own voice; `model` has the same vocabulary.

    The tokenizer, which stays as it is, comes by `checkpoint.init_from`, as the recipe gives it.
    """
    return RunConfig(
        name="flow_matching_small",
        model=model,
        task="flow_matching",
        branches=("audio_encoder", "audio_decoder", "flow"),
        data=DataConfig(
            root="data/small",
            tokenizer="data/small/tokenizer.json",
            # The pieces that the model speaks, of which the longest has 126 frames: many short windows a step.
            mixture=mixture_of({"speech": 1.0}),
            rows=2,
            budgets=Budgets(tokens=448, patches=0, audio_frames=320, audio_targets=320, mel_windows=12),
            mel_frames=(128,),
            workers=1,
        ),
        optimizer=OptimizerConfig(
            groups=(
                GroupConfig(name="flow", pattern=r"flow\.", learning_rate=4e-3),
                GroupConfig(name="tokenizer", pattern=".*", learning_rate=None),
            ),
            warmup_steps=30,
            decay_steps=FLOW_STEPS,
        ),
        compute=_COMPUTE,
        train=TrainConfig(steps=FLOW_STEPS, frozen_dtype="float32"),
        checkpoint=CheckpointConfig(every=300, keep=1),
        eval=EvalConfig(every=300, steps=6, mixtures=(held_out_of(("speak_sentences",)),)),
        flow=FlowTrainConfig(ema=0.99),
    )
