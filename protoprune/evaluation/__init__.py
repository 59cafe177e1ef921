"""Retraining: does a list beat random images, and how does the error fall with their number?

statistics  accuracies over seeds -> intervals, paired differences, verdicts
runs        training runs, each done once and kept
comparing   lists against random subsets and everything: `evaluate`
curves      initial size x keep fraction x order: `scaling`
fits        power law, exponential, power law with offset
report      results -> tables, CSV, JSON and figures

from protoprune.evaluation import Kept, evaluate, scaling
"""

from protoprune.evaluation.comparing import Evaluation, Kept, Method, evaluate
from protoprune.evaluation.curves import Curve, Point, Scaling, scaling

__all__ = ["Curve", "Evaluation", "Kept", "Method", "Point", "Scaling", "evaluate", "scaling"]
