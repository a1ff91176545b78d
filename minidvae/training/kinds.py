"""Which source of batches a model learns from."""

from ..models.base import Model
from .batches import Batches
from .segment_batches import FeatureSegments
from .spectra import Spectra
from .utterance_batches import Utterances


def kind_of(model: type[Model]) -> type[Batches]:
    return next(
        kind for kind in (Spectra, FeatureSegments, Utterances) if issubclass(model, kind.models)
    )
