"""The embedded pipelines as they are shipped: plain diffusers folders that draw what their prompts say."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from ptq_exp.embedded import DigitsExtractor, card, pipeline_folder
from ptq_exp.embedded.pipelines import CALLS
from ptq_exp.embedded.prompts import evaluation_prompts
from ptq_exp.errors import CheckpointError
from ptq_exp.evaluation import extract_features, prompt_accuracy

PIPELINES = {"digits_text": "StableDiffusionPipeline", "digits_flow": "StableDiffusion3Pipeline"}

PLAIN = """
import json, sys
import torch
from diffusers import DiffusionPipeline

torch.set_num_threads(1)
prompts, calls = json.loads(sys.argv[1]), json.loads(sys.argv[2])
for name, (folder, call) in calls.items():
    pipe = DiffusionPipeline.from_pretrained(folder)
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    images = pipe(prompts, generator=generators, **call).images
    for i, image in enumerate(images):
        image.save(f"{name}_{i}.png")
    print(type(pipe).__name__)
assert not any(name.split(".")[0] in ("ptq_exp", "sklearn") for name in sys.modules)
"""


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A folder with the images of both pipelines, drawn in one process without this package."""
    folder = tmp_path_factory.mktemp("drawn")
    calls = {name: (str(pipeline_folder(name)), CALLS[name]) for name in PIPELINES}
    arguments = [json.dumps(evaluation_prompts(10)), json.dumps(calls)]
    done = subprocess.run([sys.executable, "-c", PLAIN, *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == list(PIPELINES.values())
    return folder


@pytest.mark.parametrize("name", PIPELINES)
def test_plain_diffusers_draws_the_ten_digits(name, drawn):
    images = np.stack([np.asarray(Image.open(drawn / f"{name}_{i}.png")) for i in range(10)])[..., None]
    assert images.shape == (10, 32, 32, 1) and images.dtype == np.uint8
    assert prompt_accuracy(extract_features(DigitsExtractor(), images), range(10)) == 1


@pytest.mark.parametrize("name", PIPELINES)
def test_the_folder_names_no_place_of_its_training(name):
    files = [path for path in pipeline_folder(name).rglob("*") if path.suffix in (".json", ".txt")]
    assert len(files) > 8
    assert not [path.name for path in files if "_name_or_path" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("name", PIPELINES)
def test_the_folder_is_small_and_its_card_is_good(name):
    assert sum(path.stat().st_size for path in pipeline_folder(name).rglob("*") if path.is_file()) < 12e6
    known = card(name)
    assert known["command"].startswith(f"python -m ptq_exp train_embedded {name} ")
    for part in ("trained", "held_out"):
        assert known[part]["prompt_accuracy"] >= 0.97
        assert known[part]["width_correlation"] >= 0.7 and known[part]["slant_correlation"] >= 0.7


def test_an_unknown_pipeline_is_refused_by_name():
    with pytest.raises(CheckpointError, match="'digits_txt' is no embedded pipeline: choose digits_flow or dig"):
        pipeline_folder("digits_txt")
