"""One file per evaluation of the papers. Each has `MODELS`, the names of the models that it is for,
and `evaluate(runs, options)`, which returns an `Evaluation` (`results.py`)."""
