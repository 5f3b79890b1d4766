"""SSIM, PSNR, LPIPS and CLIP scores of pairs against golden values, and against slow computations of their own."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ptq_exp.errors import CheckpointError, ConfigError, DataError
from ptq_exp.evaluation import ImageText, Pairs, Perceptual, clip_score, lpips, psnr, ssim
from ptq_exp.evaluation.image_text import cosine_score
from ptq_exp.evaluation.pairs import clip_scores, lpips_values, psnr_values, ssim_values

GOLDEN = Path(__file__).parents[1] / "golden" / "pairs.npz"


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as stored:
        return dict(stored)


def planes(images):
    return np.moveaxis(images, 3, 1)


def slow_ssim(x, y, data_range):
    """Window by window: weighted means, variances and covariance as they are defined."""
    offsets = np.arange(11) - 5
    line = np.exp(-offsets**2 / 4.5)
    window = np.outer(line, line) / line.sum() ** 2
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    found = []
    for top in range(x.shape[0] - 10):
        for left in range(x.shape[1] - 10):
            u, v = (z[top : top + 11, left : left + 11] for z in (x, y))
            mu, nu = (window * u).sum(), (window * v).sum()
            variances = (window * (u - mu) ** 2).sum() + (window * (v - nu) ** 2).sum()
            covariance = (window * (u - mu) * (v - nu)).sum()
            found.append((2 * mu * nu + c1) * (2 * covariance + c2) / (mu**2 + nu**2 + c1) / (variances + c2))
    return np.mean(found)


def test_ssim_and_psnr_meet_the_golden_values(golden):
    values = ssim(planes(golden["a"]), planes(golden["b"]), 255)
    assert values.dtype == np.float64
    np.testing.assert_allclose(values, golden["ssim.numpy_wang_valid"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(values, golden["ssim.pytorch_msssim"], rtol=0, atol=2e-5)
    np.testing.assert_allclose(psnr(golden["a"], golden["b"]), golden["psnr.per_image"], rtol=1e-12)


@pytest.mark.parametrize(("shape", "data_range"), [((2, 1, 16, 16), 2.0), ((1, 3, 11, 13), 1.0)])
def test_ssim_is_its_definition(shape, data_range):
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, shape)
    y = x + rng.normal(0, 0.2, shape)
    expected = [np.mean([slow_ssim(*pair, data_range) for pair in zip(a, b, strict=True)])
                for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(ssim(x, y, data_range), expected, rtol=1e-10)
    found = ssim(torch.tensor(x), torch.tensor(y), data_range)
    assert isinstance(found, torch.Tensor)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10)


def test_ssim_of_identical_constant_and_many_images():
    rng = np.random.default_rng(1)
    x = rng.integers(0, 256, (70, 1, 12, 12), dtype=np.uint8)
    np.testing.assert_allclose(ssim(x, x, 255), np.ones(70), rtol=1e-12)
    y = rng.integers(0, 256, x.shape, dtype=np.uint8)
    np.testing.assert_array_equal(ssim(x, y, 255)[66:], ssim(x[66:], y[66:], 255))
    black, white = np.zeros((1, 1, 11, 11)), np.full((1, 1, 11, 11), 255.0)
    assert ssim(black, white, 255) == pytest.approx(1e-4 / (1 + 1e-4), rel=1e-9)  # c1 / (1 + c1), variances cancel


@pytest.mark.parametrize(("a", "b", "data_range", "said"), [
    (np.zeros((1, 1, 10, 16)), np.zeros((1, 1, 10, 16)), 1, "16x10"),
    (np.zeros((1, 1, 16, 16)), np.zeros((1, 3, 16, 16)), 1, "shapes"),
    (np.zeros((16, 16)), np.zeros((16, 16)), 1, "shapes"),
    (np.zeros((1, 1, 16, 16)), np.zeros((1, 1, 16, 16)), 0, "data_range"),
    (np.full((1, 1, 16, 16), np.nan), np.zeros((1, 1, 16, 16)), 1, "NaN"),
])
def test_ssim_refuses(a, b, data_range, said):
    with pytest.raises(DataError, match=said):
        ssim(a, b, data_range)


def weights_by_rule(golden, trunk):
    """Every weight of an `lpips.LPIPS`, drawn in the order of its names."""
    package = pytest.importorskip("lpips")
    names = package.LPIPS(net=trunk, pnet_rand=True, pretrained=False, verbose=False).state_dict()
    rng = np.random.default_rng(int(golden[f"lpips.{trunk}.seed"]))
    state = {}
    for name, tensor in names.items():
        if "scaling_layer" in name or name.startswith("lins."):
            continue
        drawn = rng.standard_normal(tensor.shape)
        if "lin" in name:
            drawn = np.abs(drawn) / tensor.shape[1]
        else:
            drawn *= np.sqrt(2 / np.prod(tensor.shape[1:])) if tensor.ndim == 4 else 0.05
        state[name] = torch.tensor(drawn.astype(np.float32))
    return state


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("trunk", ["alex", "squeeze", "vgg"])
def test_lpips_meets_the_golden_values(golden, tmp_path, trunk):
    save_file(weights_by_rule(golden, trunk), tmp_path / "w.safetensors")
    found = lpips(golden["a"], golden["b"], tmp_path / "w.safetensors")
    assert found[-1] == 0  # the last pair is identical
    np.testing.assert_allclose(found, golden[f"lpips.{trunk}.value"], rtol=1e-6)


@pytest.fixture(scope="module")
def alex(golden, tmp_path_factory):
    """AlexNet as torchvision stores it: with the classifier, here a stand-in, and without heads of LPIPS."""
    state = {"features." + name.split(".", 2)[2]: tensor for name, tensor in weights_by_rule(golden, "alex").items()
             if name.startswith("net.")}
    path = tmp_path_factory.mktemp("weights") / "alexnet.pth"
    torch.save(state | {"classifier.1.weight": torch.zeros(2, 2)}, path)
    return path


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lpips_reads_a_file_of_torchvision_and_takes_the_packages_heads(golden, alex):
    import lpips as package

    before = torch.random.get_rng_state()
    perceptual = Perceptual.load(alex)
    assert torch.equal(before, torch.random.get_rng_state())
    assert perceptual.trunk == "alex" and perceptual.name.startswith("alex-")
    own = package.LPIPS(net="alex", pnet_rand=True, verbose=False)
    stored = torch.load(alex)
    own.net.load_state_dict({name: stored["features." + name.split(".", 1)[1]] for name in own.net.state_dict()})
    x, y = (torch.tensor(planes(golden[key])).float() / 127.5 - 1 for key in ("a", "b"))
    with torch.no_grad():
        expected = own(x, y).flatten().numpy()
    np.testing.assert_allclose(perceptual(golden["a"], golden["b"]), expected, rtol=1e-5, atol=1e-7)


def test_small_and_grey_images_are_enlarged_without_interpolation(golden, alex):
    perceptual = Perceptual.load(alex)
    a, b = golden["a"][:2, :16, :16, :1], golden["b"][:2, :16, :16, :1]
    large = [x.repeat(4, axis=1).repeat(4, axis=2).repeat(3, axis=3) for x in (a, b)]
    assert [perceptual.factor(side, 64) for side in (16, 20, 30, 31, 64)] == [4, 4, 3, 1, 1]
    np.testing.assert_allclose(perceptual(a, b), perceptual(*large), rtol=1e-6)


def test_lpips_without_weights_says_so_in_one_line(tmp_path, monkeypatch):
    images = np.zeros((1, 64, 64, 3), np.uint8)
    (tmp_path / "torn.pth").write_bytes(b"no weights")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    torch.save({"features.10.weight": torch.zeros(2, 2)}, tmp_path / "parts.pth")
    wrong = {None: "evaluation.lpips is not set", tmp_path / "none.pth": "no such file", tmp_path / "torn.pth":
             "damaged", tmp_path / "other.pth": "holds weight", tmp_path / "parts.pth": "missing or of another shape"}
    for weights, said in wrong.items():
        with pytest.raises(CheckpointError, match=said) as refused:
            lpips(images, images, weights)
        assert "\n" not in str(refused.value) and "evaluation.lpips" in str(refused.value)
    monkeypatch.setitem(sys.modules, "lpips", None)
    torch.save({}, tmp_path / "other.pth")
    with pytest.raises(ConfigError, match=r"ptq-exp\[pairs\]"):
        lpips(images, images, tmp_path / "parts.pth")


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A CLIP model of random weights with a byte-level tokenizer, as a local folder."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    folder = tmp_path_factory.mktemp("clip") / "tiny-clip"
    words = {word: i for i, word in enumerate(["<pad>", "<start>", "<end>", "a", "red", "fox", "thick", "seven"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<start>", eos_token="<end>"
    ).save_pretrained(folder)
    transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    parts = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = parts | {"vocab_size": 8, "max_position_embeddings": 6, "eos_token_id": 2, "bos_token_id": 1,
                    "pad_token_id": 0}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=text, vision_config=parts | {"image_size": 32, "patch_size": 16},
                                     projection_dim=8)
    transformers.CLIPModel(config).save_pretrained(folder)
    return folder


PROMPTS = ["a red fox", "a thick seven", "seven"]


def test_clip_score_is_the_cosine_of_the_models_embeddings(clip_folder):
    from transformers import CLIPModel

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    found = clip_score(images, PROMPTS, clip_folder)
    model = CLIPModel.from_pretrained(clip_folder).eval()
    mean, std = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
    pixels = torch.tensor((images / 255 - mean) / std).permute(0, 3, 1, 2).float()
    ids = [[1, 3, 4, 5, 2], [1, 3, 6, 7, 2], [1, 7, 2]]
    for i in range(3):
        with torch.no_grad():
            out = model(input_ids=torch.tensor([ids[i]]), pixel_values=pixels[i : i + 1])
        cosine = torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds).item()
        assert found[i] == pytest.approx(100 * max(cosine, 0), abs=1e-3)
    grey = images[..., :1]
    np.testing.assert_allclose(clip_score(grey, PROMPTS, clip_folder),
                               clip_score(grey.repeat(3, axis=3), PROMPTS, clip_folder), rtol=1e-6)


def test_a_long_prompt_keeps_its_end_token(clip_folder):
    images = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    longest = clip_score(images, ["a red fox seven"], clip_folder)  # four words between start and end
    np.testing.assert_allclose(clip_score(images, ["a red fox seven thick thick"], clip_folder), longest, rtol=1e-6)


def test_clip_formula_meets_the_golden_values(golden):
    found = cosine_score(golden["clip.image"], golden["clip.text"])
    assert found.mean() == pytest.approx(float(golden["clip.mean_of_clamped_100"]), rel=1e-12)
    assert cosine_score(np.array([[1.0, 0]]), np.array([[-1.0, 0]])) == 0


def test_clip_without_a_model_says_so_in_one_line(tmp_path, clip_folder):
    images = np.zeros((1, 32, 32, 3), np.uint8)
    (tmp_path / "no_weights").mkdir()
    (tmp_path / "no_weights" / "config.json").write_text("{}")
    for folder, said in [(None, "is not set"), (tmp_path / "none", "no such folder"), (tmp_path / "no_weights",
                                                                                      "safetensors")]:
        with pytest.raises(CheckpointError, match=said) as refused:
            clip_score(images, ["a"], folder)
        assert "\n" not in str(refused.value) and "evaluation.clip" in str(refused.value)
    with pytest.raises(DataError, match="one prompt for each image"):
        clip_score(images, ["a", "b"], clip_folder)


def test_pairs_give_each_score_its_values(golden, alex, clip_folder):
    pairs = Pairs(golden["b"], golden["a"], ["a red fox"] * 8, Perceptual.load(alex), ImageText.load(clip_folder))
    finite = psnr_values(pairs)[:-1]
    np.testing.assert_allclose(finite, golden["psnr.per_image"][:-1])
    assert psnr_values(pairs)[-1] == pytest.approx(10 * np.log10(255**2 * 64 * 64 * 3))  # identical: the cap
    np.testing.assert_allclose(ssim_values(pairs), golden["ssim.numpy_wang_valid"], atol=1e-9)
    assert lpips_values(pairs)[-1] == 0 and (lpips_values(pairs)[:-1] > 0).all()
    ours, theirs = clip_scores(pairs), clip_scores(pairs.of_full_precision)
    assert ours[-1] == theirs[-1] and not np.array_equal(ours, theirs)
    with pytest.raises(DataError, match=r"evaluation\.lpips"):
        lpips_values(Pairs(golden["b"], golden["a"]))
    with pytest.raises(DataError, match=r"evaluation\.clip"):
        clip_scores(Pairs(golden["b"], golden["a"]))
