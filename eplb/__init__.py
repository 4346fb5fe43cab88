"""The expert load balancer: numpy in, placements out. Never imports torch."""
