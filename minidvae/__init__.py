"""Dynamical variational autoencoders for speech: see README.md, or `minidvae.models.build_model`."""
