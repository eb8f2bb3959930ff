"""Post-hoc explanation of Vision Transformers.

::

    from vitexplain import get_explainer, load_model

    explainer = get_explainer("tokentm", load_model("scenes"))
    explainer("photo.jpg").save("explained.png")
"""

from . import _checkout

__version__ = "0.1.0"


from .api import get_explainer, load_model
from .capture import Capture
from .comparison import Comparison, compare
from .errors import (
    CaptureError,
    CheckpointError,
    ExplanationWarning,
    ExportError,
    InputError,
    NotTrainedError,
    OptionError,
    TargetError,
    UnknownNameError,
    UnsupportedModelError,
    VitExplainError,
)
from .explainer import Explainer, explain_with
from .explanation import Explanation
from .export import export_heatmaps, open_export
from .method import AttentionMethod, Method, ProductMethod, ResidualMethod
from .models import ModelAdapter, adapt
from .needs import Needs
from .options import option
from .record import BlockRecord
from .registry import MethodInfo, create_method, list_methods, method_info, register_method
from .subject import Subject

_checkout.link_neighbours()

__all__ = [
    "AttentionMethod",
    "BlockRecord",
    "Capture",
    "CaptureError",
    "CheckpointError",
    "Comparison",
    "Explainer",
    "Explanation",
    "ExplanationWarning",
    "ExportError",
    "InputError",
    "Method",
    "MethodInfo",
    "ModelAdapter",
    "Needs",
    "NotTrainedError",
    "OptionError",
    "ProductMethod",
    "ResidualMethod",
    "Subject",
    "TargetError",
    "UnknownNameError",
    "UnsupportedModelError",
    "VitExplainError",
    "adapt",
    "compare",
    "create_method",
    "explain_with",
    "export_heatmaps",
    "get_explainer",
    "list_methods",
    "load_model",
    "method_info",
    "open_export",
    "option",
    "register_method",
]
