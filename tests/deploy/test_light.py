"""A saved quantized model is loaded and drawn from without the frameworks that made it."""

import subprocess
import sys
import zipfile
from pathlib import Path

GOLDEN = Path(__file__).parents[1] / "golden" / "saved_model_1.zip"
CODE = """
import sys
import ptq_exp

def loaded():
    return sorted({name.partition(".")[0] for name in sys.modules}
                  & {"hydra", "omegaconf", "pytorch_lightning", "lightning", "lightning_fabric", "wandb"})

quantized = ptq_exp.load_quantized(sys.argv[1], checkpoint=sys.argv[2])
print("loaded", *loaded())
images = quantized.sample(2, batch_size=2)
assert (images == ptq_exp.sample(quantized, 2, batch_size=2)).all()
print("drawn", images.shape, *loaded())
"""


def test_neither_hydra_nor_lightning_nor_wandb_is_imported(tmp_path):
    zipfile.ZipFile(GOLDEN).extractall(tmp_path)
    command = [sys.executable, "-c", CODE, str(tmp_path / "quantized"), str(tmp_path / "model")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == ["loaded", "drawn (2, 8, 8, 3)"]
