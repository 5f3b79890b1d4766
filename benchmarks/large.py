"""Quantize a network larger than memory, under a limit that the system enforces.

python benchmarks/large.py make FOLDER parameters=4e9  # a DiT of random weights in bfloat16, shard by shard
python benchmarks/limit.py 6 python benchmarks/large.py run FOLDER bits=w8a8  # quantize, and save in FOLDER/w8a8
python benchmarks/limit.py 6 python benchmarks/large.py run FOLDER bits=w4a16 reconstruction=gptq
python benchmarks/limit.py 6 python benchmarks/large.py load FOLDER bits=w8a8

Numbers are printed as one line of JSON, and added to FOLDER/measured.jsonl: wall and CPU minutes; the largest resident
memory, pages of mapped files included; and the largest anonymous memory, which no file holds. A killed run goes on when
it is started again.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import DiTTransformer2DModel
from safetensors.torch import save_file

import ptq_exp

SHARD = 1e9
PERIOD = 4_194_301
"""Random numbers that are drawn; a prime, so that no two rows of a weight are the same."""
DEFAULTS = {
    "parameters": 4e9, "width": 2048, "bits": "w8a8", "reconstruction": None, "metric": "minmax", "max_memory_gb": 6.0,
    "rows": 16, "threads": 2,
}


def main(command: str, folder: Path, settings: dict[str, Any]) -> None:
    """Run one command, and print what it measured."""
    if command == "make":
        make(folder, settings)
        return
    with watched() as peaks:
        torch.set_num_threads(settings["threads"])
        started = time.perf_counter()
        measured = {"run": quantize, "load": load}[command](folder, settings)
        minutes = round((time.perf_counter() - started) / 60, 2)
        numbers = {
            "command": command, **settings, **measured, "minutes": minutes,
            "cpu_minutes": round(time.process_time() / 60, 2),
            "maxrss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
            "peak_anonymous_gb": peaks["anonymous"] / 1e9,
        }
    print(json.dumps(numbers))
    with open(folder / "measured.jsonl", "a", encoding="utf-8") as stream:
        stream.write(json.dumps(numbers) + "\n")


def architecture(settings: dict[str, Any], layers: int | None = None) -> dict[str, Any]:
    """Return the settings of a DiT on 8 x 8 tokens with about as many parameters."""
    width = settings["width"]
    of_block = 19 * width**2 + (256 + 1001) * width
    layers = max(1, round(settings["parameters"] / of_block)) if layers is None else layers
    return {"num_attention_heads": width // 64, "attention_head_dim": 64, "in_channels": 4, "out_channels": 8,
            "num_layers": layers, "sample_size": 16, "patch_size": 2}


def make(folder: Path, settings: dict[str, Any]) -> None:
    """Write the network's folder, never holding more than one shard."""
    folder.mkdir(parents=True, exist_ok=True)
    with init_empty_weights():
        network = DiTTransformer2DModel(**architecture(settings)).to(torch.bfloat16)
    draw = torch.Generator().manual_seed(0)
    numbers = torch.randn(PERIOD, generator=draw)
    shards: list[dict[str, torch.Size]] = [{}]
    for name, value in network.state_dict().items():
        if sum(2 * math.prod(shape) for shape in shards[-1].values()) > SHARD:
            shards.append({})
        shards[-1][name] = value.shape
    stem, index = "diffusion_pytorch_model", {}
    for number, shard in enumerate(shards, start=1):
        path = folder / f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: _weight(shape, numbers, draw) for name, shape in shard.items()}, path, {"format": "pt"})
        index |= dict.fromkeys(shard, path.name)
        _forget(path)
        print(path.name, flush=True)
    size = {"total_size": sum(2 * value.numel() for value in network.state_dict().values())}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": size, "weight_map": index}))
    network.save_config(folder)


