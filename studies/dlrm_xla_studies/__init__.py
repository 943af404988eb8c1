"""Studies: a grid of runs from one YAML file, their results as one table, statistics, plots, and a page."""
