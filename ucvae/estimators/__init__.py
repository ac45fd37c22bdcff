"""Gradient estimators: ``(model, images, generator)`` to a scalar to differentiate."""
