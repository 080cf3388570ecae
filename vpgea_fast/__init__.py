"""VPG-EA: variational posterior guidance with efficiency awareness, trained end to end."""

__version__ = "0.1.0"
