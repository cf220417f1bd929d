"""Programs made ahead of time, for machines that are not here: compiled for a TPU, or exported as a folder (`artifact`)."""
