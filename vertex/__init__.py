"""Kennel on Vertex AI: what submits, follows and brings back. It knows the cloud; training/job.py, inside, does not."""
