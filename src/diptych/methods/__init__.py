"""The hand-written table of methods. Importing it imports no method and no torch."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Literal

from diptych.errors import ConfigError, PlannedMethodError, nearest

Verb = Literal["curator", "objective", "adapter", "attack", "probe"]
State = Literal["planned", "works", "reproduced", "not reproduced"]


@dataclass(frozen=True, slots=True)
class Method:
    """One published method.

    Attributes:
        slug: Name on the command line, and of its file in this folder.
        verb: Which of the five contracts it implements.
        title: Short name with what it does.
        paper: First author, venue and year.
        arxiv: Identifier.
        state: `planned` has no code; `works` passes its tests; the other two have run their claim.
    """

    slug: str
    verb: Verb
    title: str
    paper: str
    arxiv: str
    state: State = "planned"


METHODS: Mapping[str, Method] = {
    method.slug: method
    for method in (
        Method("clip", "objective", "CLIP: symmetric InfoNCE", "Radford et al., ICML 2021", "2103.00020", "works"),
        Method("siglip", "objective", "SigLIP: pairwise sigmoid loss", "Zhai et al., ICCV 2023", "2303.15343", "works"),
        Method("fdt", "objective", "FDT: finite discrete tokens", "Chen et al., CVPR 2023", "2303.14865", "works"),
        Method(
            "rs_m_clip",
            "objective",
            "RS-M-CLIP: multilingual, remote sensing",
            "Silva et al., SIGSPATIAL 2024",
            "2410.23370",
            "not reproduced",
        ),
        Method(
            "improved_baselines",
            "objective",
            "Improved baselines: SiamLIP, BYOLIP, BarLIP, SwALIP",
            "Fini et al., TMLR 2023",
            "2305.08675",
            "works",
        ),
        Method(
            "scene_graph_3d", "objective", "3D scene-graph-guided pre-training", "Liu et al., arXiv 2024", "2411.18666"
        ),
        Method(
            "c_pgc",
            "attack",
            "C-PGC: universal perturbations",
            "Fang et al., ICCV 2025",
            "2406.05491",
            "not reproduced",
        ),
        Method(
            "nevlp", "objective", "NEVLP: noise-robust, efficient pre-training", "Tao et al., arXiv 2024", "2409.09582"
        ),
        Method(
            "cosmo", "objective", "COSMO: contrastive interleaved pre-training", "Wang et al., arXiv 2024", "2401.00849"
        ),
        Method(
            "conceptclip", "objective", "ConceptCLIP: concept-enhanced, medical", "Nie et al., arXiv 2025", "2501.15579"
        ),
        Method("cloc", "objective", "CLOC: contrastive localised pre-training", "Chen et al., ICML 2025", "2410.02746"),
        Method(
            "s_vco",
            "objective",
            "S-VCO: symmetrical visual contrastive optimisation",
            "Wu et al., ACL 2025",
            "2502.13928",
        ),
        Method(
            "vlm2vec", "objective", "VLM2Vec: a language model as embedder", "Jiang et al., ICLR 2025", "2410.05160"
        ),
        Method(
            "anovl",
            "adapter",
            "AnoVL: zero-shot anomaly localisation",
            "Deng et al., arXiv 2023",
            "2308.15939",
            "works",
        ),
        Method(
            "alip",
            "objective",
            "ALIP: adaptive pre-training with synthetic captions",
            "Yang et al., ICCV 2023",
            "2308.08428",
            "works",
        ),
        Method(
            "ip_clip",
            "adapter",
            "IP-CLIP: prompt-based model protection",
            "Wang et al., CVPR 2025",
            "2503.02393",
            "works",
        ),
        Method(
            "zscl",
            "objective",
            "ZSCL: zero-shot continual learning",
            "Zheng et al., ICCV 2023",
            "2303.06628",
            "reproduced",
        ),
        Method(
            "gama", "attack", "GAMA: multi-object scene attacks", "Aich et al., NeurIPS 2022", "2209.09502", "works"
        ),
        Method(
            "sevlm",
            "objective",
            "SEVLM: small emotional vision-language model",
            "Zhang et al., ECCV 2024",
            "2403.11150",
        ),
        Method("mod_x", "objective", "Mod-X: off-diagonal information", "Ni et al., ICML 2023", "2305.07437", "works"),
        Method(
            "brain_encoding",
            "probe",
            "Brain encoding of vision-language models",
            "Subramaniam et al., ICML 2024",
            "2406.14481",
            "reproduced",
        ),
        Method(
            "clippings",
            "objective",
            "CLIPPINGS: record linkage",
            "Arora et al., arXiv 2023",
            "2304.03464",
            "not reproduced",
        ),
        Method("regionspot", "adapter", "RegionSpot: recognise any region", "Yang et al., NeurIPS 2024", "2311.01373"),
        Method(
            "grounded_semantics", "objective", "Grounded semantics: VG-Bert", "Zhang et al., NeurIPS 2021", "2111.07180"
        ),
        Method(
            "trident",
            "adapter",
            "Trident: training-free segmentation",
            "Shi et al., ICCV 2025",
            "2411.09219",
            "works",
        ),
        Method(
            "laclip", "objective", "LaCLIP: language rewrites", "Fan et al., NeurIPS 2023", "2305.20088", "reproduced"
        ),
        Method(
            "machine_vision_therapy",
            "adapter",
            "Machine Vision Therapy: denoising in context",
            "Huang et al., ICML 2024",
            "2312.02546",
        ),
        Method(
            "genhancer",
            "objective",
            "GenHancer: imperfect generative models as enhancers",
            "Ma et al., ICCV 2025",
            "2503.19480",
        ),
        Method("metaclip", "curator", "MetaCLIP: metadata-curated data", "Xu et al., ICLR 2024", "2309.16671", "works"),
        Method("diva", "objective", "DIVA: diffusion feedback", "Wang et al., ICLR 2025", "2407.20171"),
        Method("vr_lwf", "objective", "VR-LwF: replayed vocabulary", "Ding et al., arXiv 2022", "2207.09248", "works"),
    )
}


def load_method(slug: str, *, verb: Verb | None = None) -> ModuleType:
    """Return the module of a method that works, imported now.

    Args:
        slug: Its name.
        verb: What it must be, such as an objective for training; None for any.

    Raises:
        ConfigError: If there is no such method, or it is something else; names the nearest, or those that are.
        PlannedMethodError: If it has no code yet; names its paper and what works meanwhile.
    """
    if slug not in METHODS:
        raise ConfigError(f"There is no method {slug!r}. {nearest(slug, METHODS)}")
    method = METHODS[slug]
    wanted = verb or method.verb
    working = ", ".join(m.slug for m in METHODS.values() if m.state != "planned" and m.verb == wanted)
    if method.verb != wanted:
        raise ConfigError(
            f"{slug} ({method.title}) has the verb {method.verb}, and this needs the verb {wanted}. What has it today: {working or 'nothing'}."
        )
    if method.state == "planned":
        raise PlannedMethodError(
            f"{slug} ({method.title}; {method.paper}) is planned: there is no code for it yet. "
            f"What works as {method.verb} today: {working or 'nothing'}."
        )
    return import_module(f"diptych.methods.{slug}")


class _CallableModule(ModuleType):
    """Makes `diptych.methods()` list the table: the command `diptych methods` is a function of that name, and so is this package."""

    def __call__(self) -> tuple[Method, ...]:
        return tuple(METHODS.values())


sys.modules[__name__].__class__ = _CallableModule
