"""Quantize the embedded digits model in Python and check the numbers that must come out.

About a minute on one CPU core; nothing is downloaded. PSNR is between quantized and full-precision images of the same
noise. Run it: python examples/quantize_digits.py [picture.png]
"""

import copy
import sys

import numpy as np
from PIL import Image

import ptq_exp
from ptq_exp.calibration import SkewNormal, StateRequest, positions, source
from ptq_exp.evaluation.images import mean_psnr
from ptq_exp.quantization import Policy, Widths, calibrate_, quantize_

EXPECTED = {(8, 8): 49.4, (4, 8): 25.5, (4, 4): 24.4}
"""PSNR in dB by the bits of weights and activations."""
TOLERANCE = 2.0
"""In dB: differences of 1e-7 between processors become other rounded values, and those other images."""

model = ptq_exp.load_model("digits")
grid = model.time_grid(10)  # DDIM in 10 steps
images = ptq_exp.sample(model, 8, seed=0, steps=10)  # uint8 [8, 16, 16, 1]

# Calibration set: states of 24 denoising runs, at steps from PTQ4DM's skew normal.
steps = positions(SkewNormal(mean=0.4, std=0.4, shape=2.0), 24, len(grid), seed=0)
states, _ = source("denoise")(model, StateRequest(grid, range(24), steps, seed=0))

psnr, rows = {}, [images]
for weight, activation in EXPECTED:
    network = copy.deepcopy(model.denoiser)
    policy = Policy(first=model.first_layers, last=model.last_layers)
    rules = policy.rules(Widths(weight, activation))
    report = quantize_(network, rules, model.example_inputs())
    calibrate_(network, "mse", [(states, grid.network_time(steps))])
    assert report.totals["coverage"]["conv_linear"] == 1  # every multiplication of convolutions and linear layers
    quantized = ptq_exp.sample(model, 8, seed=0, steps=10, denoiser=network)
    rows.append(quantized)
    psnr[weight, activation] = mean_psnr(images, quantized)
    print(f"W{weight}A{activation}: {psnr[weight, activation]:.2f} dB")

if len(sys.argv) > 1:  # full precision on top, then one row for each pair of bits
    padded = [np.pad(row[..., 0], ((0, 0), (1, 1), (1, 1)), constant_values=255) for row in rows]
    picture = np.concatenate([np.concatenate(row, axis=1) for row in padded])
    Image.fromarray(picture).resize((720, 360), Image.Resampling.NEAREST).save(sys.argv[1])
for bits, expected in EXPECTED.items():
    assert abs(psnr[bits] - expected) < TOLERANCE, f"{bits}: {psnr[bits]:.2f} dB, expected {expected} dB"
