"""What people read of an evaluation: tables, statistics, plots, pictures, one HTML page."""
