"""What a run trains: the omni model, the audio tokenizer or the flow-matching decoder, all by the same loop."""
