"""From a manifest line to an encoded document; chat prompts take the same way.

manifest -> prompts (elements) -> processor, with media_items (files) -> sequence (tokens, slots) -> loss_weights
"""
