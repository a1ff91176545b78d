"""Trained models applied to recordings: enhancement and voice conversion."""
