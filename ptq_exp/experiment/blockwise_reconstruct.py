"""Reconstruction of a network larger than memory: the same roundings, one block in memory at a time."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ptq_exp.calibration import CalibrationSet
from ptq_exp.diffusion import Call
from ptq_exp.experiment.blockwise import blocks_of_network
from ptq_exp.experiment.run import Run
from ptq_exp.quantization import ActivationQuantizer, of_samples
from ptq_exp.quantization.offload import Answers, called_in_order, release
from ptq_exp.quantization.packed_network import packed_layers, restore_weight_
from ptq_exp.quantization.packing import pack
from ptq_exp.reconstruction import Block, BlockReport, Reconstruction
from ptq_exp.storage.atomic import write_npz
from ptq_exp.storage.npz import npz_arrays

log = logging.getLogger("ptq_exp")

_REPORT = "report"


class BlockwiseReconstruction:
    """Drives a `Reconstruction` through the blocks that are divided on disk; see `blockwise`.

    The blocks that are reconstructed may be smaller: single layers of a block, or layers outside of all.

    Args:
        run: of the experiment.
        reconstruction: of the whole network; it captures what its blocks read behind answers from disk.
        folder: where a killed run finds finished blocks again.
    """

    def __init__(self, run: Run, reconstruction: Reconstruction, folder: Path) -> None:
        self.run, self.reconstruction, self.folder = run, reconstruction, folder
        self.network, self.reference = reconstruction.network, reconstruction.reference
        reconstruction.batches = self._batches
        self.names, readers = blocks_of_network(run, self.network)
        samples = {"optimised": reconstruction.optimised_on, "held_out": reconstruction.held_out}
        self._answers = {
            (network is self.reference, states is reconstruction.held_out):
                (network, states, Answers(folder / f"{of}_{which}", readers))
            for of, network in (("full", self.reference), ("quantized", self.network))
            for which, states in samples.items()
            if network is not self.reference or which == "held_out" or reconstruction.settings.reads_reference
        }

    def reconstruct(self) -> dict[str, np.ndarray]:
        """Reconstruct all blocks in place; returns what they hold now, see `arrays_of`, and `reports` as JSON."""
        blocks = {block.name: block for block in self.reconstruction.blocks}
        self.network.eval()
        self.reference.eval()
        found: dict[str, np.ndarray] = {}
        inside = None
        with self.run.progress(len(blocks), "reconstruction, block by block") as bar:
            for name in dict.fromkeys(called_in_order(self.network, {*self.names, *blocks}, self.run.example())):
                around = next((n for n in self.names if name == n or name.startswith(f"{n}.")), None)
                if around != inside:
                    self._finish(inside)
                    inside = around
                if name in blocks:
                    found |= self._reconstructed(blocks[name])
                    bar.update()
            self._finish(inside)
        reports = [report.to_dict() for report in self.reconstruction.reports]
        return found | {"reports": np.array(json.dumps(reports))}

    def _reconstructed(self, block: Block) -> Mapping[str, np.ndarray]:
        """Reconstruct one block, or take what a killed run has found for it; returns its arrays, mapped."""
        reconstruction = self.reconstruction
        path = self.folder / f"{len(reconstruction.reports):04d}.npz"
        if path.exists():
            arrays = npz_arrays(path)
            restore_arrays_(self.network, {key: array for key, array in arrays.items() if key != _REPORT})
            reconstruction.reports.append(BlockReport.from_dict(json.loads(str(arrays[_REPORT]))))
        else:
            reconstruction.begin()
            for _ in range(reconstruction.iterations):
                reconstruction.step()
            report = reconstruction.end()
            arrays = arrays_of(self.network, block.name)
            write_npz(path, **arrays, **{_REPORT: np.array(json.dumps(report.to_dict()))})
            log.info("%s: relative error %.4f -> %.4f", block.name, report.before_quantized.relative,
                     report.after_quantized.relative)
        release(block.module(self.network))
        return {key: array for key, array in npz_arrays(path).items() if key != _REPORT}

    def _finish(self, name: str | None) -> None:
        """Keep what the block `name`, whose turn is over, answers in both networks."""
        for network, samples, answers in self._answers.values() if name is not None else ():
            if not answers.has(name):
                size, rows = self.reconstruction.batch_size, self.reconstruction.rows_of(samples)
                start = 0
                for number, call in enumerate(samples.batches(size)):
                    with of_samples(network, None if rows is None else rows[start : start + len(call.x)]):
                        answers.run(network, name, number, call.to(self.run.device))
                    start += len(call.x)
                answers.finish(name)
            release(network.get_submodule(name))

    def _batches(self, network: nn.Module, samples: CalibrationSet) -> Iterator[Call]:
        """Yield the calls of `samples`, while finished blocks of `network` answer from disk."""
        key = (network is self.reference, samples is self.reconstruction.held_out)
        return self._answers[key][2].before(network, samples.batches(self.reconstruction.batch_size))


def arrays_of(network: nn.Module, name: str) -> dict[str, np.ndarray]:
    """Return what the reconstruction of the block `name` changes: packed weights, and step sizes of activations."""
    found = {}
    block = network.get_submodule(name)
    for weight, layer in packed_layers(block):
        quantizer = layer.weight_quantizer
        found[f"{name}.{weight}"] = pack(quantizer.integers(layer.weight).cpu().numpy(), quantizer.bits)
    for quantizer, module in block.named_modules(prefix=name):
        if isinstance(module, ActivationQuantizer):
            found[f"{quantizer}.scale"] = module.scale.detach().cpu().numpy()
    return found


@torch.no_grad()
def restore_arrays_(network: nn.Module, arrays: Mapping[str, np.ndarray]) -> None:
    """Give the calibrated `network` what `arrays_of` took."""
    for key, array in arrays.items():
        owner = network.get_submodule(key.rpartition(".")[0])
        values = torch.from_numpy(np.array(array))
        if key.endswith(".weight"):
            restore_weight_(owner, values)
        else:
            owner.scale.copy_(values)

