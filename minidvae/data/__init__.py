"""Speech: sound files, corpora, synthetic speech. Knows no model."""
