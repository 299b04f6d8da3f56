"""From a manifest line to an encoded document; chat prompts take the same way.

manifest -> prompts (elements) -> parts (turns, frames, spans) -> processor, with media_items -> sequence -> loss_weights
"""
