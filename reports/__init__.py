"""Run folders to rows to tables, plots and one HTML page."""
