"""`Twin`: the quantized network as it is sampled, with its bit schedule and its correction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ptq_exp.correction import BitSchedule, Corrected, NoiseStatistics, Scheduled, VarianceFit
from ptq_exp.experiment.run import Setup
from ptq_exp.quantization import Applied, Report, Rule, select_row
from ptq_exp.reconstruction import BlockReport


@dataclass(frozen=True)
class Twin:
    """A calibrated network and what was decided about it.

    Attributes:
        network: quantized denoiser; without a schedule it has one activation width. Its ranges may differ between bins
            of sampling steps, see `Setup.time_bins`.
        report: account of its operations, over all steps.
        schedule: activation widths per step; None = one width.
        statistics: of its noise, for the correction; None = no correction.
        output_snr: {width: [S]} signal-to-noise ratio of the estimates, where it was measured.
        rules: that placed the quantizers of the network.
        reconstruction: how well each block was reconstructed; None = nothing was.
        transforms: that the full-precision network went through before it was quantized, in order.
    """

    network: nn.Module
    report: Report
    schedule: BitSchedule | None = None
    statistics: NoiseStatistics | None = None
    output_snr: dict[int, list[float]] | None = None
    rules: tuple[Rule, ...] = ()
    reconstruction: list[BlockReport] | None = None
    transforms: tuple[Applied, ...] = ()

    def guided(self, setup: Setup) -> nn.Module:
        """The uncorrected denoiser: at the width, or with the ranges, of each step, with guidance."""
        widths = setup.activation_widths
        if setup.n_bins > 1:
            return setup.guided(Scheduled(self.network, setup.time_bins, setup.grid))
        if self.schedule is None or len(widths) == 1:
            return setup.guided(self.network)
        return setup.guided(Scheduled(self.network, self.schedule.rows(widths), setup.grid))

    def corrected(self, setup: Setup) -> nn.Module:
        """The denoiser that images are drawn with."""
        guided = self.guided(setup)
        return guided if self.statistics is None else Corrected(guided, self.statistics, setup.grid)

    def eps_noise_std(self, setup: Setup) -> Tensor | None:
        """What the sampler must know of the noise left in the estimates, [S]; None where it has no noise to give."""
        if self.statistics is None or not setup.config.correction.variance or setup.grid.eta == 0:
            return None
        return self.statistics.eps_noise_std

    def noise_in_eps(self, setup: Setup) -> dict[str, Any]:
        """What the sampler is told of noise in the estimates, as arguments of `ptq_exp.diffusion.sample`."""
        convention = "code" if setup.config.correction.convention == "code" else "exact"
        return {"eps_noise_std": self.eps_noise_std(setup), "convention": convention}

    def variance_fit(self, setup: Setup) -> VarianceFit | None:
        """How far the sampler's own noise makes room; None without variance correction."""
        if self.statistics is None or not setup.config.correction.variance:
            return None
        return VarianceFit.of(setup.grid, self.statistics.eps_noise_std)


class AtRow(nn.Module):
    """A network with candidate activation widths, run at one of them."""

    def __init__(self, network: nn.Module, row: int) -> None:
        super().__init__()
        self.network, self.row = network, row

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """eps [N, C, H, W]."""
        select_row(self.network, self.row)
        return self.network(x, t, y)
