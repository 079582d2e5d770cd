"""Bundles packed, verified and installed; what lets them through; releases of them."""
