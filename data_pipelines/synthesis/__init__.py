"""Documents made from other documents: speech from text, pages and charts, captions, and the filters that judge them.

`baichuan-omni data synthesize JOB MANIFEST... --out DIR` runs one task (`units.SynthesisTask`): a maker turns one
document into any number of new ones (`units.Draft`); see `units.py` for what lies in DIR.
"""
