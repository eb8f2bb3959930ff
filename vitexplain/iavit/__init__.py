"""The interpreter of IA-ViT, what it is trained for, and trained ones in files."""

from .checkpoint import load_iavit, load_interpreter, save_checkpoint, save_model
from .interpreter import Interpretation, Interpreter, InterpreterShape
from .losses import attention_regulariser, simulation_loss

__all__ = [
    "Interpretation",
    "Interpreter",
    "InterpreterShape",
    "attention_regulariser",
    "load_iavit",
    "load_interpreter",
    "save_checkpoint",
    "save_model",
    "simulation_loss",
]
