"""One update: forward and backward in pieces, clamps, clipping, the optimizer."""

from collections.abc import Sequence

import torch

from patchclamp.errors import NumericsError, TrainingError
from patchclamp.models.model import Model
from patchclamp.training import distributed
from patchclamp.training.clamp import Clamp, joined
from patchclamp.training.data import Data, Rows
from patchclamp.training.forward import autocast, logits_of, require_fit
from patchclamp.training.loss import Loss
from patchclamp.training.plan import Training


class Update:
    """Updates of one model, with the optimizer's and the loss scaler's state."""

    def __init__(self, model: Model, data: Data, training: Training, clamps: Sequence[Clamp], loss: Loss) -> None:
        self.model, self.data, self.training, self.clamps, self.loss = model, data, training, clamps, loss
        self.optimizer = build_optimizer(model, training)
        self.weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        self.scaler = torch.amp.GradScaler(model.device.type, enabled=training.precision == "float16")

    def require_fit(self) -> None:
        """Raise where the first rows are none that the model can take, or not as many as were asked for."""
        self._rows(0)

    def __call__(self, step: int, stop: bool = False) -> tuple[dict[str, float], bool]:
        """One update; its numbers (loss, rate, gradient, tokens of this update), and whether any process was asked to stop.

        Args:
            step: updates before it.
            stop: whether this process was asked to stop.
        """
        rows = self._rows(step)
        total = self._gradients(rows, step)
        distributed.sum_gradients(self.weights)
        total, stops = distributed.summed([total, float(stop)], self.model.device)
        rate = self.training.rate_at(step)
        numbers = {"loss": total, "rate": rate, "gradient": self._apply(step, rate), "tokens": float(rows.real.sum())}
        if self.scaler.is_enabled():
            numbers["scale"] = float(self.scaler.get_scale())
        for clamp in self.clamps:
            clamp.updated(self.model, step + 1)
        return numbers, stops > 0

    def tried(self, step: int) -> float:
        """All the work of an update at rate 0, which leaves the weights as they are; real tokens of it."""
        rows = self._rows(step)
        self._gradients(rows, step)
        self._apply(step, 0.0)
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return float(rows.real.sum())

    def _gradients(self, rows: Rows, step: int) -> float:
        """This process's share of the whole gradient; returns its share of the loss."""
        model, training = self.model, self.training
        self.optimizer.zero_grad(set_to_none=True)
        whole, total = rows.weight, 0.0
        model.hf.train()
        mine = rows.split(distributed.world())[distributed.rank()]
        with torch.random.fork_rng():
            # By step and process, not by what ran before.
            torch.manual_seed(training.seed * 1_000_003 + step + 7919 * 2**32 * distributed.rank())
            for piece in mine.split(training.accumulate):
                if share := piece.weight / whole:
                    total += share * self._backward(piece.to(model.device), step, share)
        model.hf.eval()
        return total

    def _rows(self, step: int) -> Rows:
        rows = self.data.rows(step, self.training.batch)
        if len(rows.tokens) != self.training.batch:
            raise TrainingError(
                f"{self.training.batch} rows were asked for step {step}, and {self.data.name} gave {len(rows.tokens)}: "
                "data must give as many as are asked"
            )
        require_fit(self.model, rows)
        return rows

    def _backward(self, rows: Rows, step: int, share: float) -> float:
        """Forward and backward of one piece, inside the clamps' edits; returns its loss."""
        model = self.model
        edits = [clamp.edits(model, step, rows) for clamp in self.clamps]
        with joined(model, edits, rows):
            with autocast(model, self.training.precision):
                value = self.loss(logits_of(model, rows), rows)
            number = float(value.detach())
            if not -float("inf") < number < float("inf"):
                raise NumericsError(f"the loss is {number} at step {step}: take a lower rate, or clip harder")
            self.scaler.scale(value * share).backward()
        return number

    def _apply(self, step: int, rate: float) -> float:
        """Clamps and clipping change the gradients, the optimizer the weights; returns the norm before clipping."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.scaler.unscale_(self.optimizer)
        for clamp in self.clamps:
            clamp.gradients(self.model, step)
        gradients = [weight.grad for weight in self.weights if weight.grad is not None]
        if not gradients:
            raise TrainingError(
                f"no weight has a gradient at step {step}: the loss does not depend on any weight that is trained"
            )
        norm = torch.nn.utils.get_total_norm(gradients)
        number = float(norm)
        if not number < float("inf") and not self.scaler.is_enabled():
            raise NumericsError(f"the gradient's norm is {number} at step {step}: take a lower rate, or another precision")
        if self.training.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.weights, self.training.clip, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return number


def build_optimizer(model: Model, training: Training) -> torch.optim.Optimizer:
    """AdamW, or SGD; weight decay on tensors of two axes and more."""
    weights = [p for p in model.hf.parameters() if p.requires_grad]
    if not weights:
        raise TrainingError(f"{model.name} has no weights that require gradients: nothing can be trained")
    groups = [
        {"params": [p for p in weights if p.ndim > 1], "weight_decay": training.decay},
        {"params": [p for p in weights if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if training.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=training.rate, momentum=training.betas[0])
    return torch.optim.AdamW(groups, lr=training.rate, betas=training.betas, eps=training.epsilon)
