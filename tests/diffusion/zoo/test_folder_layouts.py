"""The ways in which people store the weights of a diffusers folder, and the places that they give."""

import json
import os
import shutil
import tarfile
from contextlib import nullcontext

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file, save_file
from small_folders import BETAS, dit_folder, edit, latent_folder, pixel_folder, unet

from ptq_exp.diffusion.checkpoints import read_checkpoint
from ptq_exp.diffusion.zoo.build import mapped_weights
from ptq_exp.diffusion.zoo.registry import load_model
from ptq_exp.errors import CheckpointError

STEM = "diffusion_pytorch_model"


def message(checkpoint):
    with pytest.raises(CheckpointError) as caught:
        load_model("diffusers", str(checkpoint))
    text = str(caught.value)
    assert text.startswith("model.checkpoint=") and "\n" not in text
    return text


def assert_weights(root, expected):
    """The network of a folder holds the tensors `expected`, in float32."""
    model = load_model("diffusers", str(root))
    found = model.denoiser.unet.state_dict()
    assert found.keys() == expected.keys()
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert all(torch.equal(found[key], value.float()) for key, value in expected.items())
    return model


def plain():
    return unet().state_dict()


def half():
    return {key: value.half() for key, value in plain().items()}


def variant(tmp_path, name, dtype=torch.float16, **save):
    """A pipeline of which all weights are those of a variant."""
    root = tmp_path / "model"
    pixel_folder(root)
    shutil.rmtree(root / "unet")
    unet().to(dtype).save_pretrained(root / "unet", variant=name, **save)
    return root


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("shards", [False, True])
def test_the_only_variant_is_taken_and_widened(tmp_path, caplog, safe, shards):
    save = {"safe_serialization": safe} | ({"max_shard_size": "8KB"} if shards else {})
    root = variant(tmp_path, "fp16", **save)
    names = [path.name for path in (root / "unet").iterdir()]
    assert all("fp16" in name for name in names if name != "config.json") and (len(names) > 3) == shards
    assert_weights(root, half())
    assert "only the fp16 variant of the weights is there: read in float32\n" in caplog.text


@pytest.mark.parametrize(("mapped", "dtype", "said"), [
    (False, "float16", "read in float32, kept in float16"), (True, "float16", "read in float16"),
    (True, "bfloat16", "read in float32, kept in bfloat16"), (False, "float64", "read in float64"),
])
def test_the_type_that_is_said_is_that_of_the_weights(tmp_path, caplog, mapped, dtype, said):
    root = variant(tmp_path, "fp16")
    with mapped_weights(1e6) if mapped else nullcontext():
        model = load_model("diffusers", str(root), dtype=dtype)
    assert f"only the fp16 variant of the weights is there: {said}\n" in caplog.text
    assert {str(value.dtype) for value in model.denoiser.parameters()} == {f"torch.{said.split()[-1]}"}


@pytest.mark.parametrize("name", ["bf16", "non_ema", "ema"])
def test_other_variants(tmp_path, name):
    dtype = torch.bfloat16 if name == "bf16" else torch.float32
    assert_weights(variant(tmp_path, name, dtype), {key: value.to(dtype) for key, value in plain().items()})


def test_shards_of_a_variant_as_earlier_versions_named_them(tmp_path):
    root = variant(tmp_path, "fp16", max_shard_size="8KB") / "unet"
    index = root / f"{STEM}.safetensors.index.fp16.json"
    text = index.read_text()
    for path in root.glob(f"{STEM}.fp16-*"):
        name = path.name.replace(".fp16", "").replace(".safetensors", ".fp16.safetensors")
        text = text.replace(path.name, name)
        path.rename(root / name)
    index.write_text(text)
    assert_weights(root.parent, half())


def test_plain_weights_go_before_variants(tmp_path, caplog):
    root = pixel_folder(tmp_path)
    unet().half().save_pretrained(root / "unet", variant="fp16")
    unet().half().save_pretrained(root / "unet", variant="non_ema")
    assert_weights(root, plain())
    assert "variant" not in caplog.text
    (root / "unet" / f"{STEM}.safetensors").unlink()
    assert "holds the variants fp16, non_ema of its weights" in message(root)
    unet().save_pretrained(root / "unet", safe_serialization=False)
    assert_weights(root, plain())


def test_plain_weights_in_half_precision_are_widened(tmp_path):
    root = pixel_folder(tmp_path)
    unet().half().save_pretrained(root / "unet")
    assert_weights(root, half())


def prefixed(*prefixes):
    return {"".join(prefixes) + key: value for key, value in plain().items()}


