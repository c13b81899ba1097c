"""Write compiled programs as folders that `Model.load` reads: config, weights, tokenizer, README.

    python -m patchclamp.zoo.compiled.ship --out src/patchclamp/zoo

Weights are multiples of 1/8, so they are stored in float32 and loaded as the float64 that the configuration names.
"""

import argparse
import json
from pathlib import Path

from patchclamp.zoo.compiled import Compiled, build, program_names
from patchclamp.zoo.compiled.layout import lay_out
from patchclamp.zoo.compiled.rasp import inputs_of


def ship(one: Compiled, folder: Path) -> None:
    """Write one program's folder."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = {key: value for key, value in one.hf.config.to_diff_dict().items() if not key.startswith("_")}
    config |= {"architectures": ["NormlessForCausalLM"], "dtype": "float64"}
    config.pop("transformers_version", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    state = {name: value.float().contiguous() for name, value in one.hf.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    one.tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(describe(one), encoding="utf-8")


def describe(one: Compiled) -> str:
    """The README: what is computed where, and which edges are real."""
    plan, truth, config = lay_out(one.program), one.truth, one.hf.config
    made = {variable: f"L{layer}.h{number}" for layer, row in enumerate(plan.heads) for number, variable in enumerate(row)}
    made |= {variable: f"L{layer}.mlp" for layer, row in enumerate(plan.mlps) for variable in row}
    lines = [
        f"| {plan.names[variable]} | {made.get(variable, 'embed')} | {', '.join(plan.names[other] for other in inputs_of(variable))} |"
        for variable in plan.variables
    ]
    shown = ", ".join(f"`{edge}`" for edge in truth.edges if edge in truth.zero)
    alive = ", ".join(f"`{edge}`" for edge in truth.edges if edge in truth.resample)
    return README.format(
        name=one.program.name, about=one.program.about, layers=config.num_hidden_layers, heads=config.num_attention_heads,
        width=config.hidden_size, longest=one.program.longest, tokens=" ".join(one.program.alphabet), table="\n".join(lines),
        edges=len(truth.edges), structural=len(truth.structural), zero=len(truth.zero), resample=len(truth.resample),
        shown=shown, alive=alive,
    )  # fmt: skip


README = """# zoo/{name}

A compiled program: {about}. Layers: {layers}, heads in each: {heads}, width {width}, no norms; attention looks both ways. Inputs are
up to {longest} of the tokens {tokens}, with blanks between them; `<bos>` goes before. The output is read at every position.
Task: `zoo/{name}`.

| variable | made in | of |
|---|---|---|
{table}

Of its {edges} edges {structural} carry something that is read. Closed alone, {zero} of these change an output under zero, and
{resample} under resample, on pairs of the task:

- zero: {shown}
- resample: {alive}

Made by `python -m patchclamp.zoo.compiled.ship`; docs/ground_truth.md says what these sets mean.
"""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write every compiled program as a folder.")
    parser.add_argument("--out", type=Path, required=True, help="where the folders go")
    out = parser.parse_args().out
    for name in program_names():
        ship(build(name), out / name)


if __name__ == "__main__":
    main()
