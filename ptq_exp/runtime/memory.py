"""Peak memory of a process that does nothing but evaluate a network on OpenVINO."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ptq_exp.errors import PTQError
from ptq_exp.runtime.openvino import CompiledNetwork

EVALUATIONS = 3
_PROGRAM = """
import json, sys
import numpy as np, openvino
path, inputs, settings, n = *sys.argv[1:3], json.loads(sys.argv[3]), int(sys.argv[4])
core = openvino.Core()
compiled = core.compile_model(core.read_model(path), "CPU", settings)
with np.load(inputs) as given:
    inputs = {i: given[f"arr_{i}"] for i in range(len(given.files))}
for _ in range(n):
    compiled(inputs)
with open("/proc/self/status") as file:
    print(next(line.split()[1] for line in file if line.startswith("VmHWM")))
"""


def peaks(networks: Mapping[str, nn.Module], call: tuple[Any, ...]) -> dict[str, int]:
    """Measure `peak_bytes` of each network that an engine has compiled, by its name."""
    return {name: peak_bytes(network, tuple(call)) for name, network in networks.items()
            if isinstance(network, CompiledNetwork)}


def peak_bytes(network: CompiledNetwork, call: tuple[Any, ...]) -> int:
    """Measure the largest memory of a fresh process that reads, compiles and evaluates the `network`, with numpy alone.

    Raises:
        PTQError: the process does not end well, or the system does not say (it needs /proc of Linux).
    """
    path, flat = network.files(call)
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder) / "inputs.npz"
        np.savez(inputs, *(part.numpy() for part in flat))
        settings = json.dumps(network.safe_settings(path))
        command = [sys.executable, "-P", "-c", _PROGRAM, str(path), str(inputs), settings, str(EVALUATIONS)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise PTQError(f"the memory of a process that only evaluates the network was not measured: {said[-1]}")
    return 1024 * int(done.stdout)
