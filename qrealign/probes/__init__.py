"""Probes of the aligned model: does a block still tell malicious prompts from benign ones?"""

from qrealign.probes.fit import fit_probes
from qrealign.probes.probe import BlockFit, SafetyProbe
from qrealign.probes.separability import ProbeRates, Projector, fisher_ratio, fisher_ratios, probe_rates, projection_2d
from qrealign.probes.states import collect_last_states

__all__ = [
    "BlockFit",
    "ProbeRates",
    "Projector",
    "SafetyProbe",
    "collect_last_states",
    "fisher_ratio",
    "fisher_ratios",
    "fit_probes",
    "probe_rates",
    "projection_2d",
]
