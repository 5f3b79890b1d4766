"""The real `conf/` composes, and every mistake ends in one line that names the setting and the valid values."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from quick_yaml import quick_yaml

from ptq_exp.diffusion.zoo.registry import MODELS
from ptq_exp.errors import ConfigError
from ptq_exp.experiment.plan import bit_groups
from ptq_exp.quantization import METRICS
from ptq_exp.settings.build import build
from ptq_exp.settings.compose import config_folder, run_name, validated

CONF = config_folder()
NO_GROUPS = ("experiment", "search", "table")  # folders of conf/ that no run is composed of, or by a plus alone
GROUPS = sorted((p.parent.name, p.stem) for p in CONF.glob("*/*.yaml") if p.parent.name not in NO_GROUPS)
OTHERS = ("evaluate", "analyze")  # tested in files of their own
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml") if path.stem not in OTHERS)
REQUIRED = {
    "fp32", "ndtc_w8a8", "uniform_w8a8", "training_mimic_w8a8", "raw_w8a8", "noise_w8a8", "naive_first_w8a8",
    "naive_last_w8a8", "ndtc_w6a6", "ndtc_w4a8", "ndtc_w4a4", "ptqd_w8a8", "ptqd_w4a8", "ptqd_w3a8", "ptqd_mp",
    "ptqd_ldm4_w8a8", "ptqd_ldm4_w4a8", "ptqd_ldm4_mp", "di2n_w8a8", "qdiffusion_w8a8", "qdiffusion_w4a8",
    "qdiffusion_w4a4", "tfmq_w4a8", "tfmq_w4a4", "tfmq_release", "ptq4dm_release", "brecq_w4a8", "qdrop_w4a4",
    "best_w8a8", "best_w6a6", "best_w4a8", "best_w4a4", "deploy_w8a8", "deploy_w4a8", "nvfp4", "mxfp4", "fp8",
}
METHODS = sorted(n for n in REQUIRED if n.startswith(("di2n", "qdiff", "tfmq", "brecq", "qdrop", "ptq4dm", "best")))
PUBLISHED = sorted(path.stem for path in (CONF / "model").glob("*.yaml") if not path.stem.startswith("digits"))


def composed(*overrides: str):
    with quick_yaml(), initialize_config_dir(str(CONF), version_base="1.3"):
        return validated(compose("config", overrides=list(overrides)))


BY_METHOD = {"convrot": "convrot", "dynamic": "dynamic", "gptq": "uniform_gptq", "svdquant": "svdquant"}
"""Files that leave the bits open -> how their runs begin."""


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_and_is_called_as_its_file(name):
    config = composed(f"+experiment={name}")
    if name.endswith("_release"):
        assert (config.name, config.bits.name) == (f"{name}_w8a8", "w8a8")
        return
    if name in BY_METHOD:
        assert config.name == f"{BY_METHOD[name]}_{config.bits.name}"
        return
    prefix, _, bits = name.rpartition("_")
    assert config.bits.name == ("step_budget" if bits == "mp" else bits)
    # a model in the name of the file is in the run's settings, not in its name
    prefix = prefix.removesuffix("_ldm4")
    if prefix in ("brecq", "qdrop"):
        assert config.reconstruction.name == prefix
        prefix = f"{config.calibration.name}_{prefix}"
    assert config.name == (f"{prefix}_{config.bits.name}" if prefix else name)


def test_the_promised_experiments_are_there():
    assert set(EXPERIMENTS) >= REQUIRED


@pytest.mark.parametrize(("group", "choice"), GROUPS)
def test_every_group_choice_composes(group, choice):
    extra = {
        ("bits", "fp32"): ["calibration=none"], ("calibration", "none"): ["bits=fp32"],
        ("evaluation", "adm"): ["evaluation.reference=r.npz"], ("evaluation", "clean"): ["evaluation.reference=r.npz"],
        ("bits", "step_list"): ["bits.schedule='[8]*12+[4]*8'"], ("bits", "auto"): ["bits.budget.size_mb=1"],
    }
    config = composed(f"{group}={choice}", *extra.get((group, choice), []))
    assert getattr(getattr(config, group), "name", choice) == choice


def test_metric_files_are_exactly_the_metrics():
    assert {path.stem for path in (CONF / "metric").glob("*.yaml")} == set(METRICS)


def test_every_experiment_file_says_what_it_follows():
    for name in EXPERIMENTS:
        first, second = (CONF / "experiment" / f"{name}.yaml").read_text().splitlines()[:2]
        assert first == "# @package _global_" and second.startswith("# ")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("bits.weight=1", "bits.weight=1: choose 2..8"),
        ("bits.activation=9", "bits.activation=9: choose 2..8"),
        ("bits.softmax=17", "bits.softmax=17: choose 2..16"),
        ("evaluation.n_samples=0", "evaluation.n_samples=0: choose 2 or more"),
        ("calibration.n_samples=0", "calibration.n_samples=0: choose 1 or more"),
        ("metric.name=mae", "metric.name=mae: choose one of mse, l1, cosine, kl, lp"),
        ("sampler.eta=1.5", "sampler.eta=1.5: choose 0..1"),
        ("sampler.steps=0", "sampler.steps=0: choose 1 or more"),
        ("calibration.source=dream", "calibration.source=dream: choose one of denoise, diffuse, raw, noise"),
        ("cache=maybe", "cache=maybe: choose one of on, off, refresh"),
        ("logger.mode=loud", "logger.mode=loud: choose one of offline, online, none"),
        ("quantization.weight_granularity=row", "weight_granularity=row: choose one of channel, tensor, group"),
        ("quantization.shortcut=cut", "quantization.shortcut=cut: choose one of joint, split, split_all"),
        ("quantization.temporal=daily", "quantization.temporal=daily: choose one of static, binned, per_step"),
        ("quantization.time_layers=all", "quantization.time_layers=all: choose one of calibration_set, all_steps"),
        ("quantization.activation_site=both", "quantization.activation_site=both: choose one of input, output"),
        ("quantization.time_embedding=cut", "quantization.time_embedding=cut: choose one of none, shared, split"),
        ("quantization.smooth_alpha=2", "quantization.smooth_alpha=2.0: choose 0..1"),
        ("quantization.group_size=0", "quantization.group_size=0: choose 1 or more"),
        ("calibration.rounds=0", "calibration.rounds=0: choose 1 or more"),
        ("imports=[nowhere.to_be]", "imports=nowhere.to_be: No module named 'nowhere'; start where"),
        ("calibration.labels=mixed", "calibration.labels=mixed: choose one of paired, reversed"),
        ("seed=-1", "seed=-1: choose 0 or more"),
        ("+bits.weigth=4", "weigth"),
        ("+quantization.extra=1", "extra"),
        ("sampler.guidance_scale=-1", "sampler.guidance_scale=-1.0: choose 0 or more"),
        ("+model.ema=false", "model.ema: a checkpoint of model=digits has one set of weights, not two"),
        ("evaluation=adm", "evaluation.reference is not set, but evaluation=adm compares with real images: give"),
        ("bits=fp32", "calibration=ndtc contradicts bits=fp32"),
        ("sampler.solver=heun", "sampler.solver=heun: choose one of ddim, dpm_solver, pndm, euler"),
        ("correction.convention=theirs", "correction.convention=theirs: choose one of paper, code"),
        ("correction.follow=both", "correction.follow=both: choose one of fp32, quantized"),
        ("correction.n_samples=1", "correction.n_samples=1: choose 2 or more"),
        ("correction.statistics=s.npz", "correction.statistics is set, but correction=none corrects nothing"),
        ("calibration=none", "calibration=none has no samples"),
        ("reconstruction.granularity=net", "reconstruction.granularity=net: choose one of block, layer, none"),
    ],
)
def test_impossible_settings_name_the_setting_and_the_fix(override, message):
    with pytest.raises(ConfigError) as error:
        composed(override)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("model", sorted(path.stem for path in (CONF / "model").glob("*.yaml")))
def test_every_model_composes_with_an_experiment_and_its_own_sampler_and_evaluation(model):
    config = composed("+experiment=ndtc_w8a8", f"model={model}")
    published = {key: getattr(config.sampler, key) for key in ("steps", "spacing", "eta", "guidance_scale")}
    assert published == vars(config.model.sampler)
    assert config.evaluation.name == ("digits" if model.startswith("digits") else "paired")
    scored = composed(f"model={model}", "evaluation=adm", "evaluation.reference=r.npz", "sampler.steps=3")
    assert (scored.evaluation.name, scored.sampler.steps) == ("adm", 3)


@pytest.mark.parametrize("model", PUBLISHED)
def test_every_method_composes_for_every_model(model):
    with quick_yaml(), initialize_config_dir(str(CONF), version_base="1.3"):
        for name in METHODS:
            config = validated(compose("config", overrides=[f"+experiment={name}", f"model={model}"]))
            assert config.model.name == model and config.sampler.steps == config.model.sampler.steps


def test_every_model_of_the_registry_has_a_configuration_with_its_sampler():
    assert {path.stem for path in (CONF / "model").glob("*.yaml")} == set(MODELS)


def test_full_precision_refuses_bits():
    with pytest.raises(ConfigError, match="bits.weight is set, but bits=fp32"):
        composed("+experiment=fp32", "bits.weight=8")


def test_a_group_on_the_command_line_wins_over_the_experiment_and_renames_the_run():
    config = composed("+experiment=ndtc_w8a8", "bits=w4a4")
    assert (config.bits.weight, config.bits.activation, config.name) == (4, 4, "ndtc_w4a4")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["bits=step_budget", "bits.bops_ratio=1"], "bits.bops_ratio=1.0: say how many times fewer"),
        (["bits=step_budget", "bits.candidates=[8]"], r"bits.candidates=[8]: give two or more widths"),
        (["bits=step_snr", "bits.candidates=[4,9]"], "bits.candidates=9: choose 2..8"),
        (["bits=step_snr", "bits.activation=8"], "bits.activation=8 contradicts bits.schedule"),
        (["+bits.groups.dwon=w4a4"], "bits.groups.dwon: model=digits has no such group; choose one of time, "),
        (["bits.groups.down=4"], "bits.groups.down=4: give a weight and an activation width, such as w4a8"),
        (["bits.groups.down=w4a9"], "bits.groups.down=9: choose 2..8"),
        (["bits.min_bops_ratio=0.5"], "bits.min_bops_ratio=0.5: choose 1 or more"),
        (["bits=step_snr", "bits.groups.down=w4a4"], "bits.groups={'down': 'w4a4'} contradicts bits.schedule"),
        (["bits=step_snr", "bits.min_bops_ratio=20"], "bits.min_bops_ratio=20.0 contradicts bits.schedule"),
        (["+experiment=fp32", "bits.groups.down=w4a4"], "bits.groups.down is set, but bits=fp32 quantizes nothing"),
        (["bits=step_snr", "bits.schedule=8"], "bits.schedule=8: give snr, budget, a list of one width per step"),
        (["bits=step_snr", "quantization.temporal=per_step"], "quantization.temporal=per_step contradicts bits.sched"),
        (["quantization.temporal=binned", "quantization.temporal_bins=21"], "temporal_bins=21: choose 1..20"),
        (["calibration=raw", "calibration.rounds=2"], "calibration.rounds=2: states of calibration.source=raw are the"),
        (["calibration=raw", "calibration.labels=reversed"], "choose calibration.source=denoise, or"),
        (["calibration.labels=reversed", "quantization=tfmq"], "contradicts quantization.temporal=per"),
        (["bits=step_snr", "calibration.rounds=2"], "calibration.rounds=2 contradicts bits.schedule"),
        (["+experiment=fp32", "correction=ptqd"], "correction=ptqd contradicts bits=fp32"),
        (["+experiment=fp32", "reconstruction=brecq"], "reconstruction=brecq contradicts bits=fp32"),
        (["reconstruction=qdrop", "bits=step_snr"], "set reconstruction.step_lr=0, or choose bits without a schedule"),
        (["reconstruction=brecq", "reconstruction.iterations=0"], "reconstruction.iterations=0: choose 1 or more"),
        (["reconstruction=brecq", "reconstruction.input_prob=2"], "reconstruction.input_prob=2.0: choose 0..1"),
        (["reconstruction=brecq", "reconstruction.warmup=1"], "reconstruction.warmup=1.0: choose 0..0.99"),
        (["reconstruction=brecq", "calibration.n_samples=1"], "calibration.n_samples=1: choose 2 or more"),
    ],
)
def test_contradictions_of_schedule_and_correction_name_the_setting_and_the_fix(overrides, message):
    with pytest.raises(ConfigError) as error:
        composed(*overrides)
    assert message in str(error.value)


def test_the_corrections_add_up():
    parts = {"none": set(), "bias": {"bias"}, "correlation": {"correlation"}, "mean": {"correlation", "bias"},
             "ptqd": {"correlation", "bias", "variance"}}
    for name, toggles in parts.items():
        correction = composed(f"correction={name}").correction
        assert {t for t in ("correlation", "bias", "variance") if getattr(correction, t)} == toggles
        assert correction.active == bool(toggles)


def test_run_name():
    assert run_name("uniform", "w4a8", "ptqd") == "ptqd_w4a8"
    assert run_name("ndtc", "w8a8") == "ndtc_w8a8"
    assert run_name("none", "fp32") == "fp32"
    assert run_name("ndtc", "w4a8", "none", "brecq") == "ndtc_brecq_w4a8"
    assert run_name("ndtc", "w4a8", "ptqd", "brecq") == "ptqd_brecq_w4a8"
    assert run_name("ndtc", "w8a8", groups={"down": None}) == "ndtc_w8a8"
    assert run_name("ndtc", "w8a8", groups={"down": "w4a4"}) == "ndtc_w8a8_groups"


def test_globs_of_layers_come_before_the_groups_of_the_model():
    config = composed("bits.groups.up=w4a4", "+bits.groups={*up_blocks.0.*: w6a6}")
    assert config.name == "ndtc_w8a8_groups"
    assert list(bit_groups(config.bits, config.model.groups).values()) == [
        ("*up_blocks.0.*", 6, 6), ("*up_blocks.*", 4, 4)
    ]


def test_build_names_the_wrong_argument_and_the_nearest():
    node = {"_target_": "ptq_exp.calibration.SkewNormal", "mean": 0.4, "sdt": 0.4}
    with pytest.raises(ConfigError, match=r"calibration.distribution.sdt: .* did you mean 'std'"):
        build(node, "calibration.distribution")


def test_build_names_a_missing_constructor():
    with pytest.raises(ConfigError, match="model.build._target_=ptq_exp.embedded.nothing: no such"):
        build({"_target_": "ptq_exp.embedded.nothing"}, "model.build")


def test_hydra_names_the_run_folder_after_the_run():
    with quick_yaml(), initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", overrides=["+experiment=fp32"], return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    folder = Path(HydraConfig.get().run.dir)
    assert folder.parent == Path("runs/fp32") and HydraConfig.get().job.name == "fp32"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["runtime=openvino", "runtime.precision=f16"], "runtime.precision=f16: choose one of f32, bf16"),
        (["+runtime.regrid=true"], "runtime.regrid is an option of engines"),
    ],
)
def test_a_runtime_is_checked_before_anything_is_computed(overrides, message):
    with initialize_config_dir(str(config_folder()), version_base="1.3"), pytest.raises(ConfigError, match=message):
        validated(compose("config", overrides=overrides))
