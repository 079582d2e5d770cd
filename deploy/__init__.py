"""Bundles: packed, verified and (later) installed and released."""
