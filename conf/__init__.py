"""The configuration groups, found by Hydra as `pkg://depass_lightning.conf`."""
