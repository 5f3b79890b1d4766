"""Powers of two for channels of concatenated features, whose sizes differ by far: by the vote of the samples (DMQ).

Multiplying a channel by 2^k before it is quantized is a k times halved step for it; each calibration sample votes for
the power of least squared error, and where so many agree, their power is taken.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptq_exp.quantization.affine import choose_qparams, fake_quantize
from ptq_exp.quantization.online import read_by
from ptq_exp.quantization.specs import QuantSpec
from ptq_exp.quantization.trace.provenance import watching
from ptq_exp.quantization.transforms.base import Fitting, Sites
from ptq_exp.quantization.transforms.layers import spec_of

POWERS, AGREEMENT = 4, 0.85
"""Powers 2^0 to 2^(POWERS - 1), and the least share of the samples that decides for one of them."""


def votes(x: Tensor, low: Tensor, high: Tensor, bits: int, symmetric: bool) -> Tensor:
    """Count the samples of `x` [N, C, ...] whose squared error each power makes least, [C, POWERS].

    Args:
        low, high: ends of the range that each channel is quantized by, [C].
    """
    shape = (1, -1, *[1] * (x.ndim - 2))
    scale, *rest = (part.view(shape) for part in choose_qparams(low, high, bits, symmetric))
    errors = [(fake_quantize(x, scale / 2**k, *rest) - x).square().flatten(2).sum(2) for k in range(POWERS)]
    best = torch.stack(errors).argmin(0)
    return torch.stack([(best == k).sum(0) for k in range(POWERS)], 1)


def elected(counts: Tensor) -> Tensor:
    """Return the factor of each channel [C] by `votes` [C, POWERS]: 2^k, or 1 where too few agree."""
    most, power = counts.max(1)
    agreed = most >= AGREEMENT * counts.sum(1)
    return torch.where(agreed, 2.0 ** power.double(), 1.0)


@torch.no_grad()
def powers_of_two(network: nn.Module, sites: Sites, fitting: Fitting) -> dict[str, Tensor]:
    """Return by what the channels of each site, which has one convolution, are divided: 1, 1/2, 1/4 or 1/8, [C]."""
    specs = {site: spec_of(fitting.rules, names[0]) or QuantSpec() for site, names in sites.items()}
    names = {site: layers[0] for site, layers in sites.items()}
    found = {site: torch.ones(network.get_submodule(name).weight.shape[1]).double() for site, name in names.items()}
    read = {site: spec.input for site, spec in specs.items() if spec.input is not None}
    if not read:
        return found
    ends: dict[str, list[Tensor]] = {}
    counts: dict[str, Tensor] = {}

    def see_ends(site: str, x: Tensor) -> None:
        channels = x.transpose(0, 1).flatten(1)
        ends.setdefault(site, []).append(torch.stack([channels.amin(1), channels.amax(1)]))

    def see_votes(site: str, x: Tensor) -> None:
        spec, bits = read[site], read[site].bits
        bits = min(bits) if isinstance(bits, tuple) else bits
        low, high = _ends(ends[site], spec.granularity.segments(x.shape[1]))
        counts[site] = counts.get(site, 0) + votes(x, low, high, bits, spec.symmetric)

    for see in (see_ends, see_votes):
        with watching(network) as watch:
            for site in read:
                layer = network.get_submodule(names[site])
                watch(layer, before=lambda x, site=site, layer=layer, see=see: see(site, read_by(layer, x.detach())))
            fitting.run(network)
    return found | {site: 1 / elected(counts[site]) for site in counts}


def _ends(seen: list[Tensor], segments: tuple[int, ...] | None) -> tuple[Tensor, Tensor]:
    """Return the ends of the range of each channel, [C], by those of each channel in each batch, [2, C]."""
    low, high = torch.stack([ends[0] for ends in seen]).amin(0), torch.stack([ends[1] for ends in seen]).amax(0)
    parts = list(segments or (len(low),))
    low = torch.cat([part.amin().expand(len(part)) for part in low.split(parts)])
    return low, torch.cat([part.amax().expand(len(part)) for part in high.split(parts)])
