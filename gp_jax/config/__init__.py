"""Configurations of models and vision towers, configuration files, settings with fixed choices, and types with bounds."""
