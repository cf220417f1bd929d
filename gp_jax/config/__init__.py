"""What a model is, what a vision tower is, configuration files, settings that are words; types with bounds."""
