"""Where runs start: blocks that settings pass by, columns whose keys and values are known, and what nobody will look at."""

from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from patchclamp.models.anatomy import Anatomy
from patchclamp.models.held import HOLDER
from patchclamp.models.norms import held, scale_of
from patchclamp.models.stand_ins import STANDING, StandIn, replaceable
from patchclamp.models.tree import Level, Tree
from patchclamp.sites import Site

VOCABULARY = 8192
"""Tokens whose logits are held at once where the normaliser is streamed."""


@dataclass(frozen=True, eq=False)
class Start:
    """Where the settings of a run start, and what the model's own run holds there.

    With a tree, every block runs its level's runs and no others. A run that starts at block l gets what the model's own run
    gives to block l.

    Args:
        column: first column that runs.
        stop: the column behind the last that runs; None: all of them.
        tree: which runs there are at each block. None: all settings run everywhere.
        inputs: by block, and behind the last one: [row, position, width], the residual stream there in the model's own run.
        prefix: by block, keys and values [row, kv head, position, width] of every column.
        tuples: by block, how long a tuple it gives; 0 for a tensor.
        projected: by id of a module that makes queries, keys or values: its output in the model's own run.
        routed: by id of a router, what it gives in the model's own run (frozen routing); each [row x position, ...].
        divisor: what the final norm divides by in the model's own run (frozen norm) [row, position, 1]; None: what it would.
        changed: the one column at which runs that start are changed; None: any may be.
        fresh: by block, what that column holds in the runs that start there [run, row, width], where it is known.
        wanted: the columns that anything is asked of behind the last block; None: all of them.
        tokens: the tokens whose logits are computed, in this order; None: all of them.
        rest: whether one logit more stands behind those of `tokens`: the log-sum-exp of all others.
        logits: [target, vocabulary], of the model's own run at the batch's targets.
        width: how many columns the batch has.
        kept: by block, its output is put here: [run x row, column, width].
    """

    column: int = 0
    stop: int | None = None
    tree: Tree | None = None
    inputs: tuple[Tensor, ...] = ()
    prefix: tuple[tuple[Tensor, Tensor], ...] = ()
    tuples: tuple[int, ...] = ()
    projected: Mapping[int, Tensor] = field(default_factory=dict[int, Tensor])
    routed: Mapping[int, tuple[Tensor, ...]] = field(default_factory=dict[int, tuple[Tensor, ...]])
    divisor: Float[Tensor, "row position 1"] | None = None
    changed: int | None = None
    fresh: Mapping[int, Float[Tensor, "run row width"]] = field(default_factory=dict[int, Tensor])
    wanted: Int[Tensor, " column"] | None = None
    tokens: Int[Tensor, " token"] | None = None
    rest: bool = False
    logits: Float[Tensor, "target vocabulary"] | None = None
    width: int = 0
    kept: dict[int, Tensor] | None = None

    def behind(self, column: int, tree: Tree | None = None) -> "Start":
        """The same for runs of a tree (or of all settings everywhere) whose first column is `column`."""
        return replace(self, column=column, tree=tree, wanted=None if self.wanted is None else self.wanted - column)

    def settings_at(self, place: Site, settings: int) -> list[int]:
        """The settings that run where a place's value is computed."""
        if self.tree is None:
            return list(range(settings))
        if place.layer is None:
            level = self.tree.levels[0 if place.kind == "embed" else -1]
        else:
            level = self.tree.levels[place.layer + (place.kind == "resid.post")]
        missing = self.tree.widest - len(level)
        if missing and (place.kind == "embed" or (place.layer, place.kind) == (0, "resid.pre")):
            return [*level.settings, *[0] * missing]  # the model embeds as many rows as its widest block runs
        return list(level.settings)

    def copies(self, settings: int) -> int:
        """How many copies of the rows the model is called with."""
        return settings if self.tree is None else self.tree.widest

    def options(self, settings: int) -> dict[str, Any]:
        """What a forward call of `settings` copies of the rows needs beside its columns."""
        if not self.column:
            return {"use_cache": False}
        from patchclamp.models.prefix import shared_prefix

        # it keeps every column, also of sliding windows: masks do the rest
        counts = [settings] * len(self.prefix) if self.tree is None else [max(1, len(level)) for level in self.tree.levels]
        cache = shared_prefix([
            (keys[:, :, : self.column], values[:, :, : self.column], count)
            for (keys, values), count in zip(self.prefix, counts, strict=False)
        ])  # fmt: skip
        return {"use_cache": True, "past_key_values": cache}

    @contextmanager
    def standing(self, anatomy: Anatomy) -> Generator[None]:
        """While open, in this thread, the model computes what this start leaves to compute, and nothing else."""
        instead: dict[nn.Module, StandIn] = {}
        if self.tree is not None:
            instead |= {layer.block: partial(self._block, number) for number, layer in enumerate(anatomy.layers)}
            for number, layer in enumerate(anatomy.layers):
                level = self.tree.levels[number]
                spared = level.reads != tuple(range(len(level))) or (self.changed is not None and level.going < len(level))
                for module in projections(layer.attention, layer.output) if spared and self.projected else ():
                    instead[module] = partial(self._projection, level, id(module))
        routers = [layer.router for layer in anatomy.layers if layer.router is not None]
        instead |= {router: partial(self._router, self.routed[id(router)]) for router in routers if id(router) in self.routed}
        if self.divisor is not None:
            instead[anatomy.norm] = partial(self._norm, anatomy.norm, self.divisor)
        last = anatomy.layers[-1]
        if self.wanted is not None:
            instead |= dict.fromkeys([last.output] if last.output is last.mlp else [last.output, last.mlp], self._only_wanted)
        if self.tokens is not None:
            instead[anatomy.unembed] = partial(self._only_tokens, anatomy.unembed)
        with ExitStack() as stack:
            for module in instead:
                stack.enter_context(HOLDER.hold(("stand in", id(module)), partial(replaceable, module)))
            stack.callback(STANDING.reset, STANDING.set({id(module): one for module, one in instead.items()}))
            yield

    def _block(self, number: int, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        assert self.tree is not None
        here, value = self.tree.levels[number], args[0] if args else kwargs["hidden_states"]
        rows = len(self.inputs[0])
        output: Any = value[:0]
        if len(here):
            cut = partial(_leading, len(here) * rows, self.tree.widest * rows)
            output = own(*map(cut, args), **{name: cut(given) for name, given in kwargs.items()})
        done = output[0] if isinstance(output, tuple) else output
        if self.kept is not None:
            self.kept[number] = done
        above = self._above(number + 1, done)
        if isinstance(output, tuple):
            return (above, *output[1:])
        return (above, *[None] * (self.tuples[number] - 1)) if self.tuples[number] and not len(here) else above

    def _above(self, number: int, done: Tensor) -> Tensor:
        """The input of a block: what the runs of the block below have made, as often as they part; and what starts here."""
        assert self.tree is not None
        level, rows = self.tree.levels[number], len(self.inputs[0])
        going = level.going
        if level.parents[:going] != tuple(range(len(done) // rows)):
            parents = torch.tensor(level.parents[:going], dtype=torch.long, device=done.device)
            done = done.unflatten(0, (-1, rows)).index_select(0, parents).flatten(0, 1)
        if going == len(level):
            return done
        started = self.inputs[number][:, self.column : self.stop].expand(len(level) - going, -1, -1, -1)
        if number in self.fresh:
            assert self.changed is not None
            started = started.clone()
            started[:, :, self.changed - self.column] = self.fresh[number].to(started)
        return torch.cat([done, started.flatten(0, 1)]) if going else started.flatten(0, 1)

    def _projection(self, level: Level, name: int, own: Callable[..., Any], value: Tensor, *args: Any) -> Any:
        """A map of every column by itself, once for each input; runs that start get what the model's own run has there."""
        rows = len(self.inputs[0])
        if value.dim() != 3 or len(value) != len(level) * rows or name not in self.projected:
            return own(value, *args)
        one = range(level.going, len(level)) if self.changed is not None else range(0)
        whole = [run for run, read in enumerate(level.reads) if read == run and run not in one]
        narrow = [run for run in one if level.reads[run] == run]
        given = value.unflatten(0, (-1, rows))
        kept = self.projected[name][:, self.column : self.stop]
        out = kept.new_empty(len(level), *kept.shape) if len(whole) < len(level) else kept
        if any(read < 0 for read in level.reads) or narrow:
            out[level.going :] = kept
        if whole and whole == [run for run, read in enumerate(level.reads) if read in whole] == list(range(len(whole))):
            _into(out[: len(whole)], own, given[: len(whole)], args)
        elif whole:
            places = {run: place for place, run in enumerate(whole)}
            sharing = [run for run, read in enumerate(level.reads) if read in places]
            made = own(_runs(given, whole).flatten(0, 1), *args).unflatten(0, (-1, rows))
            _put(out, sharing, _runs(made, [places[level.reads[run]] for run in sharing]))
        if narrow:
            assert self.changed is not None
            at = self.changed - self.column
            sharing = [run for run in one if level.reads[run] >= 0]
            made = own(_runs(given, narrow)[:, :, at : at + 1].flatten(0, 1), *args).unflatten(0, (-1, rows))
            places = {run: place for place, run in enumerate(narrow)}
            out[sharing, :, at] = _runs(made, [places[level.reads[run]] for run in sharing])[:, :, 0]
        return out.flatten(0, 1)

    def _router(self, kept: tuple[Tensor, ...], _: Callable[..., Any], value: Tensor, *args: Any) -> tuple[Tensor, ...]:
        """What the router gives in the model's own run, for as many copies of the rows as run."""
        width = self.width
        columns = len(range(width)[self.column : self.stop])
        own = [one.unflatten(0, (-1, width))[:, self.column : self.stop] for one in kept]
        copies = value.flatten(0, -2).shape[0] // (len(own[0]) * columns)
        return tuple(one.expand(copies, *one.shape).flatten(0, 2) for one in own)

    def _norm(self, norm: nn.Module, divisor: Tensor, own: Callable[..., Any], value: Tensor) -> Tensor:
        """The final norm, which divides by what it divides by in the model's own run."""
        if not value.numel():
            return own(value)
        kept = divisor[:, self.column : self.stop].repeat(len(value) // len(divisor), 1, 1)
        return held(own, scale_of(norm, value.shape[-1]), value, kept)

    def _only_wanted(self, own: Callable[..., Any], value: Tensor, *args: Any, **kwargs: Any) -> Any:
        """A module that treats every position by itself, run at the wanted columns; zero elsewhere."""
        assert self.wanted is not None
        if value.dim() != 3:
            return own(value, *args, **kwargs)
        some = own(value[:, self.wanted], *args, **kwargs)
        return some.new_zeros(*value.shape[:2], some.shape[-1]).index_copy(1, self.wanted, some)

    def _only_tokens(self, module: Any, _: Callable[..., Any], value: Tensor) -> Tensor:
        assert self.tokens is not None
        bias = None if module.bias is None else module.bias[self.tokens]
        asked = nn.functional.linear(value, module.weight[self.tokens], bias)
        if not self.rest:
            return asked
        rest = rest_of(module, value, self.tokens)
        return torch.cat([asked.to(rest.dtype), rest], -1)


def rest_of(unembed: Any, value: Float[Tensor, "*row width"], tokens: Int[Tensor, " token"]) -> Float[Tensor, "*row 1"]:
    """log sum exp of the logits of all but `tokens`, the vocabulary in blocks; float32 or wider."""
    total: Tensor | None = None
    for start in range(0, len(unembed.weight), VOCABULARY):
        stop = min(start + VOCABULARY, len(unembed.weight))
        bias = None if unembed.bias is None else unembed.bias[start:stop]
        logits = nn.functional.linear(value, unembed.weight[start:stop], bias)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        inside = tokens[(tokens >= start) & (tokens < stop)] - start
        part = logits.index_fill(-1, inside, -torch.inf).logsumexp(-1, keepdim=True)
        total = part if total is None else torch.logaddexp(total, part)
    assert total is not None
    return total


def projections(attention: nn.Module, output: nn.Module) -> list[nn.Module]:
    """The linear maps that make queries, keys and values: those of the attention module, but for its output projection's."""
    behind = set(output.modules())
    return [one for one in attention.modules() if type(one).__name__ in ("Linear", "Conv1D") and one not in behind]


def why_whole_vocabulary(anatomy: Anatomy) -> str:
    """Why the logits of some tokens cannot be computed alone, or nothing where they can."""
    unembed = anatomy.unembed
    if type(unembed) is not nn.Linear:
        return f"the unembedding is a {type(unembed).__name__}"
    if "_hf_hook" in vars(unembed):
        return "accelerate moves the unembedding"
    return ""


def why_every_column(anatomy: Anatomy) -> str:
    """Why the last block's MLP and output projection run at every column, or nothing where they need not."""
    if anatomy.family.flat_mlp or anatomy.layers[-1].router is not None:
        return "its MLP sees rows and columns as one"
    return ""


def _runs(value: Tensor, runs: list[int]) -> Tensor:
    """Some runs of a value; a view where they stand side by side."""
    if runs == list(range(runs[0], runs[0] + len(runs))):
        return value[runs[0] : runs[0] + len(runs)]
    return value[torch.tensor(runs, device=value.device)]


def _into(out: Tensor, own: Callable[..., Any], value: Tensor, args: tuple[Any, ...]) -> None:
    """A linear map's output written where it belongs, without a copy where the map is the library's own."""
    module: Any = getattr(own, "__self__", None)
    theirs = type(module).__module__.startswith(("torch.nn", "transformers.pytorch_utils"))
    untouched = theirs and getattr(own, "__func__", None) is type(module).forward
    if args or torch.is_grad_enabled() or not untouched or value.dtype != module.weight.dtype:
        out.copy_(own(value.flatten(0, 1), *args).view_as(out))
        return
    weight = module.weight.T if type(module) is nn.Linear else module.weight
    rows, flat = value.reshape(-1, value.shape[-1]), out.view(-1, out.shape[-1])
    if module.bias is None:
        torch.mm(rows, weight, out=flat)
    else:
        torch.addmm(module.bias, rows, weight, out=flat)


def _put(out: Tensor, runs: list[int], value: Tensor) -> None:
    if runs == list(range(runs[0], runs[0] + len(runs))):
        out[runs[0] : runs[0] + len(runs)] = value
    else:
        out[torch.tensor(runs, device=out.device)] = value


def _leading(rows: int, total: int, given: Any) -> Any:
    """The leading rows of whatever has all rows: a mask, rotary embeddings, position ids, a bias by row and head."""
    if isinstance(given, tuple | list):
        return type(given)(_leading(rows, total, one) for one in given)
    if not isinstance(given, Tensor) or given.dim() < 2 or len(given) < total or len(given) % total:
        return given
    return given[: rows * (len(given) // total)]