def stored(tmp_path, content, safe=False):
    """A pipeline whose network lies in its file as `content`."""
    root = pixel_folder(tmp_path)
    (root / "unet" / f"{STEM}.safetensors").unlink()
    save = save_file if safe else torch.save
    save(content, root / "unet" / f"{STEM}.{'safetensors' if safe else 'bin'}")
    return root


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("prefixes", [("module.",), ("_orig_mod.",), ("_orig_mod.", "module.")], ids="".join)
def test_what_a_run_puts_before_every_name_is_taken_off(tmp_path, safe, prefixes):
    assert_weights(stored(tmp_path, prefixed(*prefixes), safe), plain())


@pytest.mark.parametrize("nest", [
    lambda: {"state_dict": plain(), "epoch": 3}, lambda: {"model": plain(), "optimizer": {"state": {}, "step": 2}},
    lambda: {"ema": prefixed("module.")}, lambda: {"model": plain(), "step": torch.tensor(3)},
])
def test_a_single_state_dict_inside_a_training_state_is_taken(tmp_path, nest):
    assert_weights(stored(tmp_path, nest()), plain())


def test_weights_go_before_a_dict_of_tensors_beside_them(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"w": torch.ones(2), "averages": {"w": torch.zeros(2)}}, path)
    assert read_checkpoint(path)["w"].tolist() == [1.0, 1.0]


def test_other_stored_states_are_refused_in_a_line(tmp_path, capfd):
    both = message(stored(tmp_path / "both", {"model": plain(), "ema": plain()}))
    assert f"{STEM}.bin: holds several state dicts (model, ema); save the one to load alone" in both
    some = prefixed("module.") | dict(list(plain().items())[:5])
    assert "not the weights of its own config.json: " in message(stored(tmp_path / "some", some))
    codes = {key: (10 * value).to(torch.int8) for key, value in plain().items()}
    for safe in (True, False):
        line = message(stored(tmp_path / f"codes {safe}", codes, safe))
        assert "unet/diffusion_pytorch_model." in line and " is int8, not real numbers; give the weights in " in line
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("safe", [True, False])
def test_shards(tmp_path, safe):
    root = pixel_folder(tmp_path, save={"max_shard_size": "8KB", "safe_serialization": safe})
    assert len(list((root / "unet").iterdir())) > 4
    assert_weights(root, plain())


def shard(root, number=1):
    return sorted((root / "unet").glob(f"{STEM}-*"))[number]


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("keep", [0, 7, 100, 3000])
def test_truncated_shards_are_named(tmp_path, safe, keep):
    root = pixel_folder(tmp_path, save={"max_shard_size": "8KB", "safe_serialization": safe})
    path = shard(root)
    path.write_bytes(path.read_bytes()[:keep])
    assert path.name in message(root)


def test_wrong_shards(tmp_path):
    root = pixel_folder(tmp_path, save={"max_shard_size": "8KB"})
    path, other = shard(root, 1), shard(root, 2)
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    text = message(root)
    assert f"{path.name} lacks" in text and "it is not the shard that its index lists" in text
    path.unlink()
    assert f"names {path.name}: no such file here" in message(root)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert path.name in message(root) and "Git LFS pointer" in message(root)
    state = load_file(other)
    path.write_bytes(content)
    save_file({key: value.repeat(2, *[1] * (value.ndim - 1)) for key, value in state.items()}, other, {"format": "pt"})
    assert "size mismatch" in message(root)


@pytest.mark.parametrize("content", [
    "", "{}", "[]", '{"weight_map": 3}', '{"weight_map": {}}', '{"weight_map": {"conv_in.weight": 3}}',
    '{"weight_map": {"conv_in.weight": "../unet/x.safetensors"}}',
])
def test_indices_that_list_no_shards(tmp_path, content):
    root = pixel_folder(tmp_path, save={"max_shard_size": "8KB"})
    index = root / "unet" / f"{STEM}.safetensors.index.json"
    index.write_text(content)
    assert index.name in message(root)
    index.unlink()
    assert f"not the {STEM}.safetensors.index.json that lists them" in message(root)


def test_other_names_are_listed(tmp_path):
    root = pixel_folder(tmp_path)
    (root / "unet" / f"{STEM}.safetensors").rename(root / "unet" / "model.safetensors")
    text = message(root)
    assert "not a complete UNet2DModel" in text and "there is config.json, model.safetensors" in text


