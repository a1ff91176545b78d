"""Evaluations that only the FHVAE paper needs (Hsu, Zhang & Glass 2017)."""
