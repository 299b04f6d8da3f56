"""Small benchmarks in their public layouts, a model that answers by a script, and a judge that may misbehave."""

import base64
import csv
import io
import json
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

from baichuan_omni_jax.errors import RequestError
from baichuan_omni_jax.evaluation.suites.layouts import AUDIO_SUBSETS
from baichuan_omni_jax.generation.chat_stream import ChatStream
from baichuan_omni_jax.generation.events import Finished, TextDelta
from tests.helpers.small_media import noise_image, tone, write_video

RIGHT = "Paris"  # of every factual question of the audio benchmark


def png(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(noise_image(32, 32, seed)).save(file, format="PNG")
    return file.getvalue()


def mp3(seconds: float = 0.5) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, tone(seconds), 16000, format="MP3")
    return file.getvalue()


def write_rows(path: Path, rows: list[dict[str, object]], mark: str = ",", header: bool = True) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=mark)
        if header:
            writer.writeheader()
        writer.writerows(rows)
    return path


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def write_open_audio_bench(folder: Path, each: int = 4) -> Path:
    """Five subsets of `each` questions, with the columns and spellings that the published tables have."""
    for subset, (question, answer) in AUDIO_SUBSETS.items():
        root, rows = folder / "eval_datas" / subset, []
        (root / "audios").mkdir(parents=True)
        for number in range(each):
            name = f"{subset}_{number}.mp3"
            (root / "audios" / name).write_bytes(mp3(0.3 + 0.1 * number))
            row: dict[str, object] = {"audio_filename": name, question: f"{subset}, question {number}\nof {each}?"}
            if answer:
                row[answer] = str([RIGHT.lower(), f"city of {RIGHT}"]) if answer != "Answer" else RIGHT
            rows.append(row)
        write_rows(root / f"{subset}.csv", rows)
    return folder


def write_image_choice(folder: Path, count: int = 12) -> Path:
    """A table of VLMEvalKit: base64, a list of two, a reference to another row, a path; three or four options."""
    rows = []
    for number in range(count):
        image = base64.b64encode(png(number)).decode()
        row: dict[str, object] = {
            "index": 100 + number,
            "question": f"What is shown, {number}?",
            "A": "a cell",
            "B": "a bone",
            "C": "a lung",
            "D": "" if number % 4 == 3 else "an eye",
            "answer": "ABC"[number % 3],
            "category": ("X-ray", "microscope")[number % 2],
            "image": image,
        }
        rows.append(row)
    rows[4]["image"] = "100"
    rows[5]["image"] = str([rows[5]["image"], rows[6]["image"]])
    write_rows(folder / "OpenMM_Medical.tsv", rows, "\t")
    return folder


def omni_rows(count: int) -> list[dict[str, object]]:
    return [
        {
            "index": number,
            "task type": "Causal Inference",
            "audio type": ("speech", "music")[number % 2],
            "question": f"Why, {number}?",
            "options": ["it rains", "it is late", "he is glad", "nobody knows"],
            "answer": ["it rains", "it is late", "he is glad", "nobody knows"][number % 4],
            "image content": f"picture {number}",
            "audio content": f"sound {number}",
        }
        for number in range(count)
    ]


def write_omni_bench(folder: Path, count: int = 8, parquet: bool = False) -> Path:
    """OmniBench as JSON lines beside its media, or as Parquet with the media inside."""
    rows = omni_rows(count)
    if parquet:
        import pyarrow
        import pyarrow.parquet

        for number, row in enumerate(rows):
            row |= {"image": {"bytes": png(number), "path": "a.png"}, "audio": {"bytes": mp3(), "path": "a.mp3"}}
        (folder / "data").mkdir(parents=True)
        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, folder / "data" / "train-00000.parquet", row_group_size=3)
        return folder
    for number, row in enumerate(rows):
        row |= {"image_path": f"{number}.png", "audio_path": f"{number}.mp3"}
        for kind, data in (("image", png(number)), ("audio", mp3())):
            path = folder / "mm_data" / kind / str(row[f"{kind}_path"])
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    write_jsonl(folder / "dataset" / "batch-5_1142_20240817.jsonl", rows)
    return folder


def write_video_mme(folder: Path, count: int = 6) -> Path:
    (folder / "data").mkdir(parents=True)
    rows = []
    for number in range(count):
        write_video(folder / "data" / f"v{number}.mp4", 1.0)
        rows.append(
            {
                "video_id": f"{number:03d}",
                "duration": ("short", "long")[number % 2],
                "videoID": f"v{number}",
                "question_id": f"{number:03d}-1",
                "question": "What moves?",
                "options": ["A. A car.", "B. A dog.", "C. Nothing.", "D. A leaf."],
                "answer": "ABCD"[number % 4],
            }
        )
    write_jsonl(folder / "test.jsonl", rows)
    return folder


def write_exam(folder: Path, subjects: dict[str, int], layout: str = "mmlu") -> Path:
    """MMLU without a header, CMMLU or C-Eval with theirs; the answer to question n is the letter n % 4."""
    for subject, count in subjects.items():
        splits = {"dev": 5, "val" if layout == "ceval" else "test": count}
        for split, rows in splits.items():
            made = []
            for number in range(rows):
                options = {letter: f"{subject} {letter}{number}" for letter in "ABCD"}
                row = {"question": f"{subject}, {number}, is?", **options, "answer": "ABCD"[number % 4]}
                if layout == "cmmlu":
                    row = {"": number, "Question": row["question"], **options, "Answer": row["answer"]}
                made.append({"id": number, **row} if layout == "ceval" else row)
            end = "" if layout == "cmmlu" else f"_{split}"
            root = folder / "data" if layout == "mmlu" else folder
            write_rows(root / split / f"{subject}{end}.csv", made, header=layout != "mmlu")
    return folder


