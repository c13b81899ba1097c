"""Which weights are a part's: a head's rows and columns, a neuron's, an expert's, a module's."""

from collections.abc import Generator, Iterable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor, nn

from patchclamp.errors import TrainingError
from patchclamp.models.model import Model
from patchclamp.sites import Site, select

NO_WEIGHTS = (
    "weights are held by heads (L0.h2), single projections of them (L0.h2.q, L0.kv1.k, L0.kv1.v, L0.h2.write), key/value heads (L0.kv1), "
    "attention (L0.attn), MLPs (L0.mlp), neurons (L0.mlp.n5), experts (L0.mlp.e3), routers (L0.router), blocks (L0.block), embed, "
    "final and logits"
)


@dataclass(frozen=True, eq=False)
class Slice:
    """Some rows (or columns) of one parameter.

    Args:
        name: of the parameter in the model.
        parameter: the parameter itself.
        axis: which axis `index` counts.
        index: which entries of that axis; None: the whole parameter.
    """

    name: str
    parameter: nn.Parameter
    axis: int = 0
    index: Int[Tensor, " entry"] | None = None

    def of(self, value: Tensor) -> Tensor:
        """A copy of what this slice has of a tensor shaped like the parameter."""
        return value.detach().clone() if self.index is None else value.detach().index_select(self.axis, self.index)

    def put(self, into: Tensor, value: Tensor) -> None:
        """Write this slice of a tensor shaped like the parameter, in place."""
        if self.index is None:
            into.copy_(value)
        else:
            into.index_copy_(self.axis, self.index, value.to(into))


_KNOWN: "WeakKeyDictionary[Model, dict[tuple[str, ...], tuple[Slice, ...]]]" = WeakKeyDictionary()


def slices(model: Model, parts: tuple[str, ...]) -> tuple[Slice, ...]:
    """The weights of parts; of a head: its rows of the query projection, its key/value head's of key and value projections
    (which under grouped-query attention it shares with the heads of its group), its columns of the output projection, its sink,
    and its entries of norms that do not serve all heads alike. Biases that heads share (the output's) are no head's.

    Cost: looked up once per model and parts; for heads three forward and backward passes of ten tokens each.

    Raises:
        SiteError: the model has no such part.
        TrainingError: the part has no weights of its own, or an adapter mixes them with others'.
    """
    known = _KNOWN.setdefault(model, {})
    if parts not in known:
        found: dict[tuple[int, int], Slice] = {}
        for site in _sites(model, parts):
            for piece in _of_site(model, site):
                before = found.get((id(piece.parameter), piece.axis))
                found[id(piece.parameter), piece.axis] = piece if before is None else _joined(before, piece)
        known[parts] = tuple(found.values())
    return known[parts]


def _joined(one: Slice, two: Slice) -> Slice:
    if one.index is None or two.index is None:
        return Slice(one.name, one.parameter)
    return Slice(one.name, one.parameter, one.axis, torch.cat([one.index, two.index]).unique())


def _sites(model: Model, parts: Iterable[str]) -> tuple[Site, ...]:
    groups = [Site("block", layer) for layer in range(model.layers)]
    groups += [Site("kv", layer, head) for layer, sizes in enumerate(model.anatomy.sizes) for head in range(sizes.kv_heads)]
    found: list[Site] = []
    for part in parts:
        if "*" in part or "-" in part.partition(".")[0]:
            found += select(part, (*model.sites, *groups))
        elif (site := Site.parse(part)) in groups:
            found.append(site)
        else:
            model.anatomy.require(site)
            found.append(site)
    return tuple(sorted(set(found)))


