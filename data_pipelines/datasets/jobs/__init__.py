"""Resumable jobs over shards: every unit of work is a pure function that writes the files of one shard."""

from data_pipelines.datasets.jobs.job import Job, Unit, Work, run_job

__all__ = ["Job", "Unit", "Work", "run_job"]
