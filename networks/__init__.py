"""Networks as torch modules: made by name, read from and written to checkpoints.

Below the rooms that train, export and quantise, because all three need a checkpoint as a module.
"""
