"""How near the forecast of a run is to what its stages take: both one after the other, in processor seconds.

Other processes of the machine change wall seconds from one minute to the next, and processor seconds hardly; with one
thread both are the same on a machine that does nothing else.

    OMP_NUM_THREADS=1 python benchmarks/forecast.py +experiment=ndtc_w8a8 evaluation.n_samples=64
"""

import sys
import tempfile
import time

time.perf_counter = time.process_time  # before anything reads the clock

from pathlib import Path  # noqa: E402

import torch  # noqa: E402

from ptq_exp.experiment import experiment  # noqa: E402
from ptq_exp.settings.compose import composed_from  # noqa: E402
from ptq_exp.storage.plain_json import read_json  # noqa: E402


def main(overrides: list[str]) -> None:
    """Run the experiment with these overrides in a folder of its own, and print a row for each stage."""
    torch.set_num_threads(1)
    experiment.SHORT_RUN = 0.0  # runs of less than a minute are forecast, too
    with tempfile.TemporaryDirectory() as folder:
        config = composed_from([
            *overrides, "logger=none", "trainer.progress_bar=false", "trainer.accelerator=cpu",
            f"cache_dir={folder}/cache",
        ])
        experiment.run_experiment(config, Path(folder) / "run")
        values = read_json(Path(folder) / "run" / "results.json")
    forecast, taken = values["forecast"], values["seconds"]
    print("| stage | forecast, s | taken, s | forecast / taken |\n|---|--:|--:|--:|")
    for stage, seconds in forecast["seconds"].items():
        if seconds is not None and stage in taken and max(seconds, taken[stage]) >= 0.05:
            ratio = f"{seconds / taken[stage]:.2f}" if taken[stage] else ""
            print(f"| {stage} | {seconds:.2f} | {taken[stage]:.2f} | {ratio} |")
    whole = forecast["taken"]
    print(f"| all of these | {whole['ratio'] * whole['seconds']:.1f} | {whole['seconds']:.1f} | {whole['ratio']:.2f} |")
    memory = forecast["memory_bytes"], whole["memory_bytes"]
    print(f"| memory, GB | {memory[0] / 1e9:.2f} | {memory[1] / 1e9:.2f} | {memory[0] / memory[1]:.2f} |")
    print(f"the forecast took {forecast['took']:.1f} s; stages without one: "
          f"{', '.join(stage for stage, seconds in forecast['seconds'].items() if seconds is None) or 'none'}")


if __name__ == "__main__":
    main(sys.argv[1:])
