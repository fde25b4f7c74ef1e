"""The nearest embeddings by faiss: all compared, or a graph."""

import time
from pathlib import Path

import faiss
from safetensors.numpy import load_file

from diptych.bench.serve import serve


def make(folder: str, kind: str, count: int):
    arrays = load_file(Path(folder) / "embeddings.safetensors")
    images, queries = arrays["images"], arrays["queries"]
    d = images.shape[1]
    began = time.perf_counter()
    index = faiss.IndexFlatIP(d) if kind == "exact" else faiss.IndexHNSWFlat(d, 32, faiss.METRIC_INNER_PRODUCT)
    index.add(images)
    built = time.perf_counter() - began
    return lambda: {"rows": [index.search(query[None], count)[1][0].tolist() for query in queries], "build_s": built}


serve(make, ("faiss-cpu", "numpy"))
