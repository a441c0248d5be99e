"""The fusions, in the order in which they are tried: parts before the wholes whose bodies use them."""

from dsv4c.ir.fused import Fused
from dsv4c.passes.fusions.attention import Attention
from dsv4c.passes.fusions.compressor import Compressor
from dsv4c.passes.fusions.drafts import Features, PickDraft
from dsv4c.passes.fusions.embed import Embed
from dsv4c.passes.fusions.experts_down import ExpertsDown, ScaledExpertsDown
from dsv4c.passes.fusions.head import Head
from dsv4c.passes.fusions.hyper_norm import HyperNorm, HyperNormFirst
from dsv4c.passes.fusions.in_proj import InProj
from dsv4c.passes.fusions.index_topk import IndexTopk
from dsv4c.passes.fusions.indexer import Indexer
from dsv4c.passes.fusions.inverse_rope import InverseRope
from dsv4c.passes.fusions.kv_norm_rope_store import KvNormRopeStore
from dsv4c.passes.fusions.q_norm_quantize import QNormQuantize
from dsv4c.passes.fusions.q_norm_rope import QNormRope
from dsv4c.passes.fusions.quantize_linear import QuantizeLinear
from dsv4c.passes.fusions.rmsnorm_quantize import RmsnormQuantize
from dsv4c.passes.fusions.router import HashRouter, Router
from dsv4c.passes.fusions.sampler import Sampler
from dsv4c.passes.fusions.sinkhorn import Sinkhorn
from dsv4c.passes.fusions.swiglu import HashSwiglu, Swiglu

FUSIONS: tuple[type[Fused], ...] = (
    Embed,
    Sinkhorn,
    HyperNorm,
    HyperNormFirst,
    Head,
    Features,
    PickDraft,
    Router,
    HashRouter,
    Swiglu,
    HashSwiglu,
    ExpertsDown,
    ScaledExpertsDown,
    QNormRope,
    InverseRope,
    Attention,
    KvNormRopeStore,
    Compressor,
    Indexer,
    IndexTopk,
    Sampler,
    RmsnormQuantize,
    QNormQuantize,
    QuantizeLinear,
    InProj,
)
