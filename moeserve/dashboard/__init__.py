"""What the dashboard shows: expert load, placement and solver put together. Knows no HTTP."""
