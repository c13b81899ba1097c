"""Names: TransformerLens' hooks and EAP-IG's nodes and edges as sites and edges, and back.

    blocks.9.attn.hook_z      L9.z            a9.h6                 L9.h6
    blocks.9.hook_mlp_out     L9.mlp.write    m9                    L9.mlp
    blocks.9.hook_resid_pre   L9.resid.pre    input                 embed
    blocks.9.hook_q_input     (read as) L9.q  a0.h1->a3.h2<q>       L0.h1>L3.h2.q
    blocks.9.attn.hook_rot_q  L9.q            a0.h1->m3             L0.h1>L3.mlp

What has one name there and another meaning here is refused, and says so: queries and keys before rotary embedding are no site.
TransformerLens copies a key/value head for each query head that reads it; here it is one (`Sizes.heads // Sizes.kv_heads`).
"""

import re
from dataclasses import dataclass

from patchclamp.errors import SiteError
from patchclamp.sites import Edge, Site


@dataclass(frozen=True)
class Sizes:
    """What a model's names depend on.

    Args:
        layers: blocks.
        heads: query heads per layer.
        kv_heads: key/value heads per layer.
        width: of the residual stream.
        parallel: whether attention and MLP of a block read the same stream.
        rotary: whether queries and keys are rotated after their projection.
    """

    layers: int
    heads: int
    kv_heads: int
    width: int
    parallel: bool = False
    rotary: bool = False

    def __post_init__(self) -> None:
        if min(self.layers, self.heads, self.kv_heads, self.width) < 1 or self.heads % self.kv_heads:
            raise SiteError(f"{self} is no model: sizes are 1 or more, and heads are shared out evenly among key/value heads")

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.heads // self.kv_heads


_IN_BLOCK = {
    "hook_resid_pre": "resid.pre", "hook_resid_mid": "resid.mid", "hook_resid_post": "resid.post", "hook_attn_out": "attn.write",
    "hook_mlp_out": "mlp.write", "attn.hook_q": "q", "attn.hook_k": "k", "attn.hook_v": "v", "attn.hook_rot_q": "q",
    "attn.hook_rot_k": "k", "attn.hook_z": "z", "attn.hook_attn_scores": "scores", "attn.hook_pattern": "pattern",
    "attn.hook_result": "write", "mlp.hook_post": "neuron", "hook_q_input": "q", "hook_k_input": "k", "hook_v_input": "v",
    "hook_mlp_in": "mlp",
}  # fmt: skip
"""By hook within a block, the kind of site; of inputs (`hook_q_input`), the kind of what reads there: a destination of edges."""
_OUTSIDE = {"hook_embed": "embed", "ln_final.hook_normalized": "final"}
_BEFORE_ROTATION = ("attn.hook_q", "attn.hook_k")
_AFTER_ROTATION = {"q": "attn.hook_rot_q", "k": "attn.hook_rot_k"}


def site_of(hook: str, sizes: Sizes) -> Site:
    """The whole-layer site that a TransformerLens hook stands at, or that reads there (`hook_q_input`, `hook_mlp_in`).

    Raises:
        SiteError: no such hook, a layer that the model has not, or queries and keys before rotary embedding.
    """
    if hook in _OUTSIDE:
        return Site(_OUTSIDE[hook])
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook)
    if found is None or found[2] not in _IN_BLOCK:
        raise SiteError(
            f"{hook!r} is no hook that has a site: there are {', '.join(_OUTSIDE)} and blocks.N. with {', '.join(_IN_BLOCK)}"
        )
    layer, rest = int(found[1]), found[2]
    if sizes.rotary and rest in _BEFORE_ROTATION:
        raise SiteError(
            f"{hook!r} is before rotary embedding, and sites hold queries and keys after it: use "
            f"blocks.{layer}.{_AFTER_ROTATION[_IN_BLOCK[rest]]}"
        )
    if not sizes.rotary and rest in _AFTER_ROTATION.values():
        raise SiteError(
            f"{hook!r} is after rotary embedding, and this model has none: use blocks.{layer}.{rest.replace('rot_', '')}"
        )
    return Site(_IN_BLOCK[rest], _in(layer, sizes.layers, "layer", hook))


def hook_of(site: Site, sizes: Sizes) -> str:
    """The TransformerLens hook at a site's place (heads, neurons and positions are indices into its value there).

    Raises:
        SiteError: TransformerLens has no such place (`L3.mlp` before a post-norm, routers, groups).
    """
    for hook, kind in _OUTSIDE.items():
        if site.kind == kind:
            return hook
    kind = "z" if site.kind == "head" else site.kind
    names = [hook for hook, one in _IN_BLOCK.items() if one == kind and not hook.endswith(("_input", "_in"))]
    if kind in _AFTER_ROTATION:
        names = [hook for hook in names if (hook == _AFTER_ROTATION[kind]) == sizes.rotary]
    if not names or site.layer is None:
        raise SiteError(
            f"{site} has no hook in TransformerLens: those that have are {', '.join(sorted(set(_IN_BLOCK.values())))}"
        )
    return f"blocks.{_in(site.layer, sizes.layers, 'layer', str(site))}.{names[0]}"


