"""Rules: validation, order, the default policy."""

import pytest

from ptq_exp.errors import ConfigError
from ptq_exp.quantization import (
    PerChannel,
    PerGroup,
    PerTensor,
    Policy,
    QuantSpec,
    Rule,
    Segments,
    TensorSpec,
    Widths,
    kept,
)
from ptq_exp.quantization.specs import check_rules, first_match

NAMES = ["conv_in", "mid.attn", "mid.attn.to_q", "mid.attn.to_out.0", "mid.conv1", "conv_out"]


def test_the_first_match_wins():
    keep, rest = Rule("mid.*", None), Rule("*", QuantSpec(TensorSpec(8)))
    assert first_match([keep, rest], "mid.conv1") is keep
    assert first_match([keep, rest], "conv_in") is rest
    assert first_match([rest, keep], "mid.conv1") is rest
    assert first_match([keep], "conv_in") is None


def test_a_glob_matches_whole_names_across_dots():
    assert Rule("mid*to_[qkv]", None).matches("mid.attn.to_q")
    assert not Rule("mid*to_[qkv]", None).matches("mid.attn.to_out.0")
    assert not Rule("conv", None).matches("conv_in")
    assert not Rule("CONV_IN", None).matches("conv_in")


def test_a_rule_that_matches_nothing_names_itself_and_near_names():
    with pytest.raises(ConfigError, match=r"'\*conv_inn'.*conv_in"):
        check_rules([Rule("*conv_inn", None)], NAMES, [])


def test_a_rule_for_modules_that_cannot_be_quantized_says_so():
    rule = Rule("up.deconv", QuantSpec(TensorSpec(8)))
    with pytest.raises(ConfigError, match="cannot be quantized.*up.deconv"):
        check_rules([rule], NAMES, ["up.deconv"])
    check_rules([Rule("up.deconv", None)], NAMES, ["up.deconv"])  # keeping it FP is fine


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": 1}, "bits.weight=1: choose 2..8"),
        ({"weight": 9}, "bits.weight=9: choose 2..8"),
        ({"activation": 0}, "bits.activation=0: choose 2..8"),
        ({"activation": 8.0}, "bits.activation=8.0: choose 2..8"),
        ({"weight": True}, "bits.weight=True: choose 2..8"),
        ({"softmax": 17}, "bits.softmax=17: choose 2..16"),
        ({"first_last": 16}, "bits.first_last=16: choose 2..8"),
        ({"boundary": 1}, "bits.boundary=1: choose 2..16"),
    ],
)
def test_impossible_bits_name_the_setting(settings, message):
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        Widths(**{"weight": 8, "activation": 8} | settings)


@pytest.mark.parametrize(
    "make",
    [
        lambda: TensorSpec(17),
        lambda: TensorSpec(8, granularity="row"),
        lambda: TensorSpec(8, granularity=PerTensor),
        lambda: Segments(()),
        lambda: Segments((4, 0)),
        lambda: Segments((4,), Segments((2, 2))),
        lambda: PerGroup(0),
        lambda: PerGroup(True),
        lambda: TensorSpec(8, metric="l3"),
        lambda: QuantSpec(input=TensorSpec(8, granularity=PerChannel())),
        lambda: QuantSpec(input=TensorSpec(8, granularity=Segments((2, 2), PerChannel()))),
        lambda: QuantSpec(softmax=TensorSpec(8, symmetric=False)),
        lambda: QuantSpec(softmax=TensorSpec(8, symmetric=True, granularity=Segments((2, 2)))),
    ],
    ids=[
        "bits",
        "granularity",
        "class",
        "no_segment",
        "empty_segment",
        "nested_segments",
        "empty_group",
        "group_of_yes",
        "metric",
        "activation_channel",
        "activation_segments_of_channels",
        "softmax_zero_point",
        "softmax_segments",
    ],
)
def test_impossible_specifications_are_refused(make):
    with pytest.raises(ConfigError):
        make()


def _bits(rules, name):
    spec = first_match(rules, name).spec
    return {
        role: tensor.bits
        for role in ("weight", "input", "output", "softmax")
        if (tensor := getattr(spec, role))
    }


