"""How well an embedded pipeline does what its prompts say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline

from ptq_exp.embedded.attributes import standardised
from ptq_exp.embedded.load import DigitsExtractor
from ptq_exp.embedded.pipelines import CALLS
from ptq_exp.embedded.prompts import HELD_OUT, Asked, asked, evaluation_prompts
from ptq_exp.evaluation.features import extract_features
from ptq_exp.evaluation.images import to_uint8
from ptq_exp.evaluation.prompts import prompt_accuracy


def draw(pipeline: DiffusionPipeline, prompts: list[str], seed: int = 0, batch_size: int = 90, **call) -> np.ndarray:
    """Draw one image per prompt, uint8 [N, 32, 32, 1]; image i has a generator of its own, seeded by (seed, i)."""
    pipeline.set_progress_bar_config(disable=True)
    batches = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        generators = [torch.Generator().manual_seed(1_000_000 * seed + start + i) for i in range(len(batch))]
        images = pipeline(batch, generator=generators, output_type="pt", **call).images
        batches.append(to_uint8(2 * images.float() - 1))
    return np.concatenate(batches)


def prompt_quality(name: str, folder: Path, n: int, seed: int = 0) -> dict:
    """Measure the pipeline in `folder` on the first `n` evaluation prompts, as a card has it.

    Returns:
        The share of images that the embedded classifier reads as the digit asked for, and the correlation (Pearson)
        between the levels -1, 0, 1 of the words and the measured stroke width and slant in standard deviations of the
        real digits of the class; for trained and held-out combinations of words.
    """
    prompts = evaluation_prompts(n)
    images = draw(DiffusionPipeline.from_pretrained(folder), prompts, seed, **CALLS[name])
    wanted = [asked(text) for text in prompts]
    held_out = np.array([combination in HELD_OUT for combination in wanted])
    call = ", ".join(f"{key}={value}" for key, value in CALLS[name].items())
    measured = {"samples": n, "sampler": f"pipe(prompt, {call}), seed {seed}"}
    for part, chosen in (("trained", ~held_out), ("held_out", held_out)):
        if chosen.any():
            rows = np.flatnonzero(chosen)
            measured[part] = agreement(images[rows], [wanted[i] for i in rows])
    return measured


def agreement(images: np.ndarray, wanted: list[Asked]) -> dict:
    """Compare uint8 images [N, 32, 32, 1] with what was asked for; correlations are None for a single level."""
    digits, *asked_levels = (np.array(column) for column in zip(*wanted, strict=True))
    features = extract_features(DigitsExtractor(), images)
    result = {"images": len(images), "prompt_accuracy": round(prompt_accuracy(features, digits), 4)}
    for measure, words in zip(("width", "slant"), asked_levels, strict=True):
        values = standardised(measure, images, digits)
        varied = len(set(words)) > 1 and values.std() > 0
        result[f"{measure}_correlation"] = round(float(np.corrcoef(words, values)[0, 1]), 3) if varied else None
    return result