@pytest.mark.parametrize("name", ["vae", "movq", "vqvae"])
@pytest.mark.parametrize("make", [latent_folder, dit_folder])
def test_the_first_stage_has_several_names(tmp_path, name, make):
    root = make(tmp_path)
    own = "vqvae" if make is latent_folder else "vae"
    entry = json.loads((root / "model_index.json").read_text())[own]
    reference = load_model("diffusers", str(root))
    edit(root, "model_index.json", **{own: ...})
    edit(root, "model_index.json", **{name: entry})
    (root / own).rename(root / name)
    z = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(load_model("diffusers", str(root)).decode(z), reference.decode(z))


@pytest.mark.parametrize("make", [pixel_folder, latent_folder, dit_folder])
def test_the_network_of_a_pipeline_stands_for_the_pipeline(tmp_path, caplog, make):
    """Its scheduler and first stage lie beside it: nothing has to be assumed."""
    root = make(tmp_path)
    network = root / ("transformer" if make is dit_folder else "unet")
    model = load_model("diffusers", str(network))
    assert model.digest == load_model("diffusers", str(root)).digest
    assert "a part of the pipeline" in caplog.text and "no scheduler settings" not in caplog.text


def test_averaged_weights_beside_the_others(tmp_path):
    """As training scripts leave them: two networks, no pipeline."""
    unet().save_pretrained(tmp_path / "unet")
    averaged = unet()
    with torch.no_grad():
        averaged.conv_in.bias.add_(1)
    averaged.save_pretrained(tmp_path / "unet_ema")
    text = message(tmp_path)
    assert "no config.json or model_index.json" in text and f"give {tmp_path}/unet or {tmp_path}/unet_ema" in text
    DDIMScheduler(clip_sample=False, **BETAS).save_pretrained(tmp_path / "unet_ema")
    assert not assert_weights(tmp_path / "unet_ema", averaged.state_dict()).clip_sample


def test_a_folder_around_the_folder(tmp_path):
    pixel_folder(tmp_path / "inner")
    assert f"but inner/; give {tmp_path}/inner" in message(tmp_path)


def test_the_cache_of_a_repository(tmp_path):
    root = tmp_path / "models--owner--name"
    pixel_folder(root / "snapshots" / "aaa")
    assert_weights(root, plain())
    pixel_folder(root / "snapshots" / "bbb", sample_size=16)
    assert "the cache of a repository with 2 snapshots" in message(root)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("bbb")
    assert load_model("diffusers", str(root)).sample_shape == (3, 16, 16)


def test_a_repository_of_variants_alone(tmp_path, monkeypatch):
    root = variant(tmp_path, "fp16")
    asked = []

    def snapshot_download(repository, allow_patterns, ignore_patterns):
        asked.append(ignore_patterns)
        found = root if "*.fp16.*" not in ignore_patterns else tmp_path / "settings"
        found.mkdir(exist_ok=True)
        return str(found)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    model = load_model("diffusers", "owner/name")
    assert torch.equal(model.denoiser.unet.conv_in.weight, half()["conv_in.weight"].float()) and len(asked) == 3


def test_files_in_place_of_a_folder(tmp_path):
    root = pixel_folder(tmp_path / "model")
    weights = root / "unet" / f"{STEM}.safetensors"
    for path in (weights, root / "unet" / "config.json", root / "model_index.json"):
        assert message(path).endswith(f"a file; the model `diffusers` takes a folder; give {root}")
    for name in ("alone.safetensors", "alone.ckpt"):
        shutil.copy(weights, tmp_path / name)
        assert "weights alone say neither their network" in message(tmp_path / name)
    torch.save(plain(), tmp_path / "torch.ckpt")
    assert "weights alone say neither" in message(tmp_path / "torch.ckpt")
    shutil.make_archive(tmp_path / "packed", "zip", root)
    with tarfile.open(tmp_path / "packed.tar.gz", "w:gz") as archive:
        archive.add(root)
    for name in ("packed.zip", "packed.tar.gz"):
        assert "this is an archive; unpack it and give the folder" in message(tmp_path / name)


def test_code_in_a_shard_is_not_executed(tmp_path):
    class Runs:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'executed'}",)

    root = pixel_folder(tmp_path / "model", save={"max_shard_size": "8KB", "safe_serialization": False})
    torch.save({"conv_in.weight": Runs()}, shard(root))
    text = message(root)
    assert shard(root).name in text and "nothing of it was executed" in text
    assert not (tmp_path / "executed").exists()


def test_a_link_to_a_folder(tmp_path):
    pixel_folder(tmp_path / "model")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    assert_weights(tmp_path / "link", plain())
