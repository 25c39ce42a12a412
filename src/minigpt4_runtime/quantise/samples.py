"""Pictures, with texts or without: what a model reads while it is calibrated.

Owns   the reading of a folder of pictures, or of a .jsonl of pictures and texts, and the rows that
       the language model reads of them.
Takes  paths and a model folder of floats; gives rows (T, C) in float32, a tensor for each picture.
Never  holds the image side longer than it takes to encode the pictures.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minigpt4_runtime.batch.finding import find_images
from minigpt4_runtime.checkpoint.folder import TOKENIZER_NAME
from minigpt4_runtime.checkpoint.load import load_vision
from minigpt4_runtime.config import ModelConfig
from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.images.pixels import load as load_image
from minigpt4_runtime.messages import Message, image
from minigpt4_runtime.text.prompt import DESCRIBE_PROMPT, find_template, render
from minigpt4_runtime.text.tokenizer import Tokenizer

MOST_SAMPLES = 128


@dataclass(frozen=True)
class Sample:
    """A picture, and what is said of it; "" if nothing is known."""

    path: Path
    text: str = ""


def read_samples(path: Path) -> list[Sample]:
    """The first MOST_SAMPLES pictures of a folder, or of a .jsonl as `describe --out` writes it.

    A line of it has "image", a path from the file's folder or the working folder, and "answer" or
    "text".

    Raises:
        ConfigError: there is no picture, or a line is none of this kind.
    """
    if path.suffix.lower() != ".jsonl":
        if not path.is_dir():
            raise ConfigError(f"--calibrate is {path}; it must be a folder or a .jsonl file.")
        return [Sample(each) for each in find_images([path], recursive=True)[:MOST_SAMPLES]]
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise ConfigError(f"--calibrate {path} cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--calibrate {path} is no text in UTF-8.") from None
    samples = [_read_line(path, number, line) for number, line in enumerate(lines, start=1)]
    found = [each for each in samples if each is not None]
    if not found:
        raise ConfigError(f"--calibrate {path} holds no pictures with texts.")
    return found[:MOST_SAMPLES]


def _read_line(path: Path, number: int, line: str) -> Sample | None:
    try:
        record = json.loads(line)
        place, text = Path(record["image"]), record.get("answer", record.get("text"))
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ConfigError(
            f'--calibrate {path}: line {number} is no {{"image": …, "text": …}}.'
        ) from None
    if not isinstance(text, str):
        return None  # A picture that could not be described.
    beside = path.parent / place
    return Sample(beside if beside.is_file() else place, text)


@torch.inference_mode()
def encode_samples(
    samples: list[Sample], model_dir: Path, config: ModelConfig, table: Tensor
) -> list[Tensor]:
    """The rows of each sample: its prompt, its picture and its text; `table` has the embeddings.

    Raises:
        ImageError: a picture cannot be read.
    """
    tokenizer = Tokenizer(model_dir / TOKENIZER_NAME)
    vision = load_vision(model_dir, dtype=torch.float32)
    rows = []
    for sample in samples:
        messages = [Message("user", (image(sample.path), DESCRIBE_PROMPT))]
        if sample.text:
            messages.append(Message("assistant", (sample.text,)))
        prompt = tokenizer.encode_prompt(
            render(messages, find_template(config.template)),
            rows_per_image=config.rows_per_image, image_token_id=0,
        )  # fmt: skip
        pixels = torch.from_numpy(load_image(image(sample.path), config.vision).values)
        embedded = table[torch.tensor(prompt.token_ids)].float()
        for span in prompt.image_spans:
            embedded[span.start : span.start + span.num_rows] = vision(pixels[None])[0]
        rows.append(embedded[: config.language.max_position_embeddings])
    return rows
