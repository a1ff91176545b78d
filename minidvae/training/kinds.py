"""Which source of batches a model learns from."""

from ..models.base import Model
from .batches import Batches
from .segments import FeatureSegments
from .spectra import Spectra
from .utterances import Utterances


def kind_of(model: type[Model]) -> type[Batches]:
    return next(kind for kind in (Spectra, FeatureSegments, Utterances) if issubclass(model, kind.models))
