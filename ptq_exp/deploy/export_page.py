"""README.md of an exported model: six lines that run it, and what its files hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_PAGE = """# {model}, {bits}, for {title}

The noise estimator of the diffusion model `{model}`, quantized after training, in `{file}`. It runs without ptq-exp
({install}):

```python
{program}
```

`example.npz` holds inputs of the first sampling step, and what the simulation of ptq-exp makes of them. {settings}

| | |
| --- | --- |
| inputs | {inputs} |
| outputs | {outputs} |
| multiplications executed as integers | {share:.2%}, by {executed_by} |
| relative distance from the simulation, on `example.npz` | {errors} |

`export.json` holds, too: the digest of the saved model, versions, how each layer is executed and why those in floating
point are not integers (`layers`), and the sampling steps (`sampler`): the network time `t` of each step in `timesteps`,
its noise levels in `alphas_cumprod` and `alphas_cumprod_prev`{rows}.{beside}{probe}
"""
_PROGRAMS = {
    "openvino": """\
import numpy, openvino
example = dict(numpy.load("example.npz"))
wanted = example.pop("eps")
network = openvino.Core().compile_model("{file}", "CPU", {settings})
eps = network(example)["eps"]
print(numpy.linalg.norm(eps - wanted) / numpy.linalg.norm(wanted))""",
    "onnx": """\
import numpy, onnxruntime
example, options = dict(numpy.load("example.npz")), onnxruntime.SessionOptions()
wanted = example.pop("eps")
for entry in {settings}.items(): options.add_session_config_entry(*entry)
eps = onnxruntime.InferenceSession("{file}", options).run(["eps"], example)[0]
print(numpy.linalg.norm(eps - wanted) / numpy.linalg.norm(wanted))""",
}
_TITLES = {"openvino": "OpenVINO", "onnx": "ONNX Runtime and other engines that read ONNX"}
_INSTALL = {"openvino": "pip install openvino", "onnx": "pip install onnxruntime"}
_SETTINGS = {
    "openvino": "The settings belong to the file: without\n`INFERENCE_PRECISION_HINT`, OpenVINO computes in bfloat16 "
    "what is not int8.",
    "onnx": "The session's options belong to the\nfile: without the first ONNX Runtime refuses signed 8-bit "
    "activations, without the second it rounds biases. On CPUs its\nprovider is slower with integers than in float32; "
    "OpenVINO reads the file, too, and executes it as its own format.",
}


def page(about: Mapping[str, Any]) -> str:
    """Write the text of the page, from the content of export.json."""
    name, source, sampler = about["format"], about["source"], about["sampler"]
    settings = ", ".join(f'"{key}": "{value}"' for key, value in about["settings"].items())
    program = _PROGRAMS[name].format(file=about["file"], settings=f"{{{settings}}}")
    beside = []
    if sampler["guidance_scale"] != 1:
        beside.append(f"guidance of scale {sampler['guidance_scale']:g}")
    if sampler["corrected"]:
        beside.append("the correction of quantization noise")
    left = f" Not in the file, but part of the saved model: {' and '.join(beside)}." if beside else ""
    any_batch = about["inputs"][0]["shape"][0] == "batch"
    slower = " Any number of samples runs slower than a fixed one (`batch=8`)." if any_batch else ""
    return _PAGE.format(
        model=source["model"], bits=source["bits"].upper(), title=_TITLES[name], file=about["file"], program=program,
        install=_INSTALL[name], settings=_SETTINGS[name] + slower, inputs=_ports(about["inputs"]),
        outputs=_ports(about["outputs"]), share=about["int8_share"], executed_by=about["executed_by"],
        errors=", ".join(f"{value:.2g} by {engine}" for engine, value in about["error_to_simulation"].items()),
        rows=", and the input `row` of each step in `rows`" if sampler["rows"] else "", beside=left,
        probe=_probe(about["probe"]),
    )


def _ports(ports: list[dict[str, Any]]) -> str:
    return ", ".join(f"`{port['name']}` {port['type']} [{', '.join(map(str, port['shape']))}]" for port in ports)


def _probe(probe: Mapping[str, Any] | None) -> str:
    """Say what processors the file is not for."""
    if probe is not None and probe["weights"] == "7bit":
        return "\n\nWeights have 7 bits: sums are right on processors without VNNI instructions, too."
    return (
        "\n\nOn processors without VNNI (or AMX) instructions 8-bit sums saturate, without a message: use an export "
        "with\n`runtime.weights=7bit` there."
    )
