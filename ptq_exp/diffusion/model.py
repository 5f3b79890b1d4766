"""`DiffusionModel`: a denoiser with its time convention, first stage, conditions and identity."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ptq_exp.diffusion.call import Call, on_device
from ptq_exp.diffusion.conditions import ConditionTable, balanced
from ptq_exp.diffusion.denoisers import FirstStage
from ptq_exp.diffusion.guidance import Guided
from ptq_exp.diffusion.noise import EVALUATION, SampleNoise
from ptq_exp.diffusion.parts import InParts
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
        denoiser: eps(x, t, **conditions), float [N, C, H, W] -> the same shape.
        schedule: the training schedule.
        sample_shape: (C, H, W) of a state: an image, or a latent where there is a first stage.
        clip_sample: clamp the predicted x0 to [-1, 1] while sampling (pixel models).
        digest: hash of the weights; artefacts made with the model are keyed by it.
        first_stage: autoencoder of a latent model.
        n_classes, null_label: the condition `y` is a label 0..n_classes-1; null_label means "no class". None = no
            classes, or no such label.
        first_layers, last_layers: globs of the layers that read the state and that make the noise estimate.
        blocks: globs of the modules that reconstruction takes as one piece; the outermost match counts.
        sampler: the published sampler.
        image_shape: (C, H, W) of an image; None = `sample_shape`.
        structure: the settings files of the folder that the model was read from, by relative path; with them a saved
            quantized model needs no folder. None = the name of the model says all.
        conditions: further conditions that samples are drawn with, such as embedded prompts; None = none.

    Raises:
        ConfigError: the denoiser does not take the conditions by their names.
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
    conditions: ConditionTable | None = None

    def __post_init__(self) -> None:
        self.image_shape = self.image_shape or self.sample_shape
        _check_arguments(self.name, self.denoiser, self.draw_conditions([0], 0))

    def time_grid(
        self, steps: int | None = None, spacing: str | None = None, *, eta: float | None = None, solver: str = "ddim"
    ) -> TimeGrid:
        """Return the grid of `steps` sampling steps, published values where None; see `solvers.solver_grid`.

        The published `eta` is one of DDIM: the other solvers take 0 where nothing is said.
        """
        published = self.sampler
        if eta is None:
            eta = published.eta if solver == "ddim" else 0.0
        return solver_grid(
            self.schedule, published.steps if steps is None else steps, spacing or published.spacing, eta=eta,
            solver=solver,
        )

    def copy_denoiser(self) -> nn.Module:
        """Return an independent copy of the denoiser, to be quantized while the original stays full precision."""
        return copy.deepcopy(self.denoiser)

    def in_parts(self, network: nn.Module) -> nn.Module:
        """`network` (the denoiser, or a quantized copy that threads may share), evaluated by parts of its batch."""
        return InParts(network)

    def guided(self, denoiser: nn.Module, guidance_scale: float = 1.0) -> nn.Module:
        """`denoiser` (the model's own, or a quantized copy) with classifier-free guidance; 1 = none.

        Raises:
            ConfigError: guidance is asked for, but nothing says what a sample without a condition has.
        """
        if guidance_scale == 1:
            return denoiser
        if not self.unconditional:
            raise ConfigError(
                f"sampler.guidance_scale={guidance_scale}: the model {self.name} has no {self._lacking()}; choose 1"
            )
        return Guided(denoiser, guidance_scale, self.unconditional)

    @property
    def unconditional(self) -> dict[str, int | Tensor]:
        """{condition: what a sample without it has}: a label, or a tensor [...]; {} where there is no such thing."""
        label = {} if self.null_label is None else {"y": self.null_label}
        return label | dict(self.conditions.unconditional if self.conditions else {})

    def _lacking(self) -> str:
        """Return what there is no guidance without."""
        if self.conditions is not None:
            name = next(iter(self.conditions.rows))
            return f"unconditional.{name} in model.conditions that a sample without its condition would have"
        return "class to be guided by" if self.n_classes is None else 'label that means "no class"'

    def example_inputs(self) -> Call:
        """Return a call of one sample, for shape tracing: zeros and the first conditions."""
        device = next(self.denoiser.parameters(), torch.empty(0)).device
        conditions = {} if self.n_classes is None else {"y": torch.zeros(1, dtype=torch.long)}
        if self.conditions is not None:
            conditions |= {name: rows[:1] for name, rows in self.conditions.rows.items()}
        return Call(torch.zeros(1, *self.sample_shape), torch.zeros(1), conditions).to(device)

    def draw_conditions(self, indices: Sequence[int], seed: int, stream: int = EVALUATION) -> dict[str, Tensor]:
        """{argument name: tensor [N, ...]} of sample `indices`, on the CPU; {} for an unconditional model."""
        labels = self.labels(indices, seed, stream)
        conditions = {} if labels is None else {"y": labels}
        return conditions | (self.conditions.draw(indices, seed, stream) if self.conditions else {})

    def labels(self, indices: Sequence[int], seed: int, stream: int = EVALUATION) -> Tensor | None:
        """Class of each sample, int64 [N], or None; all equally often, see `balanced`."""
        return None if self.n_classes is None else balanced(self.n_classes, indices, seed, stream)

    def asked(self, indices: Sequence[int], seed: int) -> list[int] | None:
        """Class that each sample is asked to show, as the classifier of the evaluation numbers them; None = none."""
        del indices, seed
        return None

    def by_image(self, estimates: Tensor, images: int) -> Tensor:
        """Return estimates with a row for each of the images, whatever rows the network evaluates for it."""
        del images
        return estimates

    def check_calls(self, grid: TimeGrid, seed: int, device: torch.device | str = "cpu") -> list[Call]:
        """Return calls of sample 0 at the first and the last step of `grid`, for a look at what the network gives.

        The state is an image without content, 0, at the noise level of the step: sqrt(1 - alpha_bar) times noise.
        """
        noise = SampleNoise(seed, [0], self.sample_shape, stream=EVALUATION).draw()
        conditions = self.draw_conditions([0], seed)
        levels = {step: float(1 - grid.alphas_cumprod[step]) ** 0.5 for step in (0, len(grid) - 1)}
        return [
            Call(level * noise, grid.network_time(step, 1), conditions).to(device) for step, level in levels.items()
        ]

    @property
    def drawing(self) -> dict[str, Any]:
        """Return what decides the images beside weights, grid and seed; {} where there is nothing else."""
        return {}

    def prompts(self, indices: Sequence[int], seed: int) -> list[str] | None:
        """Text that each sample is drawn from; None = the model draws from none."""
        return None

    def run(
        self, denoiser: nn.Module, grid: TimeGrid, indices: Sequence[int], seed: int, *, stream: int = EVALUATION,
        device: torch.device | str = "cpu", **kwargs,
    ) -> Tensor:
        """Draw final states [N, *sample_shape] of sample `indices` of `seed`, drawn with `denoiser`; see `sample`.

        Args:
            stream: of noise and conditions, see `ptq_exp.diffusion.noise`.
        """
        conditions = on_device(self.draw_conditions(indices, seed, stream), device)
        return sample(
            denoiser, grid, SampleNoise(seed, indices, self.sample_shape, stream), conditions=conditions,
            clip_sample=self.clip_sample, device=device, **kwargs,
        )

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


def _check_arguments(name: str, denoiser: nn.Module, conditions: Mapping[str, Tensor]) -> None:
    """Raise ConfigError unless `denoiser` can be called with a state, a time and these conditions by their names."""
    forward = denoiser.forward if isinstance(denoiser, nn.Module) else denoiser
    try:
        inspect.signature(forward).bind(None, None, **conditions)
    except TypeError as error:
        wanted = ", ".join(("x", "t", *(f"{condition}=..." for condition in conditions)))
        raise ConfigError(f"model {name}: its denoiser cannot be called as denoiser({wanted}): {error}") from error
