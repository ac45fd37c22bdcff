"""Data sets: each is a settings dataclass whose ``load(data_dir)`` gives an ``ImageData``.

A new data set is one file here, one YAML in ``configs/dataset`` and one row in a test table.
"""
