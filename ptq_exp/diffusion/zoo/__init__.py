"""Published diffusion models, built with `diffusers` modules and filled from their original checkpoints.

`registry.MODELS` names the builder of each; architectures of `diffusers` take seconds to import, and a run has one.
"""
