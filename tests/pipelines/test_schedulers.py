"""Schedulers of every kind drive a pipeline as they are: two evaluations a step, many steps back, scaled states."""

import diffusers
import numpy as np
import pytest
import torch
from small_pipelines import sd3, sd15
from torch import nn

from ptq_exp.evaluation.images import to_uint8
from ptq_exp.pipelines import PipelineModel

STEPS, SEED = 4, 5
CALL = {"height": 16, "width": 16, "guidance_scale": 3.0}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
DIFFUSION = {
    "heun": ("HeunDiscreteScheduler", {}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "dpm++ sde karras": ("DPMSolverMultistepScheduler", {
        "algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}),
    "dpm single": ("DPMSolverSinglestepScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler karras v": ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "prediction_type": "v_prediction"}),
    "euler ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "ddim trailing zero snr": ("DDIMScheduler", {
        "prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}),
}
FLOW = {
    "flow euler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "flow heun": ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
    "flow unipc": ("UniPCMultistepScheduler", {
        "prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}),
    "flow dpm++": ("DPMSolverMultistepScheduler", {
        "prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}),
}


class Wrapped(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network, self.times = network, []

    def forward(self, x, t, **conditions):
        self.times.append(float(t[0]))
        return self.network(x, t, **conditions)


@pytest.mark.parametrize("name", [*DIFFUSION, *FLOW])
def test_images_calls_and_times(name):
    kind, settings = (DIFFUSION | FLOW)[name]
    scheduler = getattr(diffusers, kind)(**(BETAS if name in DIFFUSION else {}) | settings)
    pipe = sd15(scheduler) if name in DIFFUSION else sd3(scheduler)
    pipe.set_progress_bar_config(disable=True)
    model = PipelineModel(pipe, ["low", "lowest newer"], steps=STEPS, call=CALL)
    grid = model.time_grid()
    by_hand = pipe(["low", "lowest newer"], **CALL, num_inference_steps=STEPS, output_type="np",
                   generator=model.arguments([0, 1], SEED)["generator"]).images
    given = list(dict.fromkeys(pipe.scheduler.timesteps.double().tolist()))
    np.testing.assert_allclose(grid.timesteps.numpy(), given, rtol=1e-6)
    own = to_uint8(model.sample(model.denoiser, grid, [0, 1], SEED))
    np.testing.assert_array_equal(own, np.rint(255 * by_hand))
    wrapped, found = Wrapped(model.denoiser), []
    drawn = to_uint8(model.sample(wrapped, grid, [0, 1], SEED, on_step=found.append))
    np.testing.assert_array_equal(drawn, own)
    assert list(dict.fromkeys(wrapped.times)) == grid.timesteps.float().tolist()
    assert [record.step for record in found] == list(range(len(grid)))
    assert all(torch.equal(record.call.evaluate(model.denoiser), record.eps) for record in found)


def test_a_second_order_scheduler_is_recorded_once_per_time():
    model = PipelineModel(sd15(diffusers.HeunDiscreteScheduler(**BETAS)), ["low"], steps=STEPS, call=CALL)
    wrapped, found = Wrapped(model.denoiser), []
    model.run(wrapped, model.time_grid(), [0], SEED, on_step=found.append)
    assert len(wrapped.times) == 2 * STEPS - 1
    assert len(found) == len(model.time_grid()) == STEPS
