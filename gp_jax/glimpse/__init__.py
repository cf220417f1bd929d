"""The learned glimpse: its prompt rows and the importance predictor."""
