"""What the tests of synthesis jobs share: a manifest of texts, and a job over it."""

import json

from data_pipelines.synthesis.__main__ import main

# The texts of the tests have short sentences.
SHORT = ("--shortest", "1")
# Tones instead of speech: no eSpeak is needed, and they take no time.
FAKE = ("--tts", "tests.helpers.fake_speech:make", *SHORT)


def write_manifest(folder, texts, name="m.jsonl"):
    lines = [json.dumps({"id": f"d{number}", "text": text}) + "\n" for number, text in enumerate(texts)]
    (folder / name).write_text("".join(lines), encoding="utf-8")
    return folder / name


def run(job, manifest, out, *options, workers=0):
    assert main([job, str(manifest), "--out", str(out), "--workers", str(workers), *options]) == 0
    return read(out / f"{job}.jsonl"), read(out / f"skipped-{job}.jsonl")


def read(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []
