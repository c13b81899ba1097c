"""Commands that look into a model: doctor, sites, record, generate."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from patchclamp.cli import common
from patchclamp.cli.change import FallbackOf, Keep, Scale, circuit_of, opened, scales_of
from patchclamp.cli.common import Device, DeviceMap, Dtype, Json, ModelArgument, Revision, Tokenizer, Trust
from patchclamp.errors import PatchclampError

Prompts = Annotated[list[str], typer.Argument(help="Prompts, or one JSONL file of rows with 'clean'.", show_default=False)]
Sites = Annotated[
    list[str], typer.Option("--site", "-s", help="Sites or patterns: L3.resid.post, L*.h*.pattern. May be repeated.")
]
Edit = Annotated[
    list[str] | None, typer.Option("--edit", "-e", help="SITE=zero, SITE=scale:0.5, SITE=clamp:-1,1. May be repeated.")
]


def add(app: typer.Typer) -> None:
    """Put the commands on the app."""
    app.command("doctor")(doctor)
    app.command("sites")(sites)
    app.command("record")(record)
    app.command("generate")(generate)


def doctor(
    model: ModelArgument, dtype: Dtype = None, device: Device = None, device_map: DeviceMap = None, revision: Revision = None,
    tokenizer: Tokenizer = None, trust_remote_code: Trust = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Prove a model's anatomy: every invariant with what was measured. Leaves with 1 where one fails."""
    from patchclamp.models.doctor import examine

    loaded = common.load_model(model, dtype, device, device_map, revision, tokenizer, trust_remote_code)
    diagnosis = examine(loaded)
    if as_json:
        common.print_json({"model": model, "passed": diagnosis.passed, "invariants": diagnosis.rows()})
    else:
        common.out.print(Text(repr(loaded)))
        common.print_rows(diagnosis.rows())
        common.out.print(Text("sound" if diagnosis.passed else "NOT SOUND: results on this model cannot be trusted",
                              style="green" if diagnosis.passed else "bold red"))  # fmt: skip
    if not diagnosis.passed:
        raise typer.Exit(1)


def sites(
    model: ModelArgument, dtype: Dtype = None, device: Device = None, device_map: DeviceMap = None, revision: Revision = None,
    tokenizer: Tokenizer = None, trust_remote_code: Trust = False, as_json: Json = False,
) -> None:  # fmt: skip
    """List a model's sites: axes with sizes, whether they can be written, how they are read, why they are absent."""
    loaded = common.load_model(model, dtype, device, device_map, revision, tokenizer, trust_remote_code)
    rows = loaded.describe_sites()
    if as_json:
        common.print_json(rows)
    else:
        common.out.print(Text(repr(loaded)))
        common.print_rows(rows)


def record(
    model: ModelArgument, prompts: Prompts, site: Sites, out: Annotated[Path, typer.Option("--out", help="A *.safetensors file.")],
    edit: Edit = None, dtype: Dtype = None, device: Device = None, device_map: DeviceMap = None, revision: Revision = None,
    tokenizer: Tokenizer = None, trust_remote_code: Trust = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Record values at sites on prompts into a safetensors file (keys are sites; tokens and mask beside them)."""
    if out.suffix != ".safetensors":
        raise PatchclampError(f"--out {out} was given: values are written as safetensors, so name a file like values.safetensors")
    from patchclamp.store.tensors import save_tensors

    loaded = common.load_model(model, dtype, device, device_map, revision, tokenizer, trust_remote_code)
    batch = loaded.encode(_prompts(prompts))
    values = loaded.record(batch, site, _edits(edit))
    body = {str(place): value.contiguous() for place, value in values.items()}
    save_tensors(out, {**body, "tokens": batch.tokens, "mask": batch.mask}, {"model": model})
    rows = [
        {"site": name, "shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        for name, value in body.items()
    ]
    if as_json:
        common.print_json({"file": str(out), "sites": rows})
    else:
        common.print_rows(rows)
        common.out.print(Text(str(out)))


def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL|RUN", help="A hub name, a folder, zoo/NAME; or the folder of a run.", show_default=False)],
    prompts: Prompts, edit: Edit = None, keep: Keep = None, scale: Scale = None, fallback: FallbackOf = None,
    dynamic: Annotated[bool, typer.Option("--dynamic", help="With the gates of a RUN of `gate --dynamic`, on every prompt anew.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="How many tokens at most.")] = 20,
    temperature: Annotated[float, typer.Option(help="0: the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    dtype: Dtype = None, device: Device = None, device_map: DeviceMap = None, revision: Revision = None, tokenizer: Tokenizer = None,
    trust_remote_code: Trust = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Continue prompts, with edits and gates on: during the prompt and every new token."""
    edits, fit, run = _edits(edit), None, common.run_folder(model)
    loading = {"dtype": dtype, "device": device, "device-map": device_map, "revision": revision, "tokenizer": tokenizer,
               "trust-remote-code": trust_remote_code or None}  # fmt: skip
    if run is not None:
        for name, given in loading.items():
            common.refuse_both(given, f"--{name}")
        loaded, _, fit, _ = opened(run)
    else:
        loaded = common.load_model(model, dtype, device, device_map, revision, tokenizer, trust_remote_code)
    if keep == "circuit" and run is None:
        raise PatchclampError(
            f"--keep circuit is the circuit of a run, and {model} is no run's folder: name the run, or a circuit's file"
        )
    scales = scales_of(scale)
    if keep is not None or scales:
        from patchclamp.study.apply import asked

        want = asked(loaded, fit, circuit_of(keep, run or Path(model)), scales, fallback)
        for site, made in want.parts.edits(want.gates, want.fallback).items():
            edits.setdefault(site, []).append(made)
    texts = _prompts(prompts)
    if dynamic:
        if run is None:
            raise PatchclampError(
                f"--dynamic runs the gates that a run has learned, and {model} is no run's folder: name the run of `gate --dynamic`"
            )
        from patchclamp.parts import nodes
        from patchclamp.store import load_step

        parts, kind = nodes(loaded), fallback or "mean"
        rule = parts.fallback("mean:all" if kind == "mean" else kind, fit=fit)
        for site, driven in load_step(run, "controller").edits(parts, rule, loaded.encode(texts)).items():
            edits.setdefault(site, []).append(driven)
    made = loaded.generate(texts, edits, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    if as_json:
        common.print_json([{"prompt": prompt, "text": text} for prompt, text in zip(texts, made.texts, strict=True)])
        return
    for prompt, text in zip(texts, made.texts, strict=True):
        common.out.print(Text.assemble(prompt, (text, "bold")))


def _prompts(given: list[str]) -> list[str]:
    if len(given) == 1 and given[0].endswith((".jsonl", ".txt")):
        import json

        if not Path(given[0]).is_file():
            raise PatchclampError(f"there is no file {given[0]}: give prompts, or a file of them")
        lines = [line for line in Path(given[0]).read_text().splitlines() if line.strip()]
        if given[0].endswith(".txt"):
            return lines
        return [str(json.loads(line)["clean"]) for line in lines]
    if not all(given):
        raise PatchclampError("a prompt is empty: give text to run")
    return given


def _edits(given: list[str] | None) -> dict[Any, Any]:
    from patchclamp.edits import Clamp, Scale, Zero
    from patchclamp.sites import Site

    made: dict[Any, Any] = {}
    for text in given or ():
        where, equals, what = text.partition("=")
        name, _, rest = what.partition(":")
        try:
            numbers = [float(number) for number in rest.split(",")] if rest else []
            edit = {"zero": Zero, "scale": Scale, "clamp": Clamp}[name](*numbers)
        except (KeyError, ValueError, TypeError):
            raise PatchclampError(
                f"--edit {text!r} is not understood: write SITE=zero, SITE=scale:0.5 or SITE=clamp:-1,1"
            ) from None
        if not equals:
            raise PatchclampError(f"--edit {text!r} names no edit: write SITE=zero, SITE=scale:0.5 or SITE=clamp:-1,1")
        made.setdefault(Site.parse(where), []).append(edit)
    return made
