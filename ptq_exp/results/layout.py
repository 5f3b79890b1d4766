"""Every entry of results.json: its meaning, its unit, when it is there, and the function that computes it."""

from __future__ import annotations

from fnmatch import fnmatchcase

from ptq_exp.results.entry import CHOSEN, CORRECTED, EXECUTED, FORECAST, QUANTIZED, Entry
from ptq_exp.results.layout_scores import SCORE_ENTRIES

_RUN, _EXPERIMENT = "results.record.Results", "experiment.experiment.run_experiment"
_ENVIRONMENT, _STAGES = "results.environment.environment", "experiment.stage.Stages"
_REPORT, _QUANTIZATION = "quantization.Report", "experiment.outcome.quantization_entry"
_NOISE = "experiment.noise_record.noise_record"
_CHOICE = "experiment.choose_bits.best_choice"
_FORECAST, _BESIDE = "experiment.forecast.Forecast.to_dict", "experiment.forecast.Forecast.beside"
_MEASURED, _TIMES = "deploy.measure.execution_entry", "deploy.measure.times_entry"
_FAITHFUL = "deploy.measure.faithfulness"
_BOTH = "`conv_linear`: convolutions and linear layers, `everything`: attention products, too"

LAYOUT = (
    Entry("status", "running, finished, failed, infeasible or interrupted", "word", _RUN),
    Entry("stage", "the last stage that is complete; `done` at the end", "word", _RUN),
    Entry("error", "what went wrong, in one line", "text", _RUN, "runs that did not finish"),
    Entry("error_type", "class of the error", "word", _RUN, "runs that did not finish"),
    Entry("name", "name of the run, made of its settings", "word", _EXPERIMENT),
    Entry("seed", "of all noise that is drawn", "integer", _EXPERIMENT),
    Entry("config.*", "all settings, as they were composed", "see the settings", _EXPERIMENT),
    Entry("command", "the command that makes the run again", "shell command", "results.environment.run_command"),
    Entry("weights.model", "digest of the full-precision weights, 12 digits", "hash", _EXPERIMENT,
          "runs with `model.checkpoint`"),
    Entry("environment.gpu", "name of the GPU", "text", _ENVIRONMENT, "runs on a machine with CUDA"),
    Entry("environment.commit", "commit of the checkout, `+changes` where files differ from it", "hash", _ENVIRONMENT,
          "runs from a git checkout"),
    Entry("environment.cores", "processors of the machine", "count", _ENVIRONMENT),
    Entry("environment.threads", "CPU threads of torch", "count", _ENVIRONMENT),
    Entry("environment.*", "platform, processor, and versions of this package, Python and libraries", "text",
          _ENVIRONMENT),
    Entry("seconds.*", "wall time of each stage in this process, by its name", "s", _STAGES),
    Entry("forecast.seconds.*", "wall time of each stage as it was forecast; null where nobody knows", "s", _FORECAST,
          FORECAST),
    Entry("forecast.total_seconds", "of the stages that are known, in sum", "s", _FORECAST, FORECAST),
    Entry("forecast.reused", "stages whose result was in the cache", "list of names", _FORECAST, FORECAST),
    Entry("forecast.memory_bytes", "most memory in use, of the process or of its GPU", "bytes", _FORECAST, FORECAST),
    Entry("forecast.disk_bytes.*", "what is written to the cache and to the run folder", "bytes", _FORECAST, FORECAST),
    Entry("forecast.took", "time that the forecast itself took", "s", _FORECAST, FORECAST),
    Entry("forecast.taken.seconds", "what the stages that had been forecast have taken", "s", _BESIDE, FORECAST),
    Entry("forecast.taken.ratio", "forecast over taken; null where nothing was taken", "factor", _BESIDE, FORECAST),
    Entry("forecast.taken.memory_bytes", "most memory in use since the forecast; 0 where the system does not say",
          "bytes", _BESIDE, FORECAST),
    Entry("cache.hits", "artefacts that were reused from the cache", "count", _STAGES),
    Entry("cache.misses", "artefacts that were computed", "count", _STAGES),
    Entry("cache.kinds.*", "both by kind of artefact", "count", _STAGES),
    Entry("calibration_seconds.*", "wall time of calibration when it was computed, by part (`calibration_set`, "
          "`ranges`, `reconstruction`) and in `total`; null where nobody knows", "s",
          "experiment.reconstruct.calibration_seconds", "runs that make a quantized model"),
    Entry("budget.bops.*", f"bit operations of one evaluation of the network; {_BOTH}", "bit operations",
          "experiment.budget.check_feasible", "runs with `bits.min_bops_ratio`"),
    Entry("budget.bops_ratio", "bit operations of FP32 over these; convolutions and linear layers", "factor",
          "experiment.budget.check_feasible", "runs with `bits.min_bops_ratio`"),
    Entry("budget.min_bops_ratio", "what was asked for", "factor", "experiment.budget.check_feasible",
          "runs with `bits.min_bops_ratio`"),
    Entry("allocation.file", "file of the arrays: errors and costs of all groups and candidates", "name", _CHOICE,
          CHOSEN),
    Entry("allocation.candidates", "what each group of layers may get", "list of widths", _CHOICE, CHOSEN),
    Entry("allocation.groups", "groups of layers that get a candidate each", "count", _CHOICE, CHOSEN),
    Entry("allocation.budget.*", "what was asked for: `size_mb`, `bops_ratio`, `latency_ms`", "MB, factor, ms", _CHOICE,
          CHOSEN),
    Entry("allocation.solutions", "solutions that were measured: the budgets' totals, `predicted_eps_error` if errors "
          "of groups were independent, `final_error` of whole trajectories, groups of each candidate in `counts`, the "
          "one candidate of all in `uniform`, and whether it is `chosen`", "list of objects", _CHOICE, CHOSEN),
    Entry("allocation.layers.*", "bits of each layer, as in `bits.groups`", "widths", _CHOICE, CHOSEN),
    Entry("allocation.chosen", "`layers` of each group, its `bits`, and the relative `eps_error` of it alone",
          "list of objects", _CHOICE, CHOSEN),
    Entry("evaluations", "evaluations of the network for the states of the calibration sets", "count",
          "experiment.saved.recipe", QUANTIZED),
    Entry("quantization.params", "parameters of the network", "count", _REPORT, QUANTIZED),
    Entry("quantization.weight_bytes", "size of the quantized weights, their ranges and all other parameters", "bytes",
          _REPORT, QUANTIZED),
    Entry("quantization.fp32_bytes", "size of all parameters in FP32", "bytes", _REPORT, QUANTIZED),
    Entry("quantization.size_reduction", "FP32 size over the quantized size", "factor", _REPORT, QUANTIZED),
    Entry("quantization.bits_per_weight", "size of the quantized weights with their scales, per value", "bits", _REPORT,
          QUANTIZED),
    Entry("quantization.dynamic_scales", "activation ranges that are found from the data, per sample and evaluation",
          "count", _REPORT, "runs with `quantization.activation=dynamic_*`"),
    Entry("quantization.macs.*", f"multiply-accumulates of one evaluation; {_BOTH}", "MACs", _REPORT, QUANTIZED),
    Entry("quantization.coverage.*", "share of the MACs with both operands quantized; null where it is not known",
          "0 to 1", _REPORT, QUANTIZED),
    Entry("quantization.bops.*", "bit operations of one evaluation: MACs times bits of both operands; the mean over "
          "sampling steps", "bit operations", _REPORT, QUANTIZED),
    Entry("quantization.bops_fp32.*", "bit operations of the same network in FP32", "bit operations", _REPORT,
          QUANTIZED),
    Entry("quantization.bops_reduction.*", "bit operations of FP32 over these", "factor", _REPORT, QUANTIZED),
    Entry("quantization.coverage_conv_linear", "`quantization.coverage.conv_linear`, for tables", "0 to 1",
          _QUANTIZATION, QUANTIZED),
    Entry("quantization.bops_ratio", "`quantization.bops_reduction.conv_linear`, for tables", "factor", _QUANTIZATION,
          QUANTIZED),
    Entry("quantization.bops_ratio_everything", "`quantization.bops_reduction.everything`, for tables", "factor",
          _QUANTIZATION, QUANTIZED),
    Entry("quantization.not_counted", "operations whose MACs are not counted", "list of names", _QUANTIZATION,
          "quantized runs of networks that have any"),
    Entry("transforms", "what the full-precision network went through before: name, settings, sites, macs, bytes, and "
          "`left`, {layer: reason} of those that a transform could not work on",
          "list of transforms", "experiment.transforms.transform_", "runs with `quantization.transforms`"),
    Entry("reconstruction.blocks", "blocks that were reconstructed", "count", "reconstruction.summary",
          "runs with a reconstruction"),
    Entry("reconstruction.kept", "blocks whose learned rounding is better on held-out samples than the nearest",
          "count", "reconstruction.summary", "runs with a reconstruction"),
    Entry("reconstruction.changed", "share of the weights that are not rounded to the nearest", "0 to 1",
          "reconstruction.summary", "runs with a reconstruction"),
    Entry("reconstruction.error*", "relative error of the blocks' outputs on held-out samples, mean over blocks; "
          "`_fp`: on full-precision inputs, `_before`: with nearest rounding", "1", "reconstruction.summary",
          "runs with a reconstruction"),
    Entry("reconstruction.objective", "squared error of a layer's output on calibration data over that of the nearest "
          "rounding, mean over layers", "1", "reconstruction.summary", "runs with reconstruction=gptq"),
    Entry("reconstruction.optimiser_seconds", "wall time of the optimiser", "s", "reconstruction.summary",
          "runs with a reconstruction"),
    Entry("bit_schedule.rule", "how the widths were found: snr, budget or list", "word",
          "experiment.schedule.schedule_record", "runs with a bit schedule"),
    Entry("bit_schedule.activation", "width of the activations in each sampling step", "bits [S]",
          "experiment.schedule.schedule_record", "runs with a bit schedule"),
    Entry("bit_schedule.shares.*", "share of the steps with each width", "0 to 1",
          "experiment.schedule.schedule_record", "runs with a bit schedule"),
    Entry("eps_error_samples", "trajectories that the errors of the noise estimate were measured on", "count", _NOISE,
          QUANTIZED),
    Entry("eps_error_per_step", "relative error of the noise estimate in each step, as sampled", "1 [S]", _NOISE,
          QUANTIZED),
    Entry("fixed_pattern_share_per_step", "share of that error which all samples have in common", "0 to 1 [S]", _NOISE,
          QUANTIZED),
    Entry("fixed_pattern_share_independent", "what that share would be if errors were independent", "0 to 1", _NOISE,
          QUANTIZED),
    Entry("eps_error_uncorrected_per_step", "`eps_error_per_step` without the correction", "1 [S]", _NOISE, CORRECTED),
    Entry("fixed_pattern_share_uncorrected_per_step", "`fixed_pattern_share_per_step` without the correction",
          "0 to 1 [S]", _NOISE, CORRECTED),
    Entry("correction.k", "slope of the quantization noise over the estimate in each step", "1 [S]", _NOISE, CORRECTED),
    Entry("correction.k_unshrunk", "the slope before it was shrunk", "1 [S]", _NOISE, CORRECTED),
    Entry("correction.k_stderr", "standard error of the slope", "1 [S]", _NOISE, CORRECTED),
    Entry("correction.r", "correlation of noise and estimate", "-1 to 1 [S]", _NOISE, CORRECTED),
    Entry("correction.residual_std", "standard deviation of what the slope leaves", "of eps [S]", _NOISE, CORRECTED),
    Entry("correction.kurtosis", "excess kurtosis of what the slope leaves", "1 [S]", _NOISE, CORRECTED),
    Entry("correction.residual_step_correlation", "correlation of that in consecutive steps, on other trajectories",
          "-1 to 1 [S - 1]", _NOISE, CORRECTED),
    Entry("correction.held_out_change_*", "change of the eps error by the correction on other trajectories: mean over "
          "steps and worst step", "1", _NOISE, CORRECTED),
    Entry("correction.variance.available", "variance of the sampler's own noise in each step", "of the state [S]",
          "correction.VarianceFit", "runs that correct the variance"),
    Entry("correction.variance.needed", "variance that the quantization noise brings into each step",
          "of the state [S]", "correction.VarianceFit", "runs that correct the variance"),
    Entry("correction.variance.steps_over", "steps in which more is needed than available", "count",
          "correction.VarianceFit", "runs that correct the variance"),
    Entry("correction.variance.left", "variance that no step makes room for, summed", "of the state",
          "correction.VarianceFit", "runs that correct the variance"),
    Entry("analysis.file", "file of the arrays, in the run folder", "name", "experiment.analyse.analyse",
          "runs with `analysis.active`"),
    Entry("analysis.sites", "activation quantizers whose inputs were recorded", "count", "experiment.analyse.analyse",
          "runs with `analysis.active`"),
    Entry("analysis.steps", "sampling steps that were recorded", "list of steps", "experiment.analyse.analyse",
          "runs with `analysis.active`"),
    Entry("analysis.most_sensitive.*", "layers that make the largest relative eps error when quantized alone", "1",
          "experiment.analyse.analyse", "runs with `analysis.active` and `analysis.sensitivity`"),
    Entry("runtime.engine", "what executed the quantized network, or was compared with the simulation", "word",
          _MEASURED, EXECUTED),
    Entry("runtime.version", "of the engine", "text", _MEASURED, EXECUTED),
    Entry("runtime.threads", "of one evaluation", "count", _MEASURED, EXECUTED),
    Entry("runtime.batch_size", "images of one evaluation; twice as many samples with guidance", "count", _MEASURED,
          EXECUTED),
    Entry("runtime.repeats", "turns that times are medians of", "count", _MEASURED, EXECUTED),
    Entry("runtime.ms_per_evaluation.*", "wall time of one evaluation of the network: `torch_fp32`, `simulation`, "
          "`<engine>_int8`, and the full-precision network on the engine, `<engine>_f32` and `<engine>_bf16`; taken in "
          "turns", "ms", _TIMES, EXECUTED),
    Entry("runtime.ms_per_image.*", "the same times the sampling steps, over the images of a batch", "ms", _TIMES,
          EXECUTED),
    Entry("runtime.faster_than.*", "time of that over the time of `<engine>_int8`, median over turns", "factor",
          _TIMES, EXECUTED),
    Entry("runtime.peak_bytes.*", "peak memory of a process that only evaluates the network on the engine", "bytes",
          "runtime.memory.peak_bytes", "runs with `runtime.measure_memory`"),
    Entry("runtime.file_bytes", "size of the engine's files of the quantized network; null where it has none", "bytes",
          _MEASURED, EXECUTED),
    Entry("runtime.int8_share", "share of the MACs of convolutions and linear layers that the engine's own graph "
          "executes as 8-bit integers", "0 to 1", "runtime.Execution", EXECUTED),
    Entry("runtime.attention_int8_share", "the same of the products of attention; null without", "0 to 1",
          "runtime.Execution", EXECUTED),
    Entry("runtime.saturation", "what 8-bit sums are of the right ones on this processor; null where it is not probed",
          "1", "runtime.probe.saturation", EXECUTED),
    Entry("runtime.eps_error", "relative error of the noise estimate to the simulation's, on states that this reached",
          "1", _FAITHFUL, EXECUTED),
    Entry("runtime.states", "states that it is the mean of", "count", _FAITHFUL, EXECUTED),
    Entry("runtime.psnr", "PSNR to the simulation's images of the same seeds, mean over images; missing where these "
          "take longer than `runtime.measure_seconds`", "dB", _FAITHFUL, EXECUTED),
    Entry("runtime.images", "images that it is the mean of", "count", _FAITHFUL, EXECUTED),
    *SCORE_ENTRIES,
)
"""In the order of the page; of several entries that match a key the first one counts."""


def entry_of(key: str) -> Entry | None:
    """Find the entry that describes a dotted key; None if nothing does."""
    return next((entry for entry in LAYOUT if fnmatchcase(key, entry.key)), None)
