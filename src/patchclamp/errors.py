"""The tree of errors. Each message says what was asked, what there is, and what to do."""


class PatchclampError(Exception):
    """Base of every error that a user can cause and mend; the command line prints it and leaves with code 2."""


class SiteError(PatchclampError):
    """A site that does not parse, or that this model does not have."""


class ModelError(PatchclampError):
    """A model that cannot be found, loaded or run as asked."""


class FamilyError(ModelError):
    """An architecture that is not understood; names the invariant that failed."""


class TaskError(PatchclampError):
    """A task that cannot be found, read or built; names the line or the words."""


class AlignmentError(TaskError):
    """Prompts of a pair that do not align token by token."""


class BaselineError(PatchclampError):
    """The model does not show the behaviour, so there is nothing to map."""


class GateError(PatchclampError):
    """Gates, fallbacks or edits that do not fit the model, the batch or each other."""


class BudgetError(PatchclampError):
    """An amount of memory that does not parse, or that the device does not have."""


class MetricError(PatchclampError):
    """A metric that the batch or the method cannot serve."""


class MeasureError(PatchclampError):
    """A measure of a model that these rows, this model or so few checkpoints cannot serve; says what would."""


class NumericsError(PatchclampError):
    """NaN or infinite values where a number was needed; names the place."""


class StoreError(PatchclampError):
    """A run folder that is damaged, foreign or cannot be written."""


class SweepError(PatchclampError):
    """A sweep that cannot be read or run as asked: its plans, its workers, or the cluster that it is to run on."""


class TrainingError(PatchclampError):
    """A training that cannot be run or resumed as asked: its numbers, its data, its clamps or its folder."""
