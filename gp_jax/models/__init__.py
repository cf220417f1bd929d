"""Vision towers, the one decoder, and the model that they form with a glimpse."""
