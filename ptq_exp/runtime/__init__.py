"""How a quantized network is executed: simulated in floating point, or by an engine that computes with integers.

runtime = runtime_of("simulate")
network = runtime.compile(quantized.network, example_call)  # called as the quantized network is
runtime.account()                                           # what ran as integers, layer by layer, and `int8_share`
"""

from ptq_exp.runtime.base import RUNTIMES, ExecutedLayer, Execution, Runtime, runtime_of
from ptq_exp.runtime.cuda_graph import GraphedNetwork
from ptq_exp.runtime.simulate import Simulate

__all__ = ["RUNTIMES", "ExecutedLayer", "Execution", "GraphedNetwork", "Runtime", "Simulate", "runtime_of"]
