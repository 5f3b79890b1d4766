"""`DiffusionModel`: a denoiser with its time convention, first stage, classes and identity."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ptq_exp.diffusion.denoisers import FirstStage
from ptq_exp.diffusion.guidance import Guided
from ptq_exp.diffusion.noise import EVALUATION, SampleNoise, sample_generator
from ptq_exp.diffusion.sampler import sample
from ptq_exp.diffusion.solvers import solver_grid
from ptq_exp.diffusion.time_grid import NoiseSchedule, TimeGrid
from ptq_exp.errors import ConfigError, DataError


@dataclass(frozen=True)
class SamplerDefaults:
    """How the model's images were published: what `time_grid` and `ptq_exp.sample` use where nothing is said."""

    steps: int = 20
    spacing: str = "leading"
    eta: float = 0.0
    guidance_scale: float = 1.0


@dataclass
class DiffusionModel:
    """A trained diffusion model.

    Attributes:
        name: what tables call it.
        denoiser: eps(x, t, y), float [N, C, H, W] -> the same shape.
        schedule: the training schedule.
        sample_shape: (C, H, W) of a state: an image, or a latent where there is a first stage.
        clip_sample: clamp the predicted x0 to [-1, 1] while sampling (pixel models).
        digest: hash of the weights; artefacts made with the model are keyed by it.
        first_stage: autoencoder of a latent model.
        n_classes, null_label: labels are 0..n_classes-1; null_label means "no class". None = unconditional.
        first_layers, last_layers: globs of the layers that read the state and that make the noise estimate.
        blocks: globs of the modules that reconstruction takes as one piece; the outermost match counts.
        sampler: the published sampler.
        image_shape: (C, H, W) of an image; None = `sample_shape`.
        structure: the settings files of the folder that the model was read from, by relative path; with them a saved
            quantized model needs no folder. None = the name of the model says all.
    """

    name: str
    denoiser: nn.Module
    schedule: NoiseSchedule
    sample_shape: tuple[int, int, int]
    clip_sample: bool
    digest: str
    first_stage: FirstStage | None = None
    n_classes: int | None = None
    null_label: int | None = None
    first_layers: tuple[str, ...] = ("*conv_in",)
    last_layers: tuple[str, ...] = ("*conv_out",)
    blocks: tuple[str, ...] = ("*resnets.*", "*attentions.*")
    sampler: SamplerDefaults = field(default_factory=SamplerDefaults)
    image_shape: tuple[int, int, int] | None = None
    structure: Mapping[str, Mapping] | None = None

    def __post_init__(self) -> None:
        self.image_shape = self.image_shape or self.sample_shape

    def time_grid(
        self, steps: int | None = None, spacing: str | None = None, *, eta: float | None = None, solver: str = "ddim"
    ) -> TimeGrid:
        """The grid of `steps` sampling steps, published values where None; see `ptq_exp.diffusion.solvers.solver_grid`.

        The published `eta` is one of DDIM: the other solvers take 0 where nothing is said.
        """
        published = self.sampler
        if eta is None:
            eta = published.eta if solver == "ddim" else 0.0
        return solver_grid(
            self.schedule, published.steps if steps is None else steps, spacing or published.spacing, eta=eta,
            solver=solver,
        )  # fmt: skip

    def twin(self) -> nn.Module:
        """An independent copy of the denoiser, to be quantized while the original stays full precision."""
        return copy.deepcopy(self.denoiser)

    def guided(self, denoiser: nn.Module, guidance_scale: float = 1.0) -> nn.Module:
        """`denoiser` (the model's own, or a quantized twin) with classifier-free guidance; 1 = none.

        Raises:
            ConfigError: guidance is asked for, but the model has no classes.
        """
        if guidance_scale == 1:
            return denoiser
        if self.null_label is None:
            raise ConfigError(
                f"sampler.guidance_scale={guidance_scale}: the model {self.name} has no class to be guided by; choose 1"
            )
        return Guided(denoiser, guidance_scale, self.null_label)

    def example_inputs(self) -> tuple[Tensor, ...]:
        """(x [1, C, H, W], t [1]) and, with classes, y [1]: for shape tracing."""
        device = next(self.denoiser.parameters(), torch.empty(0)).device
        inputs = torch.zeros(1, *self.sample_shape, device=device), torch.zeros(1, device=device)
        return inputs if self.n_classes is None else (*inputs, torch.zeros(1, dtype=torch.long, device=device))

    def labels(self, indices: Sequence[int], seed: int, stream: int = EVALUATION) -> Tensor | None:
        """Class of each sample, int64 [N], or None: a permutation of all classes, repeated, so that they are balanced.

        The label of sample i depends on (seed, i) alone; every run of n_classes consecutive indices from a multiple of
        n_classes holds each class once.
        """
        if self.n_classes is None:
            return None
        order = torch.randperm(self.n_classes, generator=sample_generator(seed, 0, stream))
        return order[torch.as_tensor(list(indices), dtype=torch.long) % self.n_classes]

    def run(
        self, denoiser: nn.Module, grid: TimeGrid, indices: Sequence[int], seed: int, *,
        device: torch.device | str = "cpu", **kwargs,
    ) -> Tensor:  # fmt: skip
        """Final states [N, *sample_shape] of sample `indices` of `seed`, drawn with `denoiser`; see `sample`."""
        y = self.labels(indices, seed)
        return sample(
            denoiser, grid, SampleNoise(seed, indices, self.sample_shape), y=None if y is None else y.to(device),
            clip_sample=self.clip_sample, device=device, **kwargs,
        )  # fmt: skip

    def sample(self, denoiser: nn.Module, grid: TimeGrid, indices: Sequence[int], seed: int, **kwargs) -> Tensor:
        """Images float [N, C, H, W] of sample `indices` of `seed`: `run`, then `decode`."""
        return self.decode(self.run(denoiser, grid, indices, seed, **kwargs))

    def decode(self, z: Tensor) -> Tensor:
        """States [N, *sample_shape] -> images float [N, *image_shape]; the identity for a pixel model."""
        return z if self.first_stage is None else self.first_stage.decode(z)

    def encode(self, images: Tensor) -> Tensor:
        """Images float [N, *image_shape] in [-1, 1] -> states; the identity for a pixel model.

        Raises:
            DataError: images of another shape.
        """
        if tuple(images.shape[1:]) != tuple(self.image_shape):
            raise DataError(
                f"images are {tuple(images.shape[1:])}, but the model {self.name} works on {tuple(self.image_shape)} "
                "(channels, height, width): set model.images.path to images of that size"
            )
        return images if self.first_stage is None else self.first_stage.encode(images)
