"""Documents made from other documents: speech from text, pages and captions, and the filters that judge them.

`python -m data_pipelines.synthesis JOB MANIFEST... --out DIR` runs one job. A job is a module with

    NAME                     the word that asks for it; names its outputs
    add_arguments(parser)    its own options
    make_job(options)        the `Job` that `options` ask for: `units.manifest_job` around a picklable maker
    finish(job, summaries)   writes the manifests, where those of the units are not only to be joined (`units.assemble`)

A maker turns one document into any number of new ones (`draft.Draft`); see `units.py` for what lies in DIR.
"""
