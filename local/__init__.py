"""Kennel on one machine: both processes with one command, and a client for them."""
