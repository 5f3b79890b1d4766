"""Settings that contradict activation ranges which follow the data, or a calibration without samples."""

import copy
from dataclasses import replace

import pytest

from ptq_exp.errors import ConfigError
from ptq_exp.settings.check_dynamic import check_dynamic
from ptq_exp.settings.compose import composed_from


@pytest.fixture(scope="module")
def composed():
    return composed_from(["+experiment=dynamic", "logger=none"])


def changed(config, changes):
    """A copy of `config` with other values of some settings, `calibrated` for a calibration with samples."""
    made = copy.deepcopy(config)
    for setting, value in changes.items():
        section, _, key = setting.partition(".")
        if section == "quantization":  # frozen
            made.quantization = replace(made.quantization, **{key: value})
        else:
            setattr(getattr(made, section), key, value)
    return made


CALIBRATED = {"calibration.source": "denoise"}


@pytest.mark.parametrize("changes", [
    {}, {"bits.activation": "mxfp4"}, {"bits.activation": "fp8_e4m3fn"}, CALIBRATED,
    CALIBRATED | {"reconstruction.granularity": "block"}, CALIBRATED | {"quantization.transforms": ("smooth",)},
    CALIBRATED | {"bits.activation": "nvfp4"}, {"quantization.transforms": ("rotate",)},
    {"bits.activation": 16, "quantization.activation": "static"},
    CALIBRATED | {"quantization.activation": "static", "quantization.temporal": "per_step"},
], ids=str)
def test_what_needs_no_data_needs_no_calibration(composed, changes):
    assert composed.name == "dynamic_w8a8" and composed.quantization.dynamic == "token"
    check_dynamic(changed(composed, changes))


@pytest.mark.parametrize(("changes", "said"), [
    ({"quantization.activation": "static"}, "calibration=none has no samples.*quantization.activation=dynamic_token"),
    ({"bits.activation": "nvfp4"}, "calibration=none has no samples"),
    ({"bits.groups": {"mid": "nvfp4", "up": None}}, "calibration=none has no samples"),
    ({"reconstruction.granularity": "block"}, "calibration=none.* reconstruction=none needs some"),
    ({"quantization.transforms": ("rotate", "low_rank")}, "calibration=none.*transforms: low_rank needs some.*leave"),
    ({"quantization.time_layers": "all_steps"}, "calibration=none.* quantization.time_layers=all_steps needs some"),
    ({"calibration.rounds": 2}, "calibration=none.* calibration.rounds=2 needs some"),
    (CALIBRATED | {"quantization.temporal": "per_step"}, "quantization.temporal=per_step .*temporal=static"),
    (CALIBRATED | {"bits.schedule": "snr"}, "bits.schedule contradicts quantization.activation=dynamic_token"),
    (CALIBRATED | {"reconstruction.step_lr": 0.1}, "reconstruction.step_lr=0.1 .*set reconstruction.step_lr=0"),
    (CALIBRATED | {"runtime.compare": "openvino"}, "simulated only"),
])
def test_what_contradicts_is_refused_in_one_line(composed, changes, said):
    with pytest.raises(ConfigError, match=said) as error:
        check_dynamic(changed(composed, changes))
    assert "\n" not in str(error.value)


def test_the_whole_check_asks():
    with pytest.raises(ConfigError, match="calibration=none has no samples"):
        composed_from(["bits=w8a8", "calibration=none", "logger=none"])
    with pytest.raises(ConfigError, match="quantization.activation=token: choose one of static, dynamic_tensor"):
        composed_from(["quantization.activation=token", "logger=none"])
