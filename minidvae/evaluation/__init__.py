"""One file per experiment of the papers. Each has `MODELS`, the models that it is for, and `evaluate(runs, options)`,
which prints its tables, writes its files into each run's folder and returns its results, a dict for each run."""
