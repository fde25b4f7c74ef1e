"""Plant sites that integrate vision and language in a simulated recording, and see which of them a probe finds.

Needs `pip install 'diptych[demo]'` for the drawings. Takes some seconds on an idle core.
"""

import numpy as np

import diptych
from diptych.claims.sites import COUNTS, simulate_sites, smooth_order
from diptych.data.sources import Subset
from diptych.methods.brain_encoding import mini, model_features, run_battery, score_features


def main(events: int = 300) -> None:
    # Drawn emoji and their names stand for the scenes of a film; our small model of drawings looks and reads.
    source = Subset(diptych.open_source("openmoji:train"), range(events), "emoji")
    features = model_features(diptych.load("mini"), source, mini())

    # Sites that see, hear, do both, integrate or do nothing, over events in an order in which neighbours are alike.
    rng = np.random.default_rng(0)
    order = smooth_order(features["side by side"], rng)
    features = {name: x[order] for name, x in features.items()}
    products = features["multimodal"][:, -24:]
    sites = simulate_sites(features["vision"], features["language"], products, rng, strength=1.0)

    scores = score_features(features, sites.responses, mini())
    for name, score in scores.items():
        print(f"mean r of {name}: {score.test.mean():.3f}")
    found = run_battery(scores, len(sites.kinds), mini()).multimodal
    for kind in COUNTS:
        print(f"of {COUNTS[kind]} sites that are {kind}, {found[sites.of(kind)].sum()} were found")
    print(f"{found.sum()} of {len(found)} sites integrate, says the probe")


if __name__ == "__main__":
    main()
