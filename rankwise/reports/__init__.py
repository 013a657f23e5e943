"""Reports: what a run's folder says, as one self-contained page and as a model card.  Torch-free."""