def _of_site(model: Model, site: Site) -> list[Slice]:
    """The weights of one part."""
    anatomy, kind = model.anatomy, site.kind
    if site.position is not None or site.feature is not None or site.sub is not None:
        raise TrainingError(f"{site} has no weights of its own: {NO_WEIGHTS}")
    if site.layer is None:
        blocks = {id(p) for layer in anatomy.layers for p in layer.block.parameters()}
        ends = {id(p) for module in (anatomy.norm, anatomy.unembed) for p in module.parameters()}
        tokens = {id(p) for p in model.hf.get_input_embeddings().parameters()}
        wanted = {
            "embed": {id(p) for p in anatomy.hf.parameters()} - blocks - (ends - tokens),
            "final": {id(p) for p in anatomy.norm.parameters()},
            "logits": {id(p) for p in anatomy.unembed.parameters()},
        }[kind]
        return _whole(model, wanted)
    layer, sizes = anatomy.layers[site.layer], anatomy.sizes[site.layer]
    attention = {id(p) for p in (*layer.attention.parameters(), *layer.output.parameters())}
    if kind == "block":
        return _whole(model, {id(p) for p in layer.block.parameters()})
    if kind == "attn":
        return _whole(model, attention)
    if kind == "mlp" or (kind == "neuron" and site.index is None):
        norms = {id(p) for m in layer.block.modules() if _is_norm(m) for p in m.parameters()}
        return _whole(model, {id(p) for p in layer.block.parameters()} - attention - norms)
    if kind == "router" and layer.router is not None:
        return _whole(model, {id(p) for p in layer.router.parameters()})
    if kind in ("neuron", "expert") and site.index is not None:
        return _neuron(model, site) if kind == "neuron" else _expert(model, site)
    heads = sizes.kv_heads if kind in ("k", "v", "kv") else sizes.heads
    if kind in ("head", "q", "k", "v", "kv", "write"):
        numbers = range(heads) if site.index is None else [site.index]
        return [piece for number in numbers for piece in _head(model, site.layer, kind, number)]
    raise TrainingError(f"{site} has no weights of its own: {NO_WEIGHTS}")


def _whole(model: Model, wanted: set[int]) -> list[Slice]:
    return [Slice(name, p) for name, p in model.anatomy.hf.named_parameters() if id(p) in wanted]


def _head(model: Model, layer: int, kind: str, number: int) -> list[Slice]:
    """What one head (or one of its projections) has of its layer's attention."""
    here, sizes = model.anatomy.layers[layer], model.anatomy.sizes[layer]
    _no_adapters(here.attention, f"L{layer}.{kind}{number}")
    group = number // (sizes.heads // sizes.kv_heads)
    found: list[Slice] = []
    if kind in ("head", "q"):
        found += _rows(model, layer, "q", number)
    for one in ("k", "v"):
        if kind in ("head", "kv", one):
            found += _rows(model, layer, one, group if kind == "head" else number)
    if kind in ("head", "write"):
        columns = torch.arange(number * sizes.head_width, (number + 1) * sizes.head_width, device=model.device)
        weight: Any = here.output.weight
        found.append(_slice(model, weight, 1 - _out_axis(here.output), columns))
    sinks: Any = getattr(here.attention, "sinks", None)
    if kind == "head" and isinstance(sinks, nn.Parameter):
        found.append(_slice(model, sinks, 0, torch.tensor([number], device=model.device)))
    gate: Any = getattr(here.attention, "gate", None)
    if kind == "head" and isinstance(gate, nn.Linear):
        own: tuple[Any, ...] = (gate.weight, gate.bias)
        found += [_slice(model, one, 0, torch.tensor([number], device=model.device)) for one in own]
    return found


def _rows(model: Model, layer: int, kind: str, number: int) -> list[Slice]:
    """The entries of the attention's weights that one head's queries, keys or values come from.

    Found by gradients, so that fused and interleaved projections need no rule of their own: a row of a projection belongs to a
    head where the head changes with it. Norms inside attention stand aside meanwhile (some mix heads); their own weights are a
    head's where they have an entry per head.
    """
    here, sizes = model.anatomy.layers[layer], model.anatomy.sizes[layer]
    norms = [m for m in here.attention.modules() if _is_norm(m)]
    apart = {id(p) for m in (*norms, here.output) for p in m.parameters()}
    weights = [p for p in here.attention.parameters() if id(p) not in apart and p.is_floating_point()]
    axes = {id(m.weight): _out_axis(m) for m in here.attention.modules() if isinstance(getattr(m, "weight", None), nn.Parameter)}
    found: list[Slice] = []
    for weight, gradient in zip(weights, _slopes(model, Site(kind, layer), number, weights, norms), strict=True):
        axis = axes.get(id(weight), 0)
        if gradient is not None and bool((gradient != 0).any()):
            outputs = (gradient != 0).movedim(axis, 0).reshape(gradient.shape[axis], -1).any(1)
            found.append(_slice(model, weight, axis, outputs.nonzero()[:, 0]))
    if not found:
        raise TrainingError(f"no weight of L{layer} was found that its {kind} {number} comes from: hold L{layer}.attn as a whole")
    count = sizes.heads if kind == "q" else sizes.kv_heads
    for name, module in here.attention.named_modules():
        weight: Any = getattr(module, "weight", None)
        if module not in norms or weight is None or not name.rpartition(".")[2].startswith((f"{kind}_", f"{kind}norm")):
            continue
        if len(weight) == count * sizes.head_width and weight.dim() == 1:
            entries = torch.arange(number * sizes.head_width, (number + 1) * sizes.head_width, device=weight.device)
            found += [_slice(model, p, 0, entries) for p in module.parameters()]
        elif weight.dim() == 2 and len(weight) == count:
            found += [_slice(model, p, 0, torch.tensor([number], device=weight.device)) for p in module.parameters()]
    return found


