"""Model: a transformers causal language model with its tokenizer and its anatomy. Run it, record sites, edit them, generate."""

import os
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchclamp.errors import NumericsError
from patchclamp.models.anatomy import Anatomy, input_device
from patchclamp.models.editing import Edits, Pass, Stretch, visitors
from patchclamp.models.finding import every_site, named
from patchclamp.models.sampling import Generation
from patchclamp.models.scope import still
from patchclamp.models.session import Session
from patchclamp.models.standing import Start
from patchclamp.sites import Site
from patchclamp.tasks._batch import Batch

Inputs = Batch | str | Sequence[str] | Int[Tensor, "row position"]


@dataclass(frozen=True, eq=False)
class Model:
    """A causal language model as Patchclamp sees it. The transformers model itself (`hf`) is left as it was found.

    Make one with `Model.load`.
    """

    hf: Any
    tokenizer: Any
    anatomy: Anatomy
    name: str
    revision: str | None = None
    loaded: bool = False
    """Whether the weights are those of the files they came from (a model object may have been changed since)."""

    @classmethod
    def load(
        cls,
        source: Any,
        *,
        tokenizer: Any = None,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        device_map: Any = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        quantization_config: Any = None,
    ) -> "Model":
        """Load a model and prove that every attention layer can be observed.

        Args:
            source: a hub name, a folder, `zoo/NAME` (shipped with Patchclamp), or a transformers model object (LoRA-adapted and
                quantised ones too), which is used as it is.
            tokenizer: a tokenizer, or where to load it from; by default the one beside the model.
            dtype: "float32", "bfloat16", ...; by default the checkpoint's own.
            device: where to put the model; by default CUDA where there is one. A model object stays where it is.
            device_map: accelerate's, for models larger than one device.
            revision: branch, tag or commit on the hub (Pythia's "step1000").
            trust_remote_code: run code from the model's repository. Never unless you say so.
            quantization_config: passed to transformers.

        Raises:
            ModelError: not found, or not loadable as asked.
            FamilyError: an architecture that is not understood, with what failed.
        """
        from patchclamp.models.load import load

        hf, tok, name = load(
            source, tokenizer=tokenizer, dtype=dtype, device=device, device_map=device_map, revision=revision,
            trust_remote_code=trust_remote_code, quantization_config=quantization_config,
        )  # fmt: skip
        from patchclamp.models.probe import probed

        return cls(hf, tok, probed(hf), name, revision, loaded=isinstance(source, str | os.PathLike))

    def __repr__(self) -> str:
        sizes = self.anatomy.sizes
        heads = sorted({size.heads for size in sizes})
        return (
            f"Model({self.name!r}, {self.family.name}: {len(sizes)} layers x {'/'.join(map(str, heads))} heads, "
            f"width {self.width}, {self.parameters / 1e6:.2f} M parameters, {self.dtype}, {self.device})"
        )

    @property
    def family(self) -> Any:
        """The row of `models.families.FAMILIES` that serves this model."""
        return self.anatomy.family

    @property
    def layers(self) -> int:
        """Number of blocks."""
        return len(self.anatomy.layers)

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return input_device(self.anatomy.hf)

    @property
    def dtype(self) -> torch.dtype:
        """Of the residual stream."""
        return cast(torch.dtype, self.hf.dtype)

    @cached_property
    def width(self) -> int:
        """Width of the residual stream."""
        return int(self.anatomy.config.hidden_size)

    @cached_property
    def parameters(self) -> int:
        """Number of parameters, tied ones once."""
        return sum(p.numel() for p in self.hf.parameters())

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """Every site this model has, whole layers and single heads (neurons and experts as whole layers), in forward order."""
        return every_site(self.anatomy)

    def describe_sites(self) -> list[dict[str, str | bool]]:
        """What `patchclamp sites` prints: each kind of site with its axes and sizes, or why the model lacks it."""
        from patchclamp.models.describe import describe

        return describe(self.anatomy)

    def encode(self, text: str | Sequence[str], bos: bool | None = None) -> Batch:
        """Plain text as a batch without targets (left-padded), special tokens as the tokenizer does."""
        from patchclamp.models.inputs import text_batch

        return text_batch(self.tokenizer, [text] if isinstance(text, str) else list(text), bos=bos)

    def run(self, inputs: Inputs, edits: Edits | None = None) -> Float[Tensor, "row position token"]:
        """Logits at every position. One forward pass, without gradient.

        Args:
            inputs: a batch, text, several texts, or token ids [row, position].
            edits: what to edit, by site.
        """
        batch = self.batch(inputs)
        with torch.no_grad():
            return self.forward(batch, edits)

    def target_logits(
        self, batch: Batch, edits: Edits | None = None, settings: int = 1, start: Start = Start()
    ) -> Float[Tensor, "setting target token"]:
        """Logits at the batch's targets, for `settings` copies of its rows. With gradient where one is recorded.

        Only the columns that hold targets are unembedded. `start` (from `replay.reference`) is where the run starts: edits may
        act on its blocks and columns only; with a tree, on its runs.

        Raises:
            NumericsError: NaN among the logits.
        """
        batch = batch.to(self.device)
        columns = batch.target_position.unique()
        logits = self.at_targets(batch, self.forward(batch, edits, settings=settings, columns=columns, start=start))
        leaves = range(len(logits)) if start.tree is None else start.tree.leaves
        return logits if list(leaves) == list(range(len(logits))) else logits[list(leaves)]

    def at_targets(self, batch: Batch, logits: Float[Tensor, "row column token"]) -> Float[Tensor, "setting target token"]:
        """Logits of copies of a batch's rows at the columns that hold targets, as logits at its targets.

        Raises:
            NumericsError: NaN among them.
        """
        place = batch.target_position.unique(return_inverse=True)[1]
        logits = logits.unflatten(0, (-1, len(batch.tokens)))[:, batch.target_row, place]
        if not bool(torch.isfinite(logits).any(-1).all()) or bool(torch.isnan(logits).any()):
            raise NumericsError(
                f"{self.name} gives NaN logits at the answer positions: the weights hold NaN, or the precision {self.dtype} "
                "overflows (try --dtype float32)"
            )
        return logits

    def forward(
        self,
        batch: Batch,
        edits: Edits | None = None,
        *,
        settings: int = 1,
        columns: Int[Tensor, " column"] | None = None,
        start: Start = Start(),
    ) -> Float[Tensor, "row column token"]:
        """Logits of `settings` copies of the batch's rows (setting by setting), at `columns` or everywhere that runs.

        Gradients flow to whatever requires them: weights of the model never do through here unless the caller says so.
        """
        batch, settings = batch.to(self.device), start.copies(settings)
        columns = None if columns is None else columns - start.column
        with self.editing(edits or {}, batch, settings=settings) as now:
            now.unembedded = columns if self.anatomy.keeps_logits else None
            if start.column or start.stop:
                now.ran, stop = start.column, start.stop or batch.tokens.shape[1]
                now.stretches = (Stretch(now.ran, stop, "prompt", 0),)
            return self._forward(batch, settings, columns, start)

    def _forward(
        self, batch: Batch, settings: int = 1, columns: Int[Tensor, " column"] | None = None, start: Start = Start()
    ) -> Float[Tensor, "row column token"]:
        options, runs = start.options(settings), slice(start.column, start.stop)
        if self.anatomy.takes_positions:
            options["position_ids"] = batch.position_ids[:, runs].repeat(settings, 1)
        if columns is not None and self.anatomy.keeps_logits:
            options["logits_to_keep"] = columns
        tokens, mask = batch.tokens[:, runs].repeat(settings, 1), batch.mask[:, : start.stop].long().repeat(settings, 1)
        with still(self.hf), start.standing(self.anatomy):
            logits = self.hf(input_ids=tokens, attention_mask=mask, **options).logits
        if columns is not None and not self.anatomy.keeps_logits:
            logits = logits[:, columns]
        return logits

    @contextmanager
    def editing(self, edits: Edits, inputs: Inputs | None = None, *, settings: int = 1) -> Generator[Pass, None, None]:
        """While open, the model computes with `edits`; nested, inner edits see what outer ones made. Backward runs inside.

        Args:
            edits: by site.
            inputs: what will run; needed where sites have positions or edits look at the mask.
            settings: copies of the rows that will run.

        Yields:
            The state that edits see.
        """
        if inputs is None:
            empty = torch.zeros(0, 0, dtype=torch.long, device=self.device)
            now = Pass(empty.bool(), empty)
        else:
            batch = self.batch(inputs).to(self.device)
            now = Pass(batch.mask.repeat(settings, 1), batch.position_ids.repeat(settings, 1), batch.columns, settings=settings)
        made = visitors(self.anatomy, edits, now)
        if not made:
            yield now
            return
        with Session(self.anatomy, made).open():
            yield now

    def record(
        self, inputs: Inputs, sites: str | Site | Iterable[str | Site], edits: Edits | None = None, *, grad: bool = False
    ) -> dict[Site, Tensor]:
        """Values at sites, from one forward pass.

        Args:
            inputs: a batch, text, several texts, or token ids.
            sites: sites or patterns: "L*.h*.pattern", "L3.resid.post", ["embed", "L*.mlp"].
            edits: run with these edits; what is recorded is what the edited model computes.
            grad: keep the graph (off by default).

        Returns:
            By site, in forward order; axes as `sites.KINDS` names them, less the axis that the site indexes.
        """
        from patchclamp.models.recording import Recorder

        batch = self.batch(inputs)
        wanted = self.find(sites)
        recorder = Recorder(self.anatomy, wanted)
        with torch.set_grad_enabled(grad), self.editing(edits or {}, batch), recorder.session().open():
            self._forward(batch.to(self.device))
        return recorder.values(batch)

    def find(self, sites: str | Site | Iterable[str | Site]) -> tuple[Site, ...]:
        """The sites that patterns name; raises `SiteError` where the model has none, with the reason."""
        return named(self.anatomy, self.sites, sites)

    def batch(self, inputs: Inputs) -> Batch:
        """Anything that can be run, as a batch."""
        if isinstance(inputs, Batch):
            return inputs
        if isinstance(inputs, Tensor):
            from patchclamp.models.inputs import token_batch

            return token_batch(inputs)
        return self.encode(inputs)

    def generate(
        self,
        prompts: Inputs,
        edits: Edits | None = None,
        *,
        max_new_tokens: int = 20,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        cache: bool = True,
        stop: Sequence[str | int] = (),
        on: Literal["all", "prompt", "generation"] = "all",
    ) -> Generation:
        """Continue prompts, with edits on while the prompt runs and for every new token; see `models.generation.generate`."""
        from patchclamp.models.generation import generate

        return generate(
            self, prompts, edits, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
            cache=cache, stop=stop, on=on,
        )  # fmt: skip

    @cached_property
    def folder(self) -> Path | None:
        """The local folder that the weights came from, if there is one."""
        path = Path(str(getattr(self.hf, "name_or_path", "") or ""))
        return path if path.is_dir() else None