def test_default_policy():
    rules = Policy().rules(Widths(4, 6, softmax=16))
    check_rules(rules, NAMES, [])
    assert _bits(rules, "conv_in") == _bits(rules, "conv_out") == {"weight": 8, "input": 16}
    assert _bits(rules, "mid.attn.to_q") == {"weight": 4, "input": 6, "output": 6}
    assert _bits(rules, "mid.conv1") == {"weight": 4, "input": 6, "softmax": 16}
    assert first_match(rules, "mid.attn").spec.softmax == TensorSpec(16, symmetric=True)
    weight = first_match(rules, "mid.conv1").spec.weight
    assert weight.granularity == PerChannel() and not weight.symmetric


def test_first_and_last_layer_never_get_fewer_bits_than_the_rest():
    rules = Policy().rules(Widths(8, 3, first_last=4, boundary=2))
    assert _bits(rules, "conv_in") == _bits(rules, "conv_out") == {"weight": 8, "input": 4}


def test_the_sampler_state_keeps_its_whole_range_with_headroom():
    state = first_match(Policy().rules(Widths(4, 4)), "conv_in").spec.input
    assert (state.bits, state.metric, state.headroom) == (16, "minmax", 2.0)
    narrow = first_match(Policy().rules(Widths(4, 4, boundary=8)), "conv_in").spec.input
    assert (narrow.bits, narrow.metric, narrow.headroom) == (8, None, 1.0)


def test_headroom_below_one_is_an_error():
    with pytest.raises(ConfigError, match="headroom=0.5: choose 1 or more"):
        TensorSpec(8, headroom=0.5)


def test_switches_of_the_default_policy():
    policy = Policy(
        attention=False, first=(), last=(), weight_symmetric=True, weight_granularity="tensor",
        activation_symmetric=True,
    )
    rules = policy.rules(Widths(4, 4))
    assert len(rules) == 1
    assert rules[0].spec == QuantSpec(TensorSpec(4, symmetric=True), TensorSpec(4, symmetric=True))


def test_quantizing_attention_that_is_not_there_is_an_error():
    with pytest.raises(ConfigError, match="to_"):
        check_rules(Policy().rules(Widths(8, 8)), ["conv_in", "conv1", "conv_out"], [])


def test_a_set_of_kept_layers_keeps_what_the_network_has_of_it_and_globs_are_kept_as_they_are():
    names = ["u.conv_in", "u.attentions.0", "u.attentions.0.to_q", "u.resnets.0.conv1"]
    rules = kept(["tfmq", "*resnets.7*"], names)
    assert [rule.pattern for rule in rules] == ["*conv_in", "*attentions.?", "*attentions.?.to_*", "*resnets.7*"]
    why = "quantization.keep_fp=[tfmq]: the published code of TFMQ-DM leaves them so"
    assert [rule.reason for rule in rules] == 3 * [why] + ["quantization.keep_fp"]
    assert all(rule.spec is None for rule in rules)


@pytest.mark.parametrize(
    ("name", "left"),
    [("sdnq_common", {"conv_in", "mid.resnets.0.conv1", "mid.resnets.0.time_emb_proj", "up.resnets.0.conv_shortcut",
                      "mid.attn.to_q", "blocks.0.attn.to_q", "conv_out",
                      "time_text_embed.timestep_embedder.linear_1"}),
     ("modelopt_unet", {"mid.resnets.0.conv1", "mid.attn.to_q", "mid.attn.proj_in", "mid.attn.proj_out",
                        "blocks.0.attn.to_q", "proj_out"})],
)
def test_sets_of_other_code_keep_ends_and_embeddings(name, left):
    """Names as U-Nets and transformers of diffusers have them."""
    unet = ["conv_in", "time_embedding.linear_1", "mid.resnets.0.conv1", "mid.resnets.0.time_emb_proj", "mid.attn.to_q",
            "mid.attn.proj_in", "mid.attn.proj_out", "up.resnets.0.conv_shortcut", "conv_out"]
    transformer = ["x_embedder", "context_embedder", "time_text_embed.timestep_embedder.linear_1", "blocks.0.attn.to_q",
                   "norm_out.linear", "proj_out"]
    names = [*unet, *transformer]
    rules = kept([name], names)
    assert {one for one in names if not any(rule.matches(one) for rule in rules)} == left
    assert all(rule.reason.startswith(f"quantization.keep_fp=[{name}]: ") for rule in rules)


def test_a_set_of_which_the_network_has_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"quantization.keep_fp=\[tfmq\]: the model has none of the layers .*conv_in"):
        kept(["tfmq"], ["blocks.0.to_q"])
