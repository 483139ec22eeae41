"""Medusa heads on Ray: self-distil, train, serve and measure them."""
