"""Networks larger than memory: weights in files that are mapped, and what blocks have answered on disk.

network = mapped_copy(model, folder)
names = blocks_in_order(network, ("*transformer_blocks.*",), example_inputs)
answers = Answers(folder, last_readers(network, names, example_inputs))
for name in names:
    for number, batch in enumerate(batches):
        answers.run(network, name, number, batch)  # the blocks before answer from disk
    answers.finish(name)
    release(network.get_submodule(name))
"""

from ptq_exp.quantization.offload.answers import Answers
from ptq_exp.quantization.offload.mapped import (
    bring_in,
    bring_in_before_calls_,
    copy_of,
    evict,
    fill_,
    folder_of,
    in_file,
    mapped_copy,
    placing,
    release,
    stream_weights_,
    weight_bytes,
)
from ptq_exp.quantization.offload.parts import blocks_in_order, called_in_order, last_readers, outermost, without

__all__ = [
    "Answers", "blocks_in_order", "bring_in", "bring_in_before_calls_", "called_in_order", "copy_of", "evict", "fill_",
    "folder_of", "in_file", "last_readers", "mapped_copy", "outermost", "placing", "release", "stream_weights_",
    "weight_bytes", "without",
]