def _slopes(
    model: Model, site: Site, number: int, weights: list[nn.Parameter], norms: list[nn.Module]
) -> tuple[Tensor | None, ...]:
    """Gradients of one head's value at a site, along a random direction, in the weights of its layer's attention."""
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, int(model.hf.get_input_embeddings().weight.shape[0]), (2, 5), generator=draw)
    with _asking(weights), _aside(norms), torch.enable_grad():
        value = model.record(tokens, site, grad=True)[site]
        along = torch.zeros(value.shape)
        along[:, :, number] = 1 + torch.rand(along[:, :, number].shape, generator=draw)
        return torch.autograd.grad(value, weights, along.to(value), allow_unused=True)


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and not any(module.children())


@contextmanager
def _asking(weights: list[nn.Parameter]) -> Generator[None]:
    """While open, these weights require gradients."""
    before = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for weight, asked in zip(weights, before, strict=True):
            weight.requires_grad_(asked)


@contextmanager
def _aside(modules: list[nn.Module]) -> Generator[None]:
    """While open, these modules give back what they are given."""

    def same(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return args[0]

    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(same).remove)
        yield


def _neuron(model: Model, site: Site) -> list[Slice]:
    """A neuron's rows of the projections into the MLP's hidden layer, and its column of the one out of it."""
    layer, number = model.anatomy.layers[site.layer or 0], site.index
    neurons = model.anatomy.sizes[site.layer or 0].neurons
    if layer.router is not None or layer.down is None or neurons is None or number is None:
        raise TrainingError(
            f"{site}: experts keep their neurons in fused parameters; name an expert (L0.mlp.e3) or the whole MLP"
        )
    inside = {id(p) for p in (s.parameter for s in _of_site(model, Site("mlp", site.layer)))}
    modules = [m for m in layer.block.modules() if id(getattr(m, "weight", None)) in inside]
    found: list[Slice] = []
    for module in modules:
        _no_adapters(module, str(site))
        axis = _out_axis(module)
        weight: Any = module.weight
        bias: Any = getattr(module, "bias", None)
        if module is layer.down:
            found.append(_slice(model, weight, 1 - axis, torch.tensor([number], device=weight.device)))
        elif weight.shape[axis] % neurons == 0:  # gate and up may be one matrix
            rows = torch.arange(number, weight.shape[axis], neurons, device=weight.device)
            found += [_slice(model, weight, axis, rows)] + ([] if bias is None else [_slice(model, bias, 0, rows)])
    return found


def _expert(model: Model, site: Site) -> list[Slice]:
    """An expert's share of the layer's fused parameters, or its own modules; the router's row is not the expert's."""
    layer, experts = model.anatomy.layers[site.layer or 0], model.anatomy.sizes[site.layer or 0].experts
    assert site.index is not None and layer.router is not None
    routing = {id(p) for p in layer.router.parameters()}
    own: list[Slice] = []
    for path, parameter in layer.mlp.named_parameters():
        if id(parameter) in routing:
            continue
        if f"experts.{site.index}." in f"{path}.":
            own.append(_slice(model, parameter, 0, None))
        elif "experts" in path and parameter.shape[0] == experts:
            own.append(_slice(model, parameter, 0, torch.tensor([site.index], device=parameter.device)))
    if not own:
        raise TrainingError(
            f"{site}: no parameters of single experts were found in {type(layer.mlp).__name__}; name the whole MLP"
        )
    return own


def _slice(model: Model, parameter: nn.Parameter, axis: int, index: Tensor | None) -> Slice:
    name = next((name for name, p in model.anatomy.hf.named_parameters() if p is parameter), "?")
    return Slice(name, parameter, axis, index)


def _out_axis(module: nn.Module) -> int:
    """The axis of a projection's weight that counts its outputs."""
    return 1 if type(module).__name__ == "Conv1D" else 0


def _no_adapters(module: nn.Module, name: str) -> None:
    if any("lora_" in path for path, _ in module.named_parameters()):
        raise TrainingError(
            f"{name} is adapted (LoRA), and the adapter's first matrix serves all heads: hold the whole (L0.attn, L0.mlp) instead"
        )
