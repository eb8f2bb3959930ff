"""Measures of explanations; draw nothing, and import no method."""

from .batches import metric_batches
from .catalogue import Figure, MetricInfo, create_metric, list_metrics, metric_info, register_metric
from .evaluation import Evaluation, evaluate
from .metric import Metric, MetricBatch
from .predictor import Predictor
from .randomisation import RandomisationCheck, randomisation_check, randomisation_checks
from .ranking import Comparison, PairedDifference, compare_rows, holm
from .statistics import Estimate, estimates
from .tally import Summary, Tally

__all__ = [
    "Comparison",
    "Estimate",
    "Evaluation",
    "Figure",
    "Metric",
    "MetricBatch",
    "MetricInfo",
    "PairedDifference",
    "Predictor",
    "RandomisationCheck",
    "Summary",
    "Tally",
    "compare_rows",
    "create_metric",
    "estimates",
    "evaluate",
    "holm",
    "list_metrics",
    "metric_batches",
    "metric_info",
    "randomisation_check",
    "randomisation_checks",
    "register_metric",
]
