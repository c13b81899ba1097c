"""Finding sites: all that a model has, and those that patterns name."""

from collections.abc import Iterable, Sequence

from patchclamp.models.anatomy import Anatomy
from patchclamp.sites import KINDS, PER_HEAD, PER_KV, Site, select


def every_site(anatomy: Anatomy) -> tuple[Site, ...]:
    """Whole layers and single heads (neurons and experts as whole layers), in forward order."""
    found = [Site(kind) for kind in ("embed", "final", "logits")]
    for layer, sizes in enumerate(anatomy.sizes):
        for kind in KINDS:
            site = Site(kind, layer)
            if kind in ("embed", "final", "logits") or anatomy.why_not(site):
                continue
            if kind not in ("head", "write"):
                found.append(site)
            count = sizes.heads if kind == "head" or kind in PER_HEAD else sizes.kv_heads if kind in PER_KV else 0
            found += [Site(kind, layer, index) for index in range(count)]
    return tuple(sorted(found))


def named(anatomy: Anatomy, known: Sequence[Site], sites: str | Site | Iterable[str | Site]) -> tuple[Site, ...]:
    """Those that patterns name among `known`, and those that are named in full; `SiteError` where the model has none."""
    given = [sites] if isinstance(sites, str | Site) else list(sites)
    found: list[Site] = []
    for item in given:
        if isinstance(item, str) and ("*" in item or "-" in item.partition(".")[0]):
            body, at, where = item.partition("@")
            chosen = select(body, known)
            found += [site.at(Site.parse(f"embed@{where}").position) for site in chosen] if at else chosen
        else:
            site = Site.parse(item) if isinstance(item, str) else item
            anatomy.require(site)
            found.append(site)
    return tuple(sorted(set(found)))
