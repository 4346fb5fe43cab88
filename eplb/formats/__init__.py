"""Files of expert loads and placements, ours and other engines', one file a format."""
