"""ASkewSGD as its authors have it: the paper's interval annealing, through askew_cuda.

Leconte, Schechtman, Moulines, "ASkewSGD: an annealed interval-constrained optimisation method to train quantized neural
networks", AISTATS 2023. Their schedule of the 4-bit training (``askew.paper("4bit")``): epsilon is 1 for a third of the
steps, then falls geometrically. Levels and the first scale are askew_cuda's, and its box; the scale stays, and one
learning rate is for all.
"""

from .method import Method
from .ours import Ours

# The authors skew the gradient, at the rate alpha per unit of learning rate; a recovery bounds the actual move,
# whatever that is.
SETTINGS = {
    "alpha 0.1": {"skew_at": "gradient", "alpha": 0.1},
    "alpha 1": {"skew_at": "gradient", "alpha": 1.0},
    "recovery 0.5": {"recovery": 0.5},
}


class Interval(Method):
    name = "ASkewSGD, interval annealing"
    knob, knobs = "strength of the pull", tuple(SETTINGS)

    def begin(self, quantized, rest, base, width, knob, **keywords):
        ours = Ours(anneal={"hold": 1 / 3, "end": 1.0, "shape": "geometric"}, by_width=False)
        ours.keywords = {"anneal": "interval", "scale_lr": 0.0} | SETTINGS[knob]
        return ours.begin(quantized, rest, base, width, None, **keywords)
