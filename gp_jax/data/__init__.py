"""Data for training and evaluation: public annotation formats are read into one record type and become batches of fixed shapes."""
