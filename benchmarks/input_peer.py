"""The work of `input.py` as a plain PyTorch data set over the loose files: a `Dataset` of rows in a `DataLoader`.

Written as one would who knows PyTorch, Pillow, soundfile, soxr and PyAV: only the frames wanted are converted, mels
are Whisper's (`torch.stft` in float32 of the clip padded to 30 s), tensors go through shared memory. With `trimmed`
mels are transformed only as far as the clip goes, which gives the same numbers and takes care to get right.
"""

import json
from pathlib import Path

import av
import numpy as np
import soundfile
import soxr
import torch
from librosa.filters import mel as mel_filters
from PIL import Image
from tokenizers import Tokenizer
from torch.utils.data import DataLoader, Dataset

from baichuan_omni_jax.config import Budgets, OmniConfig
from data_pipelines.documents.prompts import AudioElement, ImageElement, TextElement, parse_prompt
from data_pipelines.media.features import visual_size
from data_pipelines.media.videos import frame_times
from data_pipelines.packing.rows import worker_count
from data_pipelines.pipeline import Pipeline

# For each step: its rows, each a list of manifest lines as (text, media folder); and the frames of its mel slots.
Rows = list[list[tuple[str, str]]]


class LooseFiles(Dataset):
    """Row i: the tokens of its text, its patches, and the log mels of its sound, in arrays of the budgets' sizes."""

    def __init__(
        self, rows: Rows, mel_frames: list[int], tokenizer: str, omni: OmniConfig, budgets: Budgets, trimmed: bool
    ):
        self.rows, self.mel_frames, self.omni, self.budgets = rows, mel_frames, omni, budgets
        self.trimmed = trimmed
        self.tokenizer = Tokenizer.from_str(tokenizer)
        audio = omni.audio
        filters = mel_filters(sr=16000, n_fft=400, n_mels=audio.num_mel_bins, fmin=0, fmax=8000)
        self.filters, self.window = torch.from_numpy(filters), torch.hann_window(400)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        ids, patches, mels = [], [], []
        for text, folder in self.rows[number]:
            for element in parse_prompt(text):
                if isinstance(element, TextElement):
                    ids += self.tokenizer.encode(element.text, add_special_tokens=False).ids
                    continue
                path = Path(folder) / element.reference.path
                if isinstance(element, AudioElement):
                    mels.append(self._log_mel(path))
                elif isinstance(element, ImageElement):
                    image = Image.open(path).convert("RGB")
                    patches.append(self._patches(image, image.height, image.width, element.frame))
                else:
                    patches += self._frames(path)
        return self._padded(ids, patches, mels, self.mel_frames[number])

    def _patches(self, image: Image.Image, height: int, width: int, frame: bool) -> torch.Tensor:
        height, width = visual_size(height, width, self.omni.vision, frame=frame)
        pixels = torch.from_numpy(np.array(image.resize((width, height), Image.Resampling.BICUBIC)))
        blocks = pixels.reshape(height // 28, 2, 14, width // 28, 2, 14, 3)
        return blocks.permute(0, 3, 1, 4, 6, 2, 5).reshape(-1, 588)

    def _frames(self, path: Path) -> list[torch.Tensor]:
        vision = self.omni.vision
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            times = frame_times(float(stream.duration * stream.time_base), vision.frames_per_second, vision.max_frames)
            found: list[av.VideoFrame] = []
            for frame in container.decode(stream):
                while len(found) < len(times) and frame.time >= times[len(found)] - 1e-3:
                    found.append(frame)
                if len(found) == len(times):
                    break
            found += [frame] * (len(times) - len(found))
            return [self._patches(each.to_image(), each.height, each.width, True) for each in found]

    def _log_mel(self, path: Path) -> torch.Tensor:
        if path.suffix == ".mp4":
            with av.open(str(path)) as container:
                stream = container.streams.audio[0]
                blocks = [frame.to_ndarray().mean(0) for frame in container.decode(stream)]
                wave, rate = np.concatenate(blocks), stream.rate
                samples = round(float(stream.duration * stream.time_base) * 16000)  # the codec pads its last block
        else:
            wave, rate = soundfile.read(path, dtype="float32")
            samples = (len(wave) * 16000 + rate // 2) // rate
        wave = torch.from_numpy(soxr.resample(wave, rate, 16000)[:samples].astype(np.float32))
        frames = len(wave) // 160 + 1
        # Trimmed: zeros after the clip, as in a padded window of 30 s; two frames still touch it.
        wave = torch.nn.functional.pad(wave, (0, 800 if self.trimmed else 480000 - len(wave)))
        spectrum = torch.stft(wave, 400, 160, window=self.window, return_complex=True, pad_mode="reflect").abs() ** 2
        log = (self.filters @ spectrum).clamp(min=1e-10).log10()
        log = torch.maximum(log, log.max() - 8.0)
        return ((log + 4.0) / 4.0)[:, :frames].T

    def _padded(self, ids, patches, mels, mel_frames: int) -> dict[str, torch.Tensor]:
        budgets = self.budgets
        row = {
            "tokens": torch.zeros(budgets.tokens, dtype=torch.int32),
            "patches": torch.zeros(budgets.patches, 588, dtype=torch.uint8),
            "mel": torch.zeros(budgets.mel_windows, mel_frames, self.omni.audio.num_mel_bins),
            "mel_lengths": torch.zeros(budgets.mel_windows, dtype=torch.int32),
        }
        row["tokens"][: len(ids)] = torch.tensor(ids, dtype=torch.int32)
        if patches:
            together = torch.cat(patches)
            row["patches"][: len(together)] = together
        for slot, mel in enumerate(mels):
            row["mel"][slot, : len(mel)] = mel
            row["mel_lengths"][slot] = len(mel)
        return row


def loader(rows: Rows, mel_frames: list[int], tokenizer: str, pipeline: Pipeline, trimmed: bool) -> DataLoader:
    """Steps of the pipeline's rows by as many workers; each computes with one thread, PyTorch's default in workers."""
    config = pipeline.config
    data = LooseFiles(rows, mel_frames, tokenizer, pipeline.omni, config.budgets, trimmed)
    return DataLoader(data, batch_size=config.rows, num_workers=worker_count(config))


def manifest_lines(manifests: list[Path]) -> dict[str, tuple[str, str]]:
    """{"FILE.jsonl:LINE": (text, folder)} of every document."""
    found = {}
    for manifest in manifests:
        for number, line in enumerate(manifest.read_text(encoding="utf-8").splitlines(), start=1):
            found[f"{manifest.name}:{number}"] = (json.loads(line)["text"], str(manifest.parent))
    return found
