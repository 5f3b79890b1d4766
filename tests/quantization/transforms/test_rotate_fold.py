"""Rotation folded between values and the output of attention: nothing is computed at run time, the function stays."""

import copy

import pytest
import torch
from small_transformers import NETWORKS, built, call_of

from ptq_exp.errors import ConfigError
from ptq_exp.quantization import Applied, Policy, Rule, Widths, applied_from_dict, applied_to, transforms_of
from ptq_exp.quantization.online import online_parts
from ptq_exp.quantization.trace.evaluate import evaluate
from ptq_exp.quantization.transforms.rotate import Rotate

FOLDED = {
    "sd15": 8, "sd21": 8, "sdxl": 16, "pixart": 4, "sd3": 3, "flux": 1, "sana": 4, "dit": 2, "unet": 4,
    "controlnet": 12,
}
"""Attention modules of each network; FLUX's single block reads the outputs of its attention beside others."""


@pytest.mark.parametrize("name", NETWORKS)
def test_the_function_stays_and_nothing_is_added_where_attention_ends(name):
    network, call = built(name).double(), call_of(name)
    call = (*call[:2], {key: value.double() if value.is_floating_point() else value for key, value in call[2].items()})
    call = (call[0].double(), *call[1:])
    tolerance = 1e-6 if name == "sana" else 1e-10  # its attention computes in float32
    before, transform = copy.deepcopy(network), Rotate(group=16, fold=True)
    sites = transform.find(network, call)
    made = applied_to(network, call, Applied(transform, sites))
    torch.testing.assert_close(evaluate(network, call), evaluate(before, call), rtol=0, atol=tolerance)
    folded = {site: layers for site, layers in sites.items() if " " in site}
    assert len(folded) == FOLDED[name]
    online = {owner.rpartition(".online")[0] for owner, _ in online_parts(network)}
    for site, layers in folded.items():
        assert not online & {layer for layer in layers if not layer.endswith(("to_v", "add_v_proj"))}
        for layer in layers:
            assert not torch.equal(network.get_submodule(layer).weight, before.get_submodule(layer).weight), site
    assert applied_from_dict(made.to_dict()).sites == made.sites


def test_both_streams_of_joint_attention_are_turned_together():
    sites = Rotate(group=16, fold=True).find(built("sd3"), call_of("sd3"))
    blocks = "component.transformer_blocks"
    assert sites[f"4 {blocks}.0.attn"] == tuple(
        f"{blocks}.0.attn.{own}" for own in ("to_v", "add_v_proj", "to_out.0", "to_add_out"))


def test_what_is_folded_stays_whole():
    network, call = built("dit"), call_of("dit")
    transform = Rotate(group=4, fold=True)
    sites = transform.find(network, call)
    site = next(site for site in sites if " " in site)
    rules = [Rule("*.to_v", None, "kept"), *Policy(attention=False, first=(), last=()).rules(Widths(4, 4))]
    assert transform.chosen(sites, rules)[site] == sites[site]
    kept = [Rule(name, None, "kept") for name in sites[site]]
    assert site not in transform.chosen(sites, kept)


def test_skipped_layers_keep_their_values():
    sites = Rotate(group=4, fold=True, skip=("*.to_v",)).find(built("dit"), call_of("dit"))
    assert not any(" " in site for site in sites)


def test_the_setting_is_checked():
    with pytest.raises(ConfigError, match="rotate: fold=1: choose true or false"):
        transforms_of([{"name": "rotate", "fold": 1}])
