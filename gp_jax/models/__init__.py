"""Vision towers, the decoder, and the model that combines them with a glimpse."""
