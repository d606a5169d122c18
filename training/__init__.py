"""Labelled pictures -> bundle. Knows torch, never HTTP."""
