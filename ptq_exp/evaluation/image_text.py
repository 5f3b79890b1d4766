"""CLIP score: how well images fit the prompts that they were drawn from, by a local CLIP model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ptq_exp.errors import CheckpointError, ConfigError, DataError, one_line
from ptq_exp.evaluation.features import in_float32
from ptq_exp.storage.atomic import file_digest

SETTING = "evaluation.clip"
_BATCH = 16


@dataclass(frozen=True)
class ImageText:
    """A CLIP model with its tokenizer and its image preprocessing.

    Attributes:
        name: folder and digest of the weights: numbers of different models are not comparable.
    """

    model: Any
    tokenizer: Any
    processor: Any
    name: str
    device: str = "cpu"

    @classmethod
    def load(cls, folder: str | Path | None, device: str = "cpu") -> ImageText:
        """Read a folder that `CLIPModel.save_pretrained` and its processor wrote; nothing is downloaded.

        Raises:
            CheckpointError: None, no such folder, or no CLIP model with tokenizer and preprocessing in it.
            ConfigError: the package `transformers` is not installed.
        """
        if folder is None:
            raise CheckpointError(f"{SETTING} is not set: the CLIP score needs the folder of a CLIP model, such as a "
                                  "copy of openai/clip-vit-base-patch32")
        path = Path(folder)
        if not (path / "config.json").is_file():
            raise CheckpointError(f"{SETTING}={path}: no such folder, or no config.json in it; give the folder of a "
                                  "CLIP model in the layout of transformers")
        try:
            from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel
        except ImportError as error:
            raise ConfigError(f"{SETTING} needs the package transformers ({one_line(error)}): pip install "
                              "'ptq-exp[pairs]'") from error
        weights = sorted(path.glob("*.safetensors"))
        if not weights:
            raise CheckpointError(f"{SETTING}={path}: holds no *.safetensors; convert the weights first")
        try:
            model = CLIPModel.from_pretrained(path, local_files_only=True, use_safetensors=True)
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
            processor = CLIPImageProcessor.from_pretrained(path, local_files_only=True)
        except Exception as error:  # transformers raises nearly anything on a foreign folder
            raise CheckpointError(f"{SETTING}={path}: no CLIP model with tokenizer and preprocessor_config.json "
                                  f"({one_line(error, 120)})") from error
        name = f"{path.resolve().name}-{file_digest(*weights)[:8]}"
        return cls(model.eval().requires_grad_(False).to(device), tokenizer, processor, name, device)

    @torch.no_grad()
    def __call__(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """Compute the score of images uint8 [N, H, W, 1 or 3] and their N prompts -> float64 [N].

        Raises:
            DataError: not one prompt for each image.
        """
        if len(prompts) != len(images):
            raise DataError(f"the CLIP score needs one prompt for each image, found {len(prompts)} for {len(images)}")
        values = []
        for start in range(0, len(images), _BATCH):
            batch, texts = images[start : start + _BATCH], list(prompts[start : start + _BATCH])
            rgb = list(np.array(np.broadcast_to(batch, (*batch.shape[:3], 3))))  # torch wants arrays it could write to
            pixels = self.processor(images=rgb, input_data_format="channels_last", return_tensors="pt")
            longest = self.model.config.text_config.max_position_embeddings
            # the tokenizer shortens a long prompt in front of its end token, whose features are the text's
            tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
            given = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
            with in_float32():
                found = self.model(pixel_values=pixels["pixel_values"].to(self.device),
                                   **{key: value.to(self.device) for key, value in given.items()})
            values.append(cosine_score(found.image_embeds.cpu().numpy(), found.text_embeds.cpu().numpy()))
        return np.concatenate(values) if values else np.empty(0)


def clip_score(
    images: np.ndarray, prompts: Sequence[str], folder: str | Path | None, device: str = "cpu"
) -> np.ndarray:
    """Compute the CLIP score (Hessel et al. 2021, with weight 100) of each image and its prompt.

    Args:
        images: uint8 [N, H, W, 1 or 3].
        prompts: N texts; what is longer than the model reads (77 tokens) is cut off before the end token.
        folder, device: see `ImageText.load`.

    Returns:
        float64 [N] in [0, 100]: 100 max(cos, 0).

    Raises:
        CheckpointError, ConfigError: see `ImageText.load`.
        DataError: not one prompt for each image.
    """
    return ImageText.load(folder, device)(images, prompts)


def cosine_score(image: np.ndarray, text: np.ndarray) -> np.ndarray:
    """Return 100 max(cos, 0) of embeddings [N, D] and [N, D], pair by pair: float64 [N]."""
    x, y = np.asarray(image, np.float64), np.asarray(text, np.float64)
    cosine = (x * y).sum(axis=1) / (np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1))
    return 100 * np.maximum(cosine, 0)
