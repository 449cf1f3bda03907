"""Faces of `ProbeMonitor` for other training frameworks than Lightning."""
