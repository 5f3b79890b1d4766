"""Settings of runs whose parts are forecast."""

SMALLEST = ["sampler.steps=3", "evaluation.n_samples=4", "evaluation.batch_size=2", "evaluation.eps_error_samples=2",
            "calibration.n_samples=6", "calibration.batch_size=4", "metric=minmax", "logger=none",
            "trainer.progress_bar=false", "trainer.accelerator=cpu"]
