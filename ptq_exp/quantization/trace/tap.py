"""`ActivationTap`: values of the activations that reach the quantizers of a network, drawn without randomness."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ptq_exp.quantization.ranges.histogram import finite_ends


class ActivationTap:
    """Looks at what passes chosen activation quantizers, sample by sample, while it is open.

    Of each tensor the extremes are exact, and `values` elements of each sample are kept: all of a smaller tensor, else
    a fixed selection of positions that is the same for all tensors of one size. A layer that is called several times
    within one evaluation shares its `values` among the calls.

    Args:
        model: a network with quantizers, usually switched off.
        sites: names of the activation quantizers to look at.
        values: kept of each sample and site.
        copies: of each sample in a batch, one block of the batch after the other, as guidance lays them out.
    """

    def __init__(self, model: nn.Module, sites: Sequence[str], values: int, copies: int = 1) -> None:
        self.sites, self.values, self.copies = tuple(sites), values, copies
        self.open = False
        self._batch = 0
        self._low: dict[str, list[Tensor]] = {}
        self._high: dict[str, list[Tensor]] = {}
        self._kept: dict[str, list[Tensor]] = {}
        self._positions: dict[int, Tensor] = {}
        self._handles = [model.get_submodule(site).register_forward_pre_hook(self._hook(site)) for site in self.sites]

    def start(self, batch: int) -> None:
        """Open for one evaluation of `batch` samples."""
        self.open, self._batch = True, batch
        self._low, self._high, self._kept = ({site: [] for site in self.sites} for _ in range(3))

    def take(self) -> tuple[Tensor, Tensor, Tensor]:
        """Close; smallest and largest value [batch, sites], and the kept ones [batch, sites, values].

        NaN stands where a site had fewer values, or was not called.
        """
        self.open = False
        shape = (self._batch, len(self.sites))
        low, high = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
        kept = torch.full((*shape, self.values), torch.nan)
        for column, site in enumerate(self.sites):
            if not self._kept[site]:
                continue
            low[:, column] = torch.stack(self._low[site]).amin(0)
            high[:, column] = torch.stack(self._high[site]).amax(0)
            found = torch.cat(self._kept[site], 1)
            found = found[:, self._chosen(found.shape[1])]
            kept[:, column, : found.shape[1]] = found
        return low, high, kept

    def remove(self) -> None:
        """Take the hooks off the network."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, site: str):
        def look(_, args: tuple) -> None:
            if not self.open:
                return
            rows = self._by_sample(args[0].detach())
            low, high = finite_ends(rows, site)
            self._low[site].append(low.float().cpu())
            self._high[site].append(high.float().cpu())
            self._kept[site].append(rows[:, self._chosen(rows.shape[1]).to(rows.device)].float().cpu())

        return look

    def _by_sample(self, x: Tensor) -> Tensor:
        """`x` [copies * batch * k, ...] as [batch, n]; a tensor that is not cut by sample counts for each of them."""
        if x.shape[0] % (self.copies * self._batch):
            return x.reshape(1, -1).expand(self._batch, -1)
        return x.reshape(self.copies, self._batch, -1).transpose(0, 1).reshape(self._batch, -1)

    def _chosen(self, size: int) -> Tensor:
        """Positions that are kept out of `size`, ascending."""
        if size not in self._positions:
            order = torch.randperm(size, generator=torch.Generator().manual_seed(size))
            self._positions[size] = order[: self.values].sort().values
        return self._positions[size]
