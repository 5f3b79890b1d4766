"""Empty classes that stand for the few classes which published checkpoints name beside their tensors.

PyTorch Lightning 1.x kept the state of callbacks under the callback's class, so the class itself is in the pickle. The
unpickler is given an empty class under that name: the file can be read, and no code of Lightning is reached.
"""

from __future__ import annotations


class ModelCheckpoint:
    """Stands for Lightning's callback of that name; holds nothing and does nothing."""


class EarlyStopping:
    """Stands for Lightning's callback of that name; holds nothing and does nothing."""


STAND_INS = [
    (ModelCheckpoint, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),
    (ModelCheckpoint, "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint"),
    (EarlyStopping, "pytorch_lightning.callbacks.early_stopping.EarlyStopping"),
]
"""(class, qualified name in the file) for `torch.serialization.safe_globals`."""
