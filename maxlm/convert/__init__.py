"""Weights in and out: Hugging Face folders to checkpoints and back, by the tables of the families."""

from maxlm.convert.stored import model_config

__all__ = ["model_config"]
