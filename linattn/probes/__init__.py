"""See, measure and edit what a state remembers: `linattn.probe`, what it keeps, and what can be told from that."""

from .edits import duals, without_key_direction, without_value_direction, written
from .measures.bilinear import BilinearProbe, BilinearResult
from .measures.controls import Figure, controlled, random_keys, untrained
from .measures.dissect import Dissection, dissect, unit_maps
from .measures.fitted import Curve, LinearProbe, ProbeResult, layer_curve, leace
from .measures.frozen import frozen_coefficients, jacobian
from .measures.geometry import (
    MinibatchCKA,
    ablated,
    alignment,
    causal_inner_product,
    cka,
    difference_of_means,
    ideal_words,
    lidar,
    rankme,
    rsa,
    uniformity,
)
from .measures.maps import LinearMap, LinearRelation, MapResult, RelationResult, between
from .measures.onion import OnionProbe, OnionResult
from .measures.sparse import SparseAutoencoder, SparseCode
from .measures.states import half_life, interference, lens, offsets, ranks, surprise, survival, trajectory, transition, write_strength
from .probe import probe
from .reduce import HalfLife, Moments, Saturation, Sketch, participation_ratio
from .report import Report
from .storage import Traces, load
from .trace import Snapshot, Trace

__all__ = [
    "BilinearProbe",
    "BilinearResult",
    "Curve",
    "Dissection",
    "Figure",
    "HalfLife",
    "LinearMap",
    "LinearProbe",
    "LinearRelation",
    "MapResult",
    "MinibatchCKA",
    "Moments",
    "OnionProbe",
    "OnionResult",
    "ProbeResult",
    "RelationResult",
    "Report",
    "Saturation",
    "Sketch",
    "Snapshot",
    "SparseAutoencoder",
    "SparseCode",
    "Trace",
    "Traces",
    "ablated",
    "alignment",
    "between",
    "causal_inner_product",
    "cka",
    "controlled",
    "difference_of_means",
    "dissect",
    "duals",
    "frozen_coefficients",
    "half_life",
    "ideal_words",
    "interference",
    "jacobian",
    "layer_curve",
    "leace",
    "lens",
    "lidar",
    "load",
    "offsets",
    "participation_ratio",
    "probe",
    "random_keys",
    "rankme",
    "ranks",
    "rsa",
    "surprise",
    "survival",
    "trajectory",
    "transition",
    "uniformity",
    "unit_maps",
    "untrained",
    "without_key_direction",
    "without_value_direction",
    "write_strength",
    "written",
]  # fmt: skip
