"""Harnesses run as their users run them: command lines in processes of their own, over local tasks.

Their logs are compared with what the engine gives for the same requests. Each needs its harness: lm-eval by the extra
`lm-eval`; lmms-eval as docs/how-to/harnesses.md says.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from baichuan_omni_jax.cli.main import main
from baichuan_omni_jax.generation.loglikelihood import ScoringRequest, rolling_windows
from baichuan_omni_jax.integrations.harness_model import generation_settings
from baichuan_omni_jax.integrations.media_messages import chat_messages
from data_pipelines.documents.document import encode_ids
from data_pipelines.tokenizers.tokenizer import encode, plain_tokenizer
from tests.helpers.proofs import HANG
from tests.helpers.small_media import write_audio, write_image, write_video

QUESTIONS = [
    {"question": f"{a} + {b} =", "choices": [str(a + b), str(a * b + 1), "7", "none of them"], "answer": 0}
    for a, b in ((1, 2), (3, 3), (5, 1), (2, 6), (4, 4))
]
LETTERS = "ABCD"


def needs(name: str):
    absent = importlib.util.find_spec(name) is None
    return pytest.mark.skipif(absent, reason=f"{name} is not installed")


def run(folder: Path, *arguments: str) -> str:
    """Runs a command without network; returns what it printed."""
    offline = {name: "1" for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")}
    variables = (
        os.environ | offline | {"HF_HOME": str(folder / "hf"), "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    )
    made = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=variables, cwd=folder, timeout=HANG
    )
    assert made.returncode == 0, made.stdout[-2000:] + made.stderr[-4000:]
    return made.stdout + made.stderr


def write_lines(path: Path, documents: list[dict]) -> Path:
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return path


def read_samples(output: Path, task: str) -> list[dict]:
    (path,) = output.rglob(f"*samples_{task}*.jsonl")
    return sorted(map(json.loads, path.read_text().splitlines()), key=lambda sample: sample["doc_id"])


def write_lm_eval_tasks(folder: Path) -> None:
    """MMLU's form (letters), whole texts, and answers; also one in turns of a conversation."""
    data = write_lines(folder / "questions.jsonl", QUESTIONS)
    options = "".join(f"\n{letter}. {{{{choices[{n}]}}}}" for n, letter in enumerate(LETTERS))
    common = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
    question = json.dumps("{{question}}" + options + "\nAnswer:")
    tasks = {
        "letters": "output_type: multiple_choice\ndoc_to_choice: ['A', 'B', 'C', 'D']\ndoc_to_target: answer\n"
        "metric_list: [{metric: acc}]\n",
        "texts": "output_type: loglikelihood_rolling\ndoc_to_target: '{{question}} {{choices[3]}} '\n"
        "metric_list: [{metric: bits_per_byte}]\n",
        "answers": "output_type: generate_until\ndoc_to_target: '{{choices[0]}}'\n"
        "generation_kwargs: {until: ['.'], max_gen_toks: 5, do_sample: false}\nmetric_list: [{metric: exact_match}]\n",
    }
    for name, lines in tasks.items():
        text = "''" if name == "texts" else question
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{common}doc_to_text: {text}\n{lines}")


def test_without_lm_eval_one_sentence_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "baichuan_omni_jax.integrations.lm_eval", raising=False)
    assert main(["lm-eval", "--help"]) == 2
    assert "lm_eval is not installed: pip install 'baichuan_omni_jax[lm-eval]'" in capsys.readouterr().err


