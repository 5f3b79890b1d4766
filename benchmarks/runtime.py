"""Whole networks at W8A8 on an engine, beside torch in full precision, the simulation, and the engine in f32 and bf16.

    python benchmarks/runtime.py [--networks digits ddim_cifar10 ldm4_imagenet256 dit] [--engine openvino]
                                 [--threads 1 2] [--repeats 5] [--quick] [--no-memory] [--cpu-time]
                                 [--json FILE]

Prints milliseconds per evaluation (medians of turns in one process), their ratios, the peak memory of a process that
reads, compiles and evaluates the network with numpy alone, and what the engine's own graph executes as integers.
Random weights, but for digits; weights and q, k, v are symmetric, so that all products of attention are integers.
--quick: digits, one thread, one turn. --cpu-time: of the process (with one thread, about the wall time of a machine
without other work).
"""

from __future__ import annotations

import argparse
import copy
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from ptq_exp import load_model
from ptq_exp.deploy.measure import SIMULATION, TORCH, execution_entry, timed, times_entry
from ptq_exp.diffusion import Call, DiTDenoiser
from ptq_exp.quantization import Policy, Rule, Widths, calibrate_, quantize_
from ptq_exp.reports.runtime import table
from ptq_exp.runtime import runtime_of
from ptq_exp.runtime.memory import peak_bytes

CLASSES = 1000


def of_zoo(name: str) -> tuple[nn.Module, Callable[[int], Call], Policy]:
    """Return the network of a model, a function that makes calls, and its policy."""
    model = load_model(name)

    def call(n: int) -> Call:
        conditions = {} if model.n_classes is None else {"y": torch.arange(n) % model.n_classes}
        return Call(torch.randn(n, *model.sample_shape), torch.full((n,), 500.0), conditions)

    return model.denoiser, call, Policy(first=model.first_layers, last=model.last_layers)


def dit(_: str) -> tuple[nn.Module, Callable[[int], Call], Policy]:
    """Return the same of a transformer of 12 blocks, width 768, on 256 tokens (Peebles and Xie, 2023: DiT-B/2)."""
    transformer = DiTTransformer2DModel(
        num_attention_heads=12, attention_head_dim=64, in_channels=4, out_channels=8, num_layers=12, sample_size=32,
        patch_size=2, num_embeds_ada_norm=CLASSES,
    )

    def call(n: int) -> Call:
        return Call(torch.randn(n, 4, 32, 32), torch.full((n,), 500.0), {"y": torch.arange(n)})

    return DiTDenoiser(transformer, CLASSES).eval(), call, Policy(first=("*pos_embed.proj",), last=("*proj_out_2",))


NETWORKS: dict[str, tuple[Callable, int]] = {
    "digits": (of_zoo, 64), "ddim_cifar10": (of_zoo, 4), "ldm4_imagenet256": (of_zoo, 2), "dit": (dit, 2),
}
"""Name -> what makes it, and samples of one evaluation."""


def quantized(network: nn.Module, call: Callable[[int], Call], policy: Policy) -> nn.Module:
    """Quantize a copy to 8 bits, with the ranges of one noise batch: speed does not depend on their values."""
    made = copy.deepcopy(network).requires_grad_(False)
    rules = [rule if rule.pattern != "*to_[qkv]" else _symmetric(rule) for rule in policy.rules(Widths(8, 8))]
    quantize_(made, rules, call(1))
    calibrate_(made, "minmax", [call(1)])
    return made


def _symmetric(rule: Rule) -> Rule:
    """Return the rule with zero point 0 of q, k and v."""
    return replace(rule, spec=replace(rule.spec, output=replace(rule.spec.output, symmetric=True)))


@torch.no_grad()
def bench(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one network: a row for each number of threads."""
    make, batch = NETWORKS[name]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random weights are what is wanted
        network, call_of, policy = make(name)
    policy = Policy(first=policy.first, last=policy.last, weight_symmetric=True)
    simulated, call = quantized(network, call_of, policy), call_of(batch)
    rows = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        runtime = runtime_of(args.engine)
        ways = {TORCH: network, SIMULATION: simulated, f"{args.engine}_int8": runtime.compile(simulated, call_of(1))}
        if hasattr(runtime, "in_float"):
            on_engine = {f"{args.engine}_{kind}": runtime.in_float(network, kind) for kind in ("f32", "bf16")}
            mixed = runtime_of(args.engine, {"precision": "bf16"}).compile(simulated, call_of(1))
            ways |= on_engine | {f"{args.engine}_int8_bf16": mixed}
        error = _error(call.evaluate(ways[f"{args.engine}_int8"]), call.evaluate(simulated))
        row = {
            **execution_entry(runtime), "eps_error": error,
            "eps_error_fp32": _error(call.evaluate(simulated), call.evaluate(network)),
            **times_entry(timed(ways, call, args.repeats, clock=args.clock), args.engine, batch, 1),
        }
        if args.memory and threads == args.threads[0] and hasattr(runtime, "in_float"):
            row["peak_bytes"] = peak_bytes(ways, call)
        rows.append(row)
        print(f"{name}, {threads} threads: {row['int8_share']:.2%} of conv + linear MACs and "
              f"{row['attention_int8_share'] or 0:.0%} of attention as int8; to the simulation {error:.2%}", flush=True)
    return {"network": name, "parameters": sum(p.numel() for p in network.parameters()), "batch": batch, "rows": rows}


def _error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--engine", default="openvino")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="digits, one thread, one turn")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave out the peak memory")
    parser.add_argument("--cpu-time", dest="clock", action="store_const", const=time.process_time,
                        default=time.perf_counter, help="of the process, where other work shares the machine")
    parser.add_argument("--json", type=Path, help="write all numbers there, too")
    args = parser.parse_args()
    if args.quick:
        args.networks, args.threads, args.repeats = ["digits"], [1], 1
    found = []
    for name in args.networks:
        found.append(bench(name, args))
        if args.json is not None:  # after each: the large ones take minutes
            args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print("\n".join(table(found)))


if __name__ == "__main__":
    main()
