"""Labelled pictures -> bundle. Knows torch, never HTTP."""

import bundle as bundle  # sets what must be set before the libraries are imported
