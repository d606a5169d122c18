"""The contract between training, model server and gateway. Needs Pillow and numpy, nothing else."""
