"""Reconstruction: weight roundings and activation step sizes chosen block by block on calibration data.

blocks = find_blocks(network, ("*resnets.*", "*attentions.*"), example_inputs)
reconstruction = Reconstruction(network, reference, blocks, calibration_set, settings, ...)
for block in reconstruction.remaining:
    reconstruction.begin()
    for _ in range(reconstruction.iterations):
        reconstruction.step()
    reconstruction.end()
"""

from ptq_exp.reconstruction.activations import StepSizes, dropping
from ptq_exp.reconstruction.adaround import Annealing, Rounding, reconstruction_loss, rectified_sigmoid, regulariser
from ptq_exp.reconstruction.block_report import BlockError, BlockReport, LayerRounding, summary, table
from ptq_exp.reconstruction.blocks import Block, find_blocks
from ptq_exp.reconstruction.capture import Arena, Calls, capture
from ptq_exp.reconstruction.gptq_block import GPTQBlock, GPTQSettings
from ptq_exp.reconstruction.gptq_rounding import gptq
from ptq_exp.reconstruction.hessian import InputHessian
from ptq_exp.reconstruction.learned import learned_tensors, put_learned_
from ptq_exp.reconstruction.optimise import BlockData, BlockOptimisation, Settings, block_error
from ptq_exp.reconstruction.run import Reconstruction, split
from ptq_exp.reconstruction.time_block import TimeBlock, find_time_blocks

__all__ = [
    "Annealing", "Arena", "Block", "BlockData", "BlockError", "BlockOptimisation", "BlockReport", "Calls", "GPTQBlock",
    "GPTQSettings", "InputHessian", "LayerRounding", "Reconstruction", "Rounding", "Settings", "StepSizes", "TimeBlock",
    "block_error", "capture", "dropping", "find_blocks", "find_time_blocks", "gptq", "learned_tensors", "put_learned_",
    "reconstruction_loss", "rectified_sigmoid", "regulariser", "split", "summary", "table",
]
