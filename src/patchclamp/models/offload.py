"""Weights of models that do not fit their device: accelerate keeps them elsewhere (in memory, on disk) and brings them when needed."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from patchclamp.errors import ModelError


def stored(hf: nn.Module) -> tuple[dict[str, Tensor], Callable[[str], Tensor]]:
    """The model's weights by name, tied ones once, and what loads the values of one that is elsewhere (on `meta`).

    Nothing is loaded here: one weight at a time can be, so that a model that does not fit in memory can be read through.
    """
    state: dict[str, Tensor] = hf.state_dict()
    alike = _tied(hf, state)
    kept = {name: value for name, value in state.items() if name == min(alike.get(name, {name}))}

    def load(name: str) -> Tensor:
        for one in sorted(alike.get(name, {name}), key=lambda other: other != name):
            prefix, _, leaf = one.rpartition(".")
            if not state[one].is_meta:
                return state[one]
            weights = _elsewhere(hf.get_submodule(prefix))
            if weights is not None and leaf in weights:
                return weights[leaf].to(state[one].dtype)
        raise ModelError(
            f"the weight {name} is on the device meta, and nothing says where its values are: load the model with them"
        )

    return kept, load


def _tied(hf: nn.Module, state: Mapping[str, Tensor]) -> dict[str, set[str]]:
    """Name -> all the names of the same weight."""
    keys: Any = getattr(hf, "all_tied_weights_keys", None) or {}
    groups: dict[str, set[str]] = {}
    for target, source in dict(keys).items():
        if target in state and source in state:
            group = groups.get(target, {target}) | groups.get(source, {source})
            groups |= dict.fromkeys(group, group)
    return groups


def _elsewhere(module: nn.Module) -> Any:
    """Where the hook that accelerate put on a module (or one of its hooks) brings the weights from, by their names in the module."""
    hook: Any = getattr(module, "_hf_hook", None)
    found = (getattr(one, "weights_map", None) for one in getattr(hook, "hooks", (hook,)))
    return next((weights for weights in found if weights is not None), None)
