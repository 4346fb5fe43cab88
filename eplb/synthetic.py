"""Made-up expert loads that look like measured ones, for tests and benchmarks.

Several domains of text; each layer has a rank-size profile of expert popularity (fitted to published histograms
of DeepSeek-R1 on GPQA: hottest expert 3 to 13 times the mean, the hottest eighth takes 25 to 50 %), given to the
experts in a domain's own order, with rank correlation 0.3 between domains. A step mixes the domains, adds 6 %
gamma noise an expert, and draws multinomial counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from moeserve.eplb.types import Floats

Scenario = Literal["steady", "drift", "burst"]

# Median over layers of the fitted profile, as load over mean, by relative rank (0 hottest, 1 coldest).
_RANK = np.array([0.0, 1, 2, 4, 8, 16, 32, 64, 128, 192, 255]) / 255
_PROFILE = np.array([5.6, 4.3, 3.8, 3.2, 2.67, 2.2, 1.63, 0.99, 0.75, 0.64, 0.40])


@dataclass(frozen=True)
class Traffic:
    """Popularity of each expert by domain and layer: [D, L, E], rows sum to 1."""

    popularity: Floats

    @classmethod
    def make(
        cls,
        num_layers: int,
        num_experts: int,
        *,
        num_domains: int = 6,
        correlation: float = 0.3,
        seed: int = 0,
        profiles: Floats | None = None,
    ) -> Traffic:
        """profiles [layers, E], each row descending, in place of the built-in fit."""
        rng = np.random.default_rng(seed)
        if profiles is None:
            base = np.interp(np.arange(num_experts) / max(num_experts - 1, 1), _RANK, np.log(_PROFILE))
            steep = rng.uniform(0.8, 1.25, (num_layers, 1))
            profiles = np.exp(base * steep)
            profiles[:, 0] *= rng.lognormal(0.1, 0.35, num_layers)
        profiles = profiles / profiles.sum(axis=1, keepdims=True)
        common = rng.standard_normal((1, num_layers, num_experts))
        own = rng.standard_normal((num_domains, num_layers, num_experts))
        order = np.argsort(np.sqrt(correlation) * common + np.sqrt(1 - correlation) * own, axis=2)
        popularity = np.empty_like(own)
        np.put_along_axis(popularity, order, np.broadcast_to(profiles, own.shape), axis=2)
        return cls(popularity)

    def mixes(self, scenario: Scenario, steps: int, seed: int = 0, concentration: float = 60.0) -> Floats:
        """[steps, D] part of each domain in each step.

        steady: one mean mix. drift: the mean wanders from one mix to another over the run. burst: now and then
        one domain takes half of the traffic for 4 to 16 steps. Steps scatter about the mean (Dirichlet). The sizes
        are such that DeepSeek's greedy comes to the next-step imbalance that was measured for it.
        """
        rng = np.random.default_rng(seed + 1)
        domains = self.popularity.shape[0]
        start, end = rng.dirichlet(np.full(domains, 3.0), 2)
        way = np.linspace(0.0, 1.0, steps)[:, None] if scenario == "drift" else np.zeros((steps, 1))
        mean = (1 - way) * start + way * end
        if scenario == "burst":
            at = 0
            while at < steps:
                at += int(rng.integers(4, 24))
                length = int(rng.integers(4, 16))
                mean[at : at + length] = 0.48 * start + 0.52 * np.eye(domains)[rng.integers(domains)]
                at += length
        gamma = rng.gamma(np.maximum(mean * concentration, 1e-3))
        mix: Floats = gamma / gamma.sum(axis=1, keepdims=True)
        return mix

    def counts(
        self, mixes: Floats, assignments: int, seed: int = 0, noise: float = 0.06
    ) -> npt.NDArray[np.int64]:
        """[steps, L, E] routed counts, `assignments` in each step and layer."""
        rng = np.random.default_rng(seed + 2)
        chance = np.einsum("sd,dle->sle", mixes, self.popularity)
        chance *= rng.gamma(1 / noise**2, noise**2, chance.shape)
        chance /= chance.sum(axis=2, keepdims=True)
        return rng.multinomial(assignments, chance)