def write_agieval(folder: Path) -> Path:
    for task, count in (("sat-en", 3), ("gaokao-history", 2)):
        rows = [
            {
                "passage": "A passage." if task == "sat-en" else None,
                "question": f"{task} {number}?",
                "options": ["(A)one", "(B)two", "(C)three", "(D)four"],
                "label": "ABCD"[number % 4],
                "answer": None,
            }
            for number in range(count)
        ]
        write_jsonl(folder / "data" / "v1" / f"{task}.jsonl", rows)
    write_jsonl(folder / "data" / "v1" / "math.jsonl", [{"question": "1+1?", "options": None, "label": None}])
    return folder


def write_recordings(folder: Path, spoken: dict[str, str]) -> Path:
    """LibriSpeech's layout: one chapter."""
    root = folder / "84" / "121123"
    root.mkdir(parents=True)
    for name in spoken:
        soundfile.write(root / f"{name}.flac", tone(0.4), 16000)
    (root / "84-121123.trans.txt").write_text("".join(f"{name} {text}\n" for name, text in spoken.items()))
    return folder


def save_random_model(folder: Path, *names: str) -> Path:
    """A checkpoint of the tiny architecture with small random numbers and a tokenizer of a few words."""
    import jax

    from baichuan_omni_jax.checkpoint import abstract_branches, save_branches
    from baichuan_omni_jax.config import tiny
    from data_pipelines.tokenizers.tokenizer import train_tokenizer

    cfg, rng = tiny(), np.random.default_rng(0)
    branches = {
        name: jax.tree.map(lambda x: 0.05 * rng.standard_normal(x.shape).astype(x.dtype), module)
        for name, module in abstract_branches(cfg, only=names).items()
    }
    words = train_tokenizer(["the cat sat on the mat. A B C D Answer:"] * 3, 330).to_str()
    save_branches(folder, branches, cfg, words, trained={"llm": 5})
    return folder


class ScriptedModel:
    """Answers what `script` says to the message: the name or bytes of its media, and its text."""

    def __init__(self, script: Callable[[list[dict], str], str], seconds: float = 0.0):
        self.script, self.seconds, self.asked = script, seconds, 0

    def reply(self, messages, *, settings=None, key=None):
        return self.complete(messages[-1]["content"], settings=settings, key=key)

    def complete(self, content, *, settings=None, key=None):
        media = [part for part in content if part["type"] != "text"]
        for part in media:
            self._decode(part)
        text = "".join(part["text"] for part in content if part["type"] == "text")
        time.sleep(self.seconds)
        self.asked += 1
        return ChatStream(_Scripted(self.script(media, text)), None)

    def speak(self, text, *, settings=None, key=None):
        raise NotImplementedError

    @staticmethod
    def _decode(part: dict) -> None:
        """Refuses what is no image, recording or video, as the processor does."""
        data = part["bytes"] if "bytes" in part else Path(part["path"]).read_bytes()
        try:
            if part["type"] == "image":
                Image.open(io.BytesIO(data)).load()
            elif part["type"] == "audio":
                soundfile.read(io.BytesIO(data))
        except Exception as error:
            raise RequestError("bad_media", f"the {part['type']} cannot be read") from error


class _Scripted:
    def __init__(self, text: str):
        self._text = text

    def __iter__(self):
        yield TextDelta(self._text, (1,), (0.0,))
        yield Finished("end", 1, 1, 0, 0.1, None, 0.1, np.zeros(2, np.int32))

    def cancel(self) -> None: ...


class JudgeDouble:
    """A server of chat completions. `reply(number, message)` gives the text of the answer to the number-th request of
    that message, or an HTTP status, or seconds to hang, or bytes that are no completion.
    """

    def __init__(self, reply: Callable[[int, str], str | int | float | bytes], models: tuple[str, ...] = ("judge",)):
        self.reply, self.models, self.requests, self.keys = reply, models, [], set()
        self._counts: dict[str, int] = {}
        self._lock = threading.Lock()

    def count(self, message: str) -> int:
        with self._lock:
            self._counts[message] = self._counts.get(message, 0) + 1
            return self._counts[message]


@contextmanager
def serve_judge(double: JudgeDouble):
    """Serves it on a free port of this machine; yields the URL up to `/v1`."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_): ...

        def _send(self, status: int, data: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self):
            self._send(200, json.dumps({"data": [{"id": name} for name in double.models]}).encode())

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            double.requests.append(body)
            double.keys.add(self.headers.get("Authorization"))
            message = body["messages"][-1]["content"]
            reply = double.reply(double.count(message), message)
            try:
                if isinstance(reply, float):
                    time.sleep(reply)
                    self._send(200, b"{}")
                elif isinstance(reply, int):
                    self._send(reply, b"no")
                elif isinstance(reply, bytes):
                    self._send(200, reply)
                else:
                    choice = {"index": 0, "message": {"role": "assistant", "content": reply}}
                    self._send(200, json.dumps({"choices": [choice]}).encode())
            except (BrokenPipeError, ConnectionResetError):
                pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()
