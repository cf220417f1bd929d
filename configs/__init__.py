"""Configurations, one per file: they import one another as `configs.NAME`, and so does your own copy of one, in any folder."""
