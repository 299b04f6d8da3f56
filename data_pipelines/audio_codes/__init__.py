"""The store of audio codes: filled once by the audio tokenizer, read by the data workers.

CODES/meta.json         tokenizer, codebook sizes, window rule, the parts with sizes and SHA-256, the index's name
CODES/frames/           TensorStore zarr3 array, int16 (frames, levels); one file a part: `c.17.0` is part 17
CODES/index-3.npy       sorted by clip and window: where their frames are
"""
