"""The embedded pipelines as models: their own prompts, in fixed order, and the digit that each asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from ptq_exp.embedded.load import pipeline_folder
from ptq_exp.embedded.pipelines import CALLS
from ptq_exp.embedded.prompts import asked, evaluation_prompts
from ptq_exp.pipelines import PipelineModel
from ptq_exp.pipelines.folder import pipeline_folder as pipeline_in
from ptq_exp.pipelines.prompts import Request, requests_of

PROMPTS = 900
"""Ten images of every combination of digit, stroke width and slant."""


def prompted(
    which: str, checkpoint: str | None = None, *, name: str | None = None,
    prompts: Sequence[str | Request] | str | None = None, call: Mapping[str, Any] | None = None,
    component: str | None = None, steps: int | None = None, guidance_scale: float | None = None,
    eta: float | None = None, dtype: str = "float32",
) -> PipelineModel:
    """Build a pipeline of digits: `digits_text`, a Stable Diffusion, or `digits_flow`, a flow-matching transformer.

    Args:
        checkpoint: another folder of the same shape; None = the one in the package.
        prompts: None = `evaluation_prompts`.
        name, call, component, steps, guidance_scale, eta, dtype: see `ptq_exp.pipelines.folder.pipeline_folder`.
    """
    published = dict(CALLS[which])
    own_steps, own_scale = published.pop("num_inference_steps"), published.pop("guidance_scale")
    requests = requests_of(evaluation_prompts(PROMPTS) if prompts is None else prompts)
    digits = [asked(str(request.get("prompt", ""))) for request in requests]
    return pipeline_in(
        str(pipeline_folder(which) if checkpoint is None else checkpoint), name=name or which, prompts=requests,
        call=published | dict(call or {}), component=component, steps=own_steps if steps is None else steps,
        guidance_scale=own_scale if guidance_scale is None else guidance_scale, eta=eta, dtype=dtype,
        asked=None if None in digits else [one.digit for one in digits if one is not None],
    )


digits_text, digits_flow = partial(prompted, "digits_text"), partial(prompted, "digits_flow")
