"""Drawing images: bitwise the same for any order of the batches, any count, and after any kind of interruption."""

import multiprocessing
import os
import signal

import numpy as np
import pytest

from ptq_exp.diffusion import padded_batches
from ptq_exp.evaluation.images import to_uint8
from ptq_exp.lightning import EvaluationModule, draw_images, make_trainer
from ptq_exp.results.record import read_samples
from ptq_exp.storage.atomic import write_npz
from ptq_exp.storage.pieces import Parts

N, BATCH, STEPS, SEED = 10, 4, 3, 11


def draw(model, denoiser, trainer, folder, n=N):
    module = EvaluationModule(model, denoiser, model.time_grid(STEPS), seed=SEED)
    draw_images(module, trainer, n, BATCH, folder, folder.parent / "samples.npz")
    return np.array(read_samples(folder.parent / "samples.npz")[0])


def part_path(folder, start):
    return Parts(folder, [], N, ()).path(start)


@pytest.fixture(scope="module")
def uninterrupted(digits, quantized, tmp_path_factory):
    """Ten images of the quantized network, in batches of four."""
    trainer = make_trainer("test", accelerator="cpu", progress_bar=False)
    return draw(digits, quantized, trainer, tmp_path_factory.mktemp("drawn") / "parts")


def test_images_are_those_of_the_sampler_in_the_order_of_their_index(toy, trainer, tmp_path):
    images = draw(toy, toy.denoiser, trainer, tmp_path / "parts")
    assert images.shape == (N, 4, 4, 1) and images.dtype == np.uint8
    expected = toy.sample(toy.denoiser, toy.time_grid(STEPS), range(N), SEED)
    assert np.array_equal(images, to_uint8(expected))
    assert trainer.callbacks == []


def test_eta_and_seed_reach_the_sampler(toy, trainer, tmp_path):
    grid = toy.time_grid(STEPS, eta=1.0)
    draw_images(EvaluationModule(toy, toy.denoiser, grid, seed=3), trainer, 4, 4, tmp_path / "p", tmp_path / "s.npz")
    images, labels = read_samples(tmp_path / "s.npz")
    expected = toy.sample(toy.denoiser, grid, range(4), 3)
    assert labels is None
    assert np.array_equal(images, to_uint8(expected))


def test_quantized_images_are_the_same_in_any_order_of_the_batches(digits, quantized, uninterrupted):
    for batch in reversed(padded_batches(N, BATCH)):
        again = to_uint8(digits.sample(quantized, digits.time_grid(STEPS), batch, SEED))
        kept = [i for i in batch if i < N]
        assert np.array_equal(again[: len(kept)], uninterrupted[kept])


def test_quantized_images_do_not_depend_on_how_many_are_asked_for(
    digits, quantized, trainer, uninterrupted, tmp_path
):
    assert np.array_equal(draw(digits, quantized, trainer, tmp_path / "parts", n=5), uninterrupted[:5])


def test_images_are_quantized_and_not_all_the_same(digits, uninterrupted):
    exact = to_uint8(digits.sample(digits.denoiser, digits.time_grid(STEPS), range(4), SEED))
    assert not np.array_equal(exact, uninterrupted[:4])
    assert len(np.unique(uninterrupted.reshape(N, -1), axis=0)) == N


def test_quantized_images_are_the_same_after_a_resume(
    digits, quantized, trainer, uninterrupted, counting, tmp_path
):
    """The denoiser fails in the middle of the second batch; the first is not drawn again."""

    def fail():
        raise RuntimeError("device lost")

    folder = tmp_path / "parts"
    with pytest.raises(RuntimeError, match="device lost"):
        draw(digits, counting(quantized, fails_at=STEPS + 2, fail=fail), trainer, folder)
    assert [path.name for path in folder.iterdir()] == ["00000000.npz"]
    denoiser = counting(quantized)
    assert np.array_equal(draw(digits, denoiser, trainer, folder), uninterrupted)
    assert denoiser.calls == 2 * STEPS


def test_quantized_images_are_the_same_after_a_kill(digits, quantized, trainer, uninterrupted, counting, tmp_path):
    """SIGKILL in the middle of the third batch, in a process of its own."""
    folder = tmp_path / "parts"

    def run():
        denoiser = counting(quantized, 2 * STEPS + 2, lambda: os.kill(os.getpid(), signal.SIGKILL))
        draw(digits, denoiser, trainer, folder)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(120)
    process.kill()
    assert process.exitcode == -signal.SIGKILL
    assert sorted(path.name for path in folder.glob("*.npz")) == ["00000000.npz", "00000004.npz"]
    denoiser = counting(quantized)
    assert np.array_equal(draw(digits, denoiser, trainer, folder), uninterrupted)
    assert denoiser.calls == STEPS


def damage(path, how):
    """Damage the file of a batch as a full disk, a crash or a flipped bit would."""
    whole = bytearray(path.read_bytes())
    if how == "deleted":
        path.unlink()
    elif how == "garbage":
        path.write_bytes(b"no archive" * 20)
    elif how == "flipped":
        middle = whole.index(b"\n", 40) + 8
        whole[middle] ^= 1
        path.write_bytes(whole)
    elif how == "says it is encrypted":
        flags = whole.index(b"PK\x01\x02") + 8
        whole[flags] |= 1
        path.write_bytes(whole)
    elif how == "other content":
        write_npz(path, pictures=np.zeros(3))
    else:
        path.write_bytes(whole[: {"empty": 0, "halved": len(whole) // 2, "last byte": -1}[how]])


@pytest.mark.parametrize(
    "how",
    ["deleted", "empty", "halved", "last byte", "garbage", "flipped", "says it is encrypted", "other content"],
)
def test_damaged_batches_are_drawn_again_and_no_others(toy, trainer, counting, tmp_path, how):
    module = EvaluationModule(toy, toy.denoiser, toy.time_grid(STEPS), seed=SEED)
    folder = tmp_path / "parts"
    expected = to_uint8(toy.sample(toy.denoiser, module.grid, range(12), SEED))
    for start in (0, 4, 8):
        write_npz(part_path(folder, start), arr_0=expected[start : start + 4])
    for start in (0, 8):
        damage(part_path(folder, start), how)
    denoiser = counting(toy.denoiser)
    assert np.array_equal(draw(toy, denoiser, trainer, folder), expected[:N])
    assert denoiser.calls == 2 * STEPS


def test_whole_batches_are_trusted(toy, trainer, counting, tmp_path):
    marked = np.full((4, 4, 4, 1), 77, np.uint8)
    for start in (0, 4, 8):
        write_npz(part_path(tmp_path / "parts", start), arr_0=marked)
    denoiser = counting(toy.denoiser)
    images = draw(toy, denoiser, trainer, tmp_path / "parts")
    assert denoiser.calls == 0 and images.shape == (N, 4, 4, 1) and set(images.flat) == {77}


def test_the_progress_bar_has_a_title_and_an_estimate(toy, tmp_path, capsys):
    trainer = make_trainer("FP32 images", accelerator="cpu")
    draw(toy, toy.denoiser, trainer, tmp_path / "parts")
    shown = "".join(capsys.readouterr())
    assert "FP32 images" in shown and "3/3" in shown
    # elapsed<remaining
    assert "[0:00:00<0:00:00" in shown.replace("[00:00", "[0:00:00").replace("<00:00", "<0:00:00")
    assert len(trainer.callbacks) == 1
