"""The ground floor: artifacts, configuration, splits, statistics, errors. Never imports torch."""
