"""LightningModules and LightningDataModules."""