def part_of(name: str, sizes: Sizes) -> Site:
    """`a9.h6` (or `a9.6`), `m9`, `input`, `logits` as a part.

    Raises:
        SiteError: another name, or a layer or head that the model has not.
    """
    if name in ("input", "logits"):
        return Site("embed" if name == "input" else "logits")
    if found := re.fullmatch(r"m(\d+)", name):
        return Site("mlp", _in(int(found[1]), sizes.layers, "layer", name))
    if found := re.fullmatch(r"a(\d+)\.h?(\d+)", name):
        return Site("head", _in(int(found[1]), sizes.layers, "layer", name), _in(int(found[2]), sizes.heads, "head", name))
    raise SiteError(f"{name!r} is no node: they are called input, a9.h6, m9 and logits")


def part_name(site: Site) -> str:
    """What a part is called there; raises `SiteError` where it is no head, MLP, embedding or logits."""
    if site.position is None and site.kind in ("embed", "logits"):
        return "input" if site.kind == "embed" else "logits"
    if site.position is None and site.kind == "mlp":
        return f"m{site.layer}"
    if site.position is None and site.kind == "head" and site.index is not None:
        return f"a{site.layer}.h{site.index}"
    raise SiteError(f"{site} has no name as a node: heads, MLPs, embed and logits have")


def edge_of(name: str, sizes: Sizes) -> Edge:
    """`a0.h1->a3.h2<k>` as an edge: into the key/value head that the query head reads.

    Raises:
        SiteError: another form; an edge that runs backwards; heads, layers or slots that there are not.
    """
    found = re.fullmatch(r"([^<>]+)->([^<>]+?)(?:<([qkv])>)?", name)
    if found is None:
        raise SiteError(f"{name!r} is no edge: they are written a0.h1->a3.h2<q>, a0.h1->m3 or m2->logits")
    source, target = part_of(found[1], sizes), part_of(found[2], sizes)
    if (target.kind == "head") != (found[3] is not None):
        raise SiteError(
            f"{name!r}: edges into heads, and no others, say whether they go to queries, keys or values: <q>, <k>, <v>"
        )
    if target.kind == "head":
        assert target.index is not None
        target = Site(found[3], target.layer, target.index if found[3] == "q" else target.index // sizes.group)
    _check_order(name, source, target, sizes)
    return Edge(source, target)


def edge_name(edge: Edge, sizes: Sizes) -> tuple[str, ...]:
    """What an edge is called there: one name, or for keys and values one for each query head that reads them."""
    target, source = edge.target, part_name(edge.source)
    if target.kind not in ("q", "k", "v"):
        return (f"{source}->{part_name(target)}",)
    if target.index is None or target.position is not None:
        raise SiteError(f"{edge} has no name there: it leads to no single head at all positions")
    heads = [target.index] if target.kind == "q" else range(target.index * sizes.group, (target.index + 1) * sizes.group)
    return tuple(f"{source}->a{target.layer}.h{head}<{target.kind}>" for head in heads)


def edge_names(sizes: Sizes) -> tuple[str, ...]:
    """Every edge of a model, by its name there."""
    before, names = ["input"], list[str]()
    for layer in range(sizes.layers):
        heads = [f"a{layer}.h{head}" for head in range(sizes.heads)]
        names += [f"{source}->{head}<{slot}>" for source in before for head in heads for slot in "qkv"]
        names += [f"{source}->m{layer}" for source in (before if sizes.parallel else [*before, *heads])]
        before += [*heads, f"m{layer}"]
    return (*names, *(f"{source}->logits" for source in before))


def _check_order(name: str, source: Site, target: Site, sizes: Sizes) -> None:
    early, late = source.layer, target.layer
    if source.kind == "logits" or target.kind == "embed":
        raise SiteError(f"{name!r} leads from the end or to the beginning")
    if early is None or late is None or early < late:
        return
    if early == late and source.kind == "head" and target.kind == "mlp" and not sizes.parallel:
        return
    raise SiteError(f"{name!r}: what the first writes is not in the stream that the second reads")


def _in(number: int, count: int, what: str, name: str) -> int:
    if number >= count:
        raise SiteError(f"{name!r} asks for {what} {number}, and there are {count}: 0 to {count - 1}")
    return number
