"""Direct Feedback Alignment for PyTorch.

feedback.py       DFALayer, DFA: one backward pass that trains every layer from the output error;
                  DFA.signals: the place for other feedback rules
passes.py         Pass: the activations of one call of a network, and checks of the order of calls
hooks.py          Hook: a feedback point or the DFA behind a module, its code untouched
conversion.py     dfa_from_bp: an ordinary network, made into a DFA network
alignment.py      measure_alignment: the angle between DFA's signals and true gradients
prealignment.py   prealign: weights that start out aligned with the feedback
bottleneck.py     BottleneckLinear: a layer that lets only part of its gradients through
"""

from dfatools.alignment import measure_alignment
from dfatools.bottleneck import BottleneckLinear
from dfatools.conversion import dfa_from_bp
from dfatools.feedback import DFA, DFALayer
from dfatools.prealignment import prealign

__version__ = "2.0.0.dev0"
__all__ = ["DFA", "BottleneckLinear", "DFALayer", "dfa_from_bp", "measure_alignment", "prealign"]