def _weight(shape: torch.Size, numbers: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """Return a weight of the usual size, of the same random numbers from another start: drawing each takes long."""
    scale, size = 1 / math.prod(shape[1:]) ** 0.5 if len(shape) > 1 else 0.02, math.prod(shape)
    start = int(torch.randint(len(numbers), (), generator=draw))
    turned = numbers.roll(-start).mul(scale).to(torch.bfloat16)
    return turned.repeat(-(-size // len(numbers)))[:size].view(shape)


def _forget(path: Path) -> None:
    """Write a file out and drop its pages: who reads it next is charged for them."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def quantize(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Quantize the network block by block and save it."""
    network = DiTTransformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
    name = _name(settings)
    quantized = ptq_exp.quantize(
        network, settings["bits"], calls=calls(settings["rows"]), metric=settings["metric"],
        reconstruction=settings["reconstruction"], max_memory_gb=settings["max_memory_gb"],
        folder=folder / f"{name}_parts",
    )
    quantized.save(folder / name)
    size = (folder / name / "quantized.safetensors").stat().st_size
    return {"weights": sum(p.numel() for p in network.parameters()), "saved_gb": size / 1e9, **_answer(quantized)}


def load(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Load what was saved into a network without weights, block by block, and run it."""
    with init_empty_weights():
        network = DiTTransformer2DModel.from_config(DiTTransformer2DModel.load_config(folder))
    for parameter in network.parameters():  # not the table of positions, which `from_pretrained` leaves in float32, too
        parameter.data = parameter.data.to(torch.bfloat16)
    quantized = ptq_exp.load_quantized(
        folder / _name(settings), network=network, max_memory_gb=settings["max_memory_gb"],
        folder=folder,
    )
    return _answer(quantized)


def calls(rows: int) -> list[dict[str, torch.Tensor]]:
    """Return one call of random states, times and classes."""
    draw = torch.Generator().manual_seed(1)
    return [{
        "hidden_states": torch.randn(rows, 4, 16, 16, generator=draw).to(torch.bfloat16),
        "timestep": torch.randint(0, 1000, (rows,), generator=draw),
        "class_labels": torch.randint(0, 1000, (rows,), generator=draw),
    }]


def _answer(quantized: ptq_exp.QuantizedModel) -> dict[str, Any]:
    """Return a number that tells networks apart: the sum of what the quantized one answers to the first call."""
    started = time.perf_counter()
    with torch.no_grad():
        found = quantized.component(**calls(1)[0]).sample
    return {"answer": float(found.double().sum()), "seconds_of_answer": round(time.perf_counter() - started, 1)}


def _name(settings: dict[str, Any]) -> str:
    return settings["bits"] + (f"_{settings['reconstruction']}" if settings["reconstruction"] else "")


@contextmanager
def watched() -> Iterator[dict[str, int]]:
    """Look at the anonymous memory of this process ten times a second; its peak is found under "anonymous"."""
    peaks, ended = {"anonymous": 0}, threading.Event()

    def look() -> None:
        while not ended.wait(0.1):
            lines = Path("/proc/self/status").read_text().splitlines()
            now = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
            peaks["anonymous"] = max(peaks["anonymous"], now)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        ended.set()
        thread.join()


def _parsed(given: list[str]) -> dict[str, Any]:
    values = dict(entry.split("=", 1) for entry in given)
    if unknown := set(values) - set(DEFAULTS):
        sys.exit(f"{min(unknown)}: no such setting; there are {', '.join(DEFAULTS)}")
    numbers = {key: type(DEFAULTS[key] or 0.0) for key in values if not isinstance(DEFAULTS[key], str)}
    numbers.pop("reconstruction", None)
    return DEFAULTS | {key: numbers[key](float(value)) if key in numbers else value for key, value in values.items()}


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in ("make", "run", "load"):
        sys.exit(__doc__)
    main(sys.argv[1], Path(sys.argv[2]), _parsed(sys.argv[3:]))
