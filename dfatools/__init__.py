"""Direct Feedback Alignment (DFA) for PyTorch.

feedback.py       DFALayer, DFA: one backward pass trains every layer from the output error;
                  DFA.signals: the method that other feedback rules override
passes.py         Pass: the activations of one call of a network, and checks of the order of calls
hooks.py          Hook: a feedback point or the DFA after a module, by a forward hook
conversion.py     dfa_from_bp: turns an ordinary network into a DFA network
alignment.py      measure_alignment: the cosine between DFA's signals and BP gradients
prealignment.py   prealign: sets weights whose BP gradients start aligned with the feedback
bottleneck.py     BottleneckLinear: a Linear layer that masks its gradients

The examples in docstrings assume `import torch`, `from torch import nn`, `from torch.nn import
functional as F` and `from dfatools import *`.
"""

from dfatools.alignment import measure_alignment
from dfatools.bottleneck import BottleneckLinear
from dfatools.conversion import dfa_from_bp
from dfatools.feedback import DFA, DFALayer
from dfatools.prealignment import prealign

__version__ = "2.0.0.dev0"
__all__ = ["DFA", "BottleneckLinear", "DFALayer", "dfa_from_bp", "measure_alignment", "prealign"]
