"""A small real data set, built offline: photographs, synthesized speech, videos, and documents about them."""

from data_pipelines.sample.build import SAMPLE_SOURCES, build_sample

__all__ = ["SAMPLE_SOURCES", "build_sample"]
