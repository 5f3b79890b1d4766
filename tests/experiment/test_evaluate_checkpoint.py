"""A saved quantized model of the embedded network and its checkpoint: another one, none, one of one's own."""

import numpy as np
import pytest
from small_networks import use_blank_pictures, use_one_composition

import ptq_exp
from ptq_exp.errors import CheckpointError
from ptq_exp.results.record import read_samples


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    use_blank_pictures(monkeypatch)
    use_one_composition(monkeypatch)


def images(folder):
    return read_samples(folder / "samples.npz")[0]


@pytest.fixture
def other_weights(tmp_path):
    """The embedded weights of `digits`, changed a little."""
    from safetensors.torch import load_file, save_file

    from ptq_exp.embedded.weights_file import WEIGHTS

    state = load_file(WEIGHTS / "digits_unet.safetensors")
    state["conv_in.bias"] += 1
    save_file(state, tmp_path / "other.safetensors")
    return tmp_path / "other.safetensors"


def test_another_checkpoint_is_refused_and_both_digests_are_named(run_of, refused, other_weights):
    folder = run_of("bits=w8a8")
    digest, other = (ptq_exp.load_model("digits", file).digest[:12] for file in (None, str(other_weights)))
    with pytest.raises(CheckpointError, match=f"{digest}.*{other}.*set checkpoint to"):
        ptq_exp.load_quantized(folder, checkpoint=str(other_weights))
    said = refused("logger=none", "+experiment=evaluate", f"quantized={folder}", f"model.checkpoint={other_weights}")
    assert digest in said and other in said and "set model.checkpoint" in said


def test_without_its_checkpoint_a_pixel_model_is_complete(run_of, other_weights):
    folder = run_of("bits=w8a8", f"model.checkpoint={other_weights}")
    with_it = ptq_exp.load_quantized(folder)
    other_weights.unlink()
    without = ptq_exp.load_quantized(folder)
    assert with_it.full_precision and not without.full_precision
    assert without.model.denoiser is without.network and without.model.digest != with_it.model.digest
    assert np.array_equal(*(ptq_exp.sample(m, 5, batch_size=5) for m in (with_it, without)))
    assert np.array_equal(ptq_exp.sample(without, 5, batch_size=5), images(folder)[:5])


def test_a_model_of_ones_own_can_be_given(run_of):
    folder = run_of("bits=w8a8")
    mine = ptq_exp.load_quantized(folder, model=ptq_exp.load_model("digits"))
    assert np.array_equal(ptq_exp.sample(mine, 5, batch_size=5), images(folder)[:5])
    with pytest.raises(CheckpointError, match="set model to"):
        ptq_exp.load_quantized(folder, model=ptq_exp.load_model("digits_ldm"))
