"""HTML, Markdown, plots and tables of a report."""
