"""The nearest embeddings by usearch: all compared, or a graph."""

import time
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file
from usearch.index import Index, search

from diptych.bench.serve import serve


def make(folder: str, kind: str, count: int):
    arrays = load_file(Path(folder) / "embeddings.safetensors")
    images, queries = arrays["images"], arrays["queries"]
    if kind == "exact":
        return lambda: {"rows": [search(images, query, count, "ip", exact=True).keys.tolist() for query in queries]}
    began = time.perf_counter()
    index = Index(ndim=images.shape[1], metric="ip")
    index.add(np.arange(len(images)), images)
    built = time.perf_counter() - began
    return lambda: {"rows": [index.search(query, count).keys.tolist() for query in queries], "build_s": built}


serve(make, ("usearch", "numpy"))
