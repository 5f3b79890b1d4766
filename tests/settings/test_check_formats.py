"""Settings that cannot go with number formats, or with activations that are not quantized, are refused by name."""

import pytest
from quick_yaml import quick_yaml

from ptq_exp.errors import ConfigError
from ptq_exp.settings.compose import composed_from


def composed(*overrides):
    with quick_yaml():
        return composed_from(overrides)


@pytest.mark.parametrize(("overrides", "expected"), [
    (["bits=nvfp4"], ("nvfp4", "nvfp4")), (["bits=mxfp8"], ("mxfp8_e4m3", "mxfp8_e4m3")),
    (["bits=nf4"], ("nf4", 16)), (["bits=w4a16"], (4, 16)), (["bits.weight=nvfp4"], ("nvfp4", 8)),
    (["bits.weight=4", "bits.activation=mxfp8_e5m2"], (4, "mxfp8_e5m2")), (["bits.activation=16"], (8, 16)),
])
def test_widths_and_formats_go_together(overrides, expected):
    bits = composed(*overrides).bits
    assert (bits.weight, bits.activation) == expected


@pytest.mark.parametrize(("overrides", "message"), [
    (["bits.weight=mxfp5"], "bits.weight=mxfp5: choose 2..8, or one of fp8_e4m3fn"),
    (["bits.weight=4.5"], "bits.weight"),
    (["bits.weight=true"], "bits.weight=True: expected a whole number or text, not yes or no"),
    (["bits.weight=16"], "bits.weight=16: choose 2..8"),
    (["bits.activation=codebook4"], "bits.activation=codebook4, which is a format of weights alone: choose 2..8, 16"),
    (["bits.softmax=mxfp4"], "bits.softmax"),
    (["+bits.groups={time: nf5}"], "bits.groups.time=nf5: give a weight and an activation width, such as w4a8"),
    (["bits=step_snr", "bits.weight=mxfp4"], "bits.weight=mxfp4: with bits.schedule weights are integers"),
    (["bits=mxfp4", "quantization.weight_granularity=group"], "quantization.weight_granularity=group contradicts"),
    (["bits=mxfp4", "reconstruction=brecq"], "reconstruction=brecq learns roundings of integers, but bits.weight"),
    (["reconstruction=brecq", "bits.groups.time=nf4:8"], "but bits.groups.time=nf4 is a number format"),
    (["bits=w4a16", "bits.weight=codebook4", "reconstruction=gptq"], "of bits.weight=codebook4 are each row's own"),
    (["bits.activation=nvfp4", "reconstruction=qdrop"], "bits.activation=nvfp4 is a number format: set reconstruction"),
    (["bits=fp8", "runtime=torch"], "bits.activation=fp8_e4m3fn is a number format, which runtime=torch cannot"),
    (["bits=w4a16", "quantization.temporal=per_step"], "quantization.temporal is about quantized activations"),
    (["bits=w4a16", "bits.groups.time=w8a8"], "bits.groups.time is about quantized activations, but bits"),
])
def test_contradictions_name_the_setting_and_the_fix(overrides, message):
    with pytest.raises(ConfigError) as error:
        composed(*overrides)
    assert message in str(error.value) and "\n" not in str(error.value)
