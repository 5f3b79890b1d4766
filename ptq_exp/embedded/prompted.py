"""The embedded pipelines as models: their own prompts, in fixed order, and the digit that each asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ptq_exp.embedded.load import pipeline_folder
from ptq_exp.embedded.pipelines import CALLS
from ptq_exp.embedded.prompts import asked, evaluation_prompts
from ptq_exp.pipelines import PipelineModel
from ptq_exp.pipelines.folder import pipeline_folder as pipeline_in
from ptq_exp.pipelines.prompts import Request, requests_of

PROMPTS = 900
"""Ten images of every combination of digit, stroke width and slant."""


def digits_text(checkpoint: str | None = None, *, name: str = "digits_text", **settings: Any) -> PipelineModel:
    """Build the Stable Diffusion pipeline of digits; `checkpoint` may be another folder of the same shape.

    Args:
        settings: of `ptq_exp.pipelines.folder.pipeline_folder`; `prompts` are `evaluation_prompts` by default.
    """
    return _model("digits_text", checkpoint, name=name, **settings)


def digits_flow(checkpoint: str | None = None, *, name: str = "digits_flow", **settings: Any) -> PipelineModel:
    """Build the flow-matching transformer pipeline of digits; see `digits_text`."""
    return _model("digits_flow", checkpoint, name=name, **settings)


def _model(
    which: str, checkpoint: str | None, *, prompts: Sequence[str | Request] | str | None = None,
    call: Mapping[str, Any] | None = None, steps: int | None = None, guidance_scale: float | None = None,
    **settings: Any,
) -> PipelineModel:
    published = dict(CALLS[which])
    own_steps, own_scale = published.pop("num_inference_steps"), published.pop("guidance_scale")
    requests = requests_of(evaluation_prompts(PROMPTS) if prompts is None else prompts)
    digits = [asked(str(request.get("prompt", ""))) for request in requests]
    return pipeline_in(
        str(pipeline_folder(which) if checkpoint is None else checkpoint), prompts=requests,
        call=published | dict(call or {}), steps=own_steps if steps is None else steps,
        guidance_scale=own_scale if guidance_scale is None else guidance_scale,
        asked=None if None in digits else [one.digit for one in digits if one is not None], **settings,
    )
