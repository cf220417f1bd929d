"""Data for training and evaluation: public formats in, one format inside, batches of fixed shapes out."""
