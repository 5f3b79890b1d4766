"""Pipelines of diffusers as models: drawn with one generator per image, their network's calls recorded and answered."""

from ptq_exp.pipelines.layout import CallLayout
from ptq_exp.pipelines.model import PipelineModel
from ptq_exp.pipelines.network import PipelineNetwork, answering
from ptq_exp.pipelines.recorded import RecordedModel

__all__ = ["CallLayout", "PipelineModel", "PipelineNetwork", "RecordedModel", "answering"]
