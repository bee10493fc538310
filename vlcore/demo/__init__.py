"""The demo: real drawings and articles, all three training stages, and a report, on a CPU in minutes."""
