"""Miniatures of every dataset, in its exact layout on disk, with generated pictures and a recoverable answer."""