@needs("lm_eval")
@pytest.mark.slow
def test_lm_eval_logs_the_engines_own_numbers(tmp_path, checkpoint, model):
    write_lm_eval_tasks(tmp_path)
    arguments = ["--model", "baichuan-omni", "--model_args", f"checkpoint={checkpoint},length=128,slots=2"]
    command = [
        "-m",
        "baichuan_omni_jax",
        "lm-eval",
        "run",
        *arguments,
        "--include_path",
        str(tmp_path),
        "--log_samples",
    ]
    printed = run(tmp_path, *command, "--tasks", "letters,texts,answers", "--output_path", str(tmp_path / "plain"))
    assert "letters" in printed
    words = plain_tokenizer(model.engine.tokenizer)

    def score(context: list[int], continuation: list[int]):
        request = ScoringRequest(encode_ids(context, model.engine.cfg), [continuation])
        return model.engine.log_likelihoods([request])[0][0]

    # Letters: the log's requests are the questions, its answers the engine's.
    for document, sample in zip(QUESTIONS, read_samples(tmp_path / "plain", "letters"), strict=True):
        options = "".join(f"\n{letter}. {text}" for letter, text in zip(LETTERS, document["choices"], strict=True))
        context = f"{document['question']}{options}\nAnswer:"
        for number, letter in enumerate(LETTERS):
            asked = sample["arguments"][f"gen_args_{number}"]
            assert (asked["arg_0"], asked["arg_1"]) == (context, f" {letter}")
            (logged, greedy), expected = (
                sample["resps"][number][0],
                score(encode(words, context), encode(words, f" {letter}")),
            )
            assert float(logged) == pytest.approx(expected.log_likelihood, abs=1e-4)
            assert str(greedy) == str(expected.is_greedy)
    for sample in read_samples(tmp_path / "plain", "texts"):
        tokens = encode(words, sample["arguments"]["gen_args_0"]["arg_0"])
        windows = rolling_windows(tokens, 128, model.engine.cfg.tokens.end_of_text)
        total = sum(score(*window).log_likelihood for window in windows)
        assert float(sample["resps"][0][0]) == pytest.approx(total, abs=1e-3)
    settings = generation_settings({"until": ["."], "max_gen_toks": 5, "do_sample": False})
    for sample in read_samples(tmp_path / "plain", "answers"):
        prompt = encode_ids(encode(words, sample["arguments"]["gen_args_0"]["arg_0"]), model.engine.cfg)
        assert sample["resps"][0][0] == model.chat.answer_prompt(prompt, stream=False, settings=settings).text

    # The same questions as turns of a conversation: chat's own prompts and answers.
    run(tmp_path, *command, "--tasks", "answers", "--apply_chat_template", "--output_path", str(tmp_path / "chat"))
    for sample in read_samples(tmp_path / "chat", "answers"):
        context = sample["arguments"]["gen_args_0"]["arg_0"]
        text = context.removeprefix("<C_Q>").removesuffix("<C_A>")
        assert len(text) == len(context) - len("<C_Q><C_A>")
        reply = model.chat.reply([{"role": "user", "content": text}], stream=False, settings=settings)
        assert sample["resps"][0][0] == reply.text


LMMS_TASK = """task: pictures
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function media.doc_to_visual
doc_to_text: !function media.doc_to_text
doc_to_messages: !function media.doc_to_messages
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 5, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
process_results: !function media.process_results
metadata: [{{version: 0.0}}]
"""
LMMS_FUNCTIONS = """
def doc_to_visual(doc):
    return []

def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def doc_to_messages(doc, lmms_eval_specific_kwargs=None):
    parts = [{"type": kind, "url": path} for kind, path in zip(doc["kinds"], doc["files"])]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": doc["question"]}]}]

def process_results(doc, results):
    return {"exact_match": float(results[0] == doc["answer"])}
"""


@needs("lmms_eval")
@pytest.mark.slow
def test_lmms_eval_logs_the_engines_own_answers(tmp_path, checkpoint, model):
    """Audio, an image and a video in one message, beside messages of less."""
    write_image(tmp_path / "a.png", 56, 84)
    write_audio(tmp_path / "b.wav", 1)
    write_video(tmp_path / "c.mp4", 1)
    files = {"image": str(tmp_path / "a.png"), "audio": str(tmp_path / "b.wav"), "video": str(tmp_path / "c.mp4")}
    documents = [
        {"kinds": kinds, "files": [files[kind] for kind in kinds], "question": "Which is it?", "answer": "a lake"}
        for kinds in (["audio", "image", "video"], ["image"], ["video", "audio"], ["audio"])
    ]
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    data = write_lines(tmp_path / "pictures.jsonl", documents)
    (tasks / "media.py").write_text(LMMS_FUNCTIONS)
    (tasks / "pictures.yaml").write_text(LMMS_TASK.format(data=data))
    arguments = ["--model", "baichuan_omni_jax", "--model_args", f"checkpoint={checkpoint},length=128,slots=2"]
    arguments += ["--tasks", "pictures", "--include_path", str(tasks), "--log_samples", "--batch_size", "1"]
    printed = run(tmp_path, "-m", "lmms_eval", *arguments, "--output_path", str(tmp_path / "out"))
    # It exits 0 when it fails, so the log is what counts.
    samples = read_samples(tmp_path / "out", "pictures")
    assert len(samples) == len(documents), printed[-3000:]
    settings = generation_settings({"max_new_tokens": 5, "do_sample": False})
    for document, sample in zip(documents, samples, strict=True):
        parts = [{"type": kind, "url": path} for kind, path in zip(document["kinds"], document["files"], strict=True)]
        messages = [{"role": "user", "content": [*parts, {"type": "text", "text": document["question"]}]}]
        reply = model.chat.reply(chat_messages(messages), stream=False, settings=settings)
        # The log leaves out what no filter has changed.
        assert np.ravel(sample["filtered_resps"])[0].strip() == reply.text.strip()
    assert any(np.ravel(sample["filtered_resps"])[0] for sample in samples)
