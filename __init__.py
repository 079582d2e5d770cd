"""kdpipe: from a trained teacher and a folder of images to a small model measured on its device."""

__version__ = "0.1.0"
